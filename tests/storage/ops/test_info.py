"""The numbers of ``specx store info``."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from specx.storage.catalog.rejects import RejectLog
from specx.storage.ops.info import summary
from specx.storage.schema import DatasetInfo, Reject, SequenceFeatures, array_specs
from specx.storage.store import FeatureStore

Fill = Callable[..., FeatureStore]

N = 8


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, fill: Fill) -> FeatureStore:
    return fill(tmp_path_factory.mktemp("summary") / "store", N, tokens_per_part=200)


def test_bytes_are_those_of_the_files_on_disk(store: FeatureStore) -> None:
    numbers = summary(store)
    files = [path for path in Path(store.root, "parts").rglob("*") if path.is_file()]
    assert numbers["bytes"] == sum(path.stat().st_size for path in files)
    assert sum(numbers["bytes_by_array"].values()) == numbers["bytes"]
    for name in [*array_specs(store.info), "seq_offsets", "seq_ids"]:
        below = [path for path in files if path.relative_to(store.root).parts[2] == name]
        assert numbers["bytes_by_array"][name] == sum(path.stat().st_size for path in below), name


def test_counts_and_lengths_are_those_of_the_sequences(
    store: FeatureStore, sequence: Callable[[int], SequenceFeatures]
) -> None:
    numbers = summary(store)
    lengths = sorted(len(sequence(i).input_ids) for i in range(N))
    assert numbers["sequences"] == N
    assert numbers["tokens"] == sum(lengths)
    assert numbers["parts"] == len(list(Path(store.root, "commits").iterdir()))
    assert (numbers["lengths"]["min"], numbers["lengths"]["max"]) == (lengths[0], lengths[-1])
    assert lengths[N // 2 - 1] <= numbers["lengths"]["median"] <= lengths[N // 2]
    assert numbers["bytes_per_token"] == pytest.approx(numbers["bytes"] / numbers["tokens"], abs=0.05)


def test_categories_and_sources_are_counted(store: FeatureStore) -> None:
    numbers = summary(store)
    assert numbers["categories"] == {"chat": 5, "": 3}
    assert numbers["sources"] == {"first.jsonl": 4, "second.jsonl": 4}


def test_settings_and_target_are_those_of_the_store(store: FeatureStore, info: DatasetInfo) -> None:
    numbers = summary(store)
    for key, value in info.model_dump(mode="json", exclude={"crc32c"}).items():
        assert numbers[key] == value, key


def test_rejected_rows_are_counted_once(tmp_path: Path, info: DatasetInfo) -> None:
    store = FeatureStore.create(tmp_path / "store", info)
    reject = Reject(source="a", row=1, reason="too_long", detail="")
    for rows in ((1,), (1, 2)):
        with RejectLog(store.place) as log:
            for row in rows:
                log.add(reject.model_copy(update={"row": row}))
    assert summary(store)["rejected"] == 2


def test_an_empty_store_has_zeros(tmp_path: Path, info: DatasetInfo) -> None:
    numbers = summary(FeatureStore.create(tmp_path / "store", info))
    assert (numbers["sequences"], numbers["tokens"], numbers["bytes"], numbers["bytes_per_token"]) == (0, 0, 0, 0.0)
    assert numbers["lengths"] == {"min": 0, "median": 0, "p95": 0, "max": 0}


def test_the_summary_is_ready_for_json(store: FeatureStore) -> None:
    numbers = summary(store)
    assert json.loads(json.dumps(numbers)) == numbers
