"""A row left out is in the store with its reason, once."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from specx.storage.catalog.rejects import RejectLog, count_rejects, read_rejects
from specx.storage.schema import DatasetInfo, Reject
from specx.storage.store import FeatureStore


@pytest.fixture
def store(tmp_path: Path, info: DatasetInfo) -> FeatureStore:
    return FeatureStore.create(tmp_path / "store", info)


def reject(row: int, reason: str = "too_long") -> Reject:
    return Reject(source="first.jsonl", row=row, reason=reason, detail=f"row {row}: 9000 tokens, at most 4096")


def write(store: FeatureStore, rejects: list[Reject]) -> RejectLog:
    with RejectLog(store.place) as log:
        for one in rejects:
            log.add(one)
    return log


def files(store: FeatureStore) -> list[Path]:
    return list(Path(store.root, "rejects").glob("*"))


def test_rejects_are_read_as_they_were_written(store: FeatureStore) -> None:
    rows = [reject(3), reject(1, "no_answer"), reject(2)]
    write(store, rows)
    assert sorted(read_rejects(store.place), key=lambda one: one.row) == sorted(rows, key=lambda one: one.row)


def test_a_store_without_rejects_has_none_and_no_file(store: FeatureStore) -> None:
    write(store, [])
    assert read_rejects(store.place) == []
    assert not Path(store.root, "rejects").exists()


def test_a_row_met_again_by_another_run_is_not_written_again(store: FeatureStore) -> None:
    write(store, [reject(0), reject(1)])
    write(store, [reject(0), reject(1)])
    assert len(files(store)) == 1
    write(store, [reject(1), reject(2)])
    assert sorted(one.row for one in read_rejects(store.place)) == [0, 1, 2]
    rows = [row for path in files(store) for row in pq.read_table(path).to_pylist()]
    assert sorted(row["row"] for row in rows) == [0, 1, 2]


def test_a_row_met_twice_in_one_run_is_read_once(store: FeatureStore) -> None:
    write(store, [reject(0), reject(0)])
    assert read_rejects(store.place) == [reject(0)]


def test_one_row_with_two_reasons_is_two_rejects(store: FeatureStore) -> None:
    write(store, [reject(0, "too_long"), reject(0, "not_finite")])
    assert len(read_rejects(store.place)) == 2


def test_an_unfinished_file_is_not_read(store: FeatureStore) -> None:
    write(store, [reject(0)])
    (Path(store.root) / "rejects" / ".tmp-0123-r0.parquet").write_bytes(b"PAR1")
    assert read_rejects(store.place) == [reject(0)]


def test_rows_are_on_disk_while_the_run_goes_on_and_after_it_broke_off(store: FeatureStore) -> None:
    def break_off() -> None:
        with RejectLog(store.place, rows_per_file=3) as log:
            for row in range(7):
                log.add(reject(row))
                assert len(read_rejects(store.place)) == (row + 1) // 3 * 3
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert len(files(store)) == 3
    assert sorted(one.row for one in read_rejects(store.place)) == list(range(7))


def test_the_count_is_of_the_rows_of_this_run_known_or_not(store: FeatureStore) -> None:
    assert write(store, [reject(0), reject(1)]).count == 2
    assert write(store, [reject(1), reject(1), reject(2)]).count == 3
    assert count_rejects(store.place) == 3


def test_two_logs_at_once_lose_nothing_and_a_row_of_both_counts_once(store: FeatureStore) -> None:
    with RejectLog(store.place) as first, RejectLog(store.place) as second:
        for row in range(4):
            first.add(reject(row))
            second.add(reject(row + 2))
    assert sorted(one.row for one in read_rejects(store.place)) == list(range(6))
    assert count_rejects(store.place) == 6
