"""``specx extract`` killed at random moments: nothing lost, nothing twice, the bytes as if undisturbed.

8 kills, or as many as SPECX_EXTRACT_KILLS says: `make torture` has 20.
"""

import os
import random
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from specx.extract.config import ExtractConfig
from specx.extract.pipeline import run
from specx.storage.ops.verify import verify
from specx.storage.store import FeatureStore
from specx.tests.command import CONTEXT

KILLS = int(os.environ.get("SPECX_EXTRACT_KILLS", "8"))
SEQUENCES = 30


def settings(store: Path, target: Path, regen: Path) -> ExtractConfig:
    return ExtractConfig(
        target=str(target),
        data=(str(regen / "train.parquet"),),
        store=str(store),
        limit=SEQUENCES,
        tokens_per_part=1000,
    )


def contents(store: FeatureStore) -> list[dict[str, bytes]]:
    """Every file of every part, in the order of commit."""
    parts = [Path(store.part_path(store.records[unit])) for unit in sorted(store.records)]
    return [
        {path.relative_to(part).as_posix(): path.read_bytes() for path in sorted(part.rglob("*")) if path.is_file()}
        for part in parts
    ]


def commits(store: Path) -> int:
    return len(list(store.glob("commits/u*.json")))


def test_kills_each_followed_by_a_rerun_leave_the_store_of_an_undisturbed_run(
    tmp_path: Path, target: Path, regen: Path
) -> None:
    def start(store: Path) -> ForkServerProcess:
        process = CONTEXT.Process(target=run, args=(settings(store, target, regen),))
        process.start()
        return process

    whole = start(tmp_path / "undisturbed")
    whole.join()
    assert whole.exitcode == 0
    expected = contents(FeatureStore.open(tmp_path / "undisturbed"))
    assert len(expected) > 4, "kills must fall between commits"

    generator = random.Random(0)
    killed_between_commits = 0
    for number in range(KILLS):
        path = tmp_path / f"killed-{number}"
        process = start(path)
        # A run is mostly loading; the moment is random within the time that writes.
        after = generator.randrange(len(expected))
        while process.is_alive() and commits(path) < after:
            time.sleep(0.001)
        process.join(timeout=generator.uniform(0.0, 0.2))
        process.kill()
        process.join()
        killed_between_commits += 0 < commits(path) < len(expected)
        process = start(path)
        process.join()
        assert process.exitcode == 0
        store = FeatureStore.open(path)
        assert verify(store).problems == []
        identifiers = [identifier for record in store.records.values() for identifier in record.sequences.ids]
        assert len(identifiers) == len(set(identifiers)) == SEQUENCES
        assert contents(store) == expected
    assert killed_between_commits >= KILLS // 4


def test_leftovers_of_a_killed_run_are_no_part_of_the_store(tmp_path: Path, store_copy: Path) -> None:
    before = verify(FeatureStore.open(store_copy))
    leftover = store_copy / "parts" / "u000003-0123.zarr"
    leftover.mkdir()
    (leftover / "zarr.json").write_text("half a fi")
    (store_copy / "commits" / ".tmp-1-u000003.json").write_text("{")
    after = verify(FeatureStore.open(store_copy))
    assert after.problems == []
    assert after.sequences == before.sequences
    assert after.unreferenced == ["parts/u000003-0123.zarr", "commits/.tmp-1-u000003.json"]


@pytest.mark.parametrize("rows", [1, 2])
def test_a_rerun_with_nothing_left_reuses_everything(tmp_path: Path, target: Path, regen: Path, rows: int) -> None:
    config = settings(tmp_path / "store", target, regen).model_copy(update={"limit": rows})
    first, second = run(config), run(config)
    assert (first.sequences, first.reused) == (rows, 0)
    assert (second.sequences, second.reused, second.tokens) == (0, rows, 0)
