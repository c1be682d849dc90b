"""Leftovers go, and nothing else does."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from specx.storage.ops.gc import collect
from specx.storage.ops.verify import verify
from specx.storage.store import FeatureStore

DAY_S = 24 * 3600.0


def age(path: Path, seconds: float) -> None:
    """Let a file or directory look as if nobody had changed it for so long."""
    for each in (path, *path.rglob("*")):
        os.utime(each, (time.time() - seconds,) * 2)


@pytest.fixture
def littered(tmp_path: Path, fill: Callable[..., FeatureStore]) -> FeatureStore:
    """A store with an old part that nobody names, a young one, and old temporary files."""
    store = fill(tmp_path / "store", 6, tokens_per_part=200)
    root = Path(store.root)
    for name, seconds in (("u000009-old.zarr", 2 * DAY_S), ("u000009-young.zarr", 60.0)):
        (root / "parts" / name / "lse").mkdir(parents=True)
        (root / "parts" / name / "lse" / "zarr.json").write_text("{}")
        age(root / "parts" / name, seconds)
    for path in (root / "commits" / ".tmp-1-u000009.json", root / ".tmp-1-target"):
        path.write_text("{}")
        age(path, 2 * DAY_S)
    # Parts that are committed may be as old as they like.
    age(root / "parts" / store.records[0].part, 100 * DAY_S)
    return store


def test_old_leftovers_are_removed_and_counted(littered: FeatureStore) -> None:
    found = collect(littered, older_than_s=DAY_S, dry_run=False)
    assert sorted(found.removed) == [".tmp-1-target", "commits/.tmp-1-u000009.json", "parts/u000009-old.zarr"]
    assert found.too_young == ["parts/u000009-young.zarr"]
    assert found.bytes == 2
    root = Path(littered.root)
    assert not any((root / key).exists() for key in found.removed)
    assert (root / "parts" / "u000009-young.zarr").exists()
    opened = FeatureStore.open(root)
    assert opened.records == littered.records
    assert verify(opened).problems == []


def test_a_dry_run_removes_nothing(littered: FeatureStore) -> None:
    found = collect(littered, older_than_s=DAY_S, dry_run=True)
    assert len(found.removed) == 3
    assert all((Path(littered.root) / key).exists() for key in found.removed)


def test_a_part_that_is_committed_meanwhile_stays(tmp_path: Path, fill: Callable[..., FeatureStore]) -> None:
    early = fill(tmp_path / "store", 3, tokens_per_part=200)
    later = fill(tmp_path / "store", 8, tokens_per_part=200)
    assert len(later.records) > len(early.records)
    age(tmp_path / "store" / "parts", 100 * DAY_S)
    assert collect(early, older_than_s=DAY_S, dry_run=False).removed == []
    assert verify(FeatureStore.open(later.root)).problems == []
