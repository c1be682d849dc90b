"""A row left out is in the store with its reason, once."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from specx.storage.rejects import read_rejects, write_rejects
from specx.storage.schema import DatasetInfo, Reject
from specx.storage.store import FeatureStore


@pytest.fixture
def store(tmp_path: Path, info: DatasetInfo) -> FeatureStore:
    return FeatureStore.create(tmp_path / "store", info)


def reject(row: int, reason: str = "too_long") -> Reject:
    return Reject(source="first.jsonl", row=row, reason=reason, detail=f"row {row}: 9000 tokens, at most 4096")


def test_rejects_are_read_as_they_were_written(store: FeatureStore) -> None:
    rows = [reject(3), reject(1, "no_answer"), reject(2)]
    write_rejects(store, rows)
    assert sorted(read_rejects(store), key=lambda one: one.row) == sorted(rows, key=lambda one: one.row)


def test_a_store_without_rejects_has_none_and_no_file(store: FeatureStore) -> None:
    write_rejects(store, [])
    assert read_rejects(store) == []
    assert not Path(store.root, "rejects").exists()


def test_a_row_met_again_by_another_run_is_not_written_again(store: FeatureStore) -> None:
    write_rejects(store, [reject(0), reject(1)])
    write_rejects(store, [reject(0), reject(1)])
    assert len(list(Path(store.root, "rejects").iterdir())) == 1
    write_rejects(store, [reject(1), reject(2)])
    assert sorted(one.row for one in read_rejects(store)) == [0, 1, 2]
    rows = [row for path in Path(store.root, "rejects").iterdir() for row in pq.read_table(path).to_pylist()]
    assert sorted(row["row"] for row in rows) == [0, 1, 2]


def test_a_row_met_twice_in_one_run_is_read_once(store: FeatureStore) -> None:
    write_rejects(store, [reject(0), reject(0)])
    assert read_rejects(store) == [reject(0)]


def test_one_row_with_two_reasons_is_two_rejects(store: FeatureStore) -> None:
    write_rejects(store, [reject(0, "too_long"), reject(0, "not_finite")])
    assert len(read_rejects(store)) == 2


def test_an_unfinished_file_is_not_read(store: FeatureStore) -> None:
    write_rejects(store, [reject(0)])
    (Path(store.root) / "rejects" / ".tmp-0123-r0.parquet").write_bytes(b"PAR1")
    assert read_rejects(store) == [reject(0)]
