"""The index is a cache: it makes opening fast, and never changes what is in a store."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from specx.storage.backends.local import LocalPlace
from specx.storage.catalog.commit_log import COMMITS_DIRECTORY
from specx.storage.catalog.index import INDEX_DIRECTORY
from specx.storage.errors import StoreError
from specx.storage.ops.verify import drop_damaged, verify
from specx.storage.schema import SequenceFeatures
from specx.storage.store import FeatureStore

Fill = Callable[..., FeatureStore]
COLUMNS = ("ids", "unit", "offset", "length", "category", "source", "row")


@pytest.fixture
def store(tmp_path: Path, fill: Fill) -> FeatureStore:
    """A store of 12 sequences in several parts, with an index of all."""
    made = fill(tmp_path / "store", 12, tokens_per_part=150)
    made.records.save_index(unindexed=1)
    return made


@pytest.fixture
def read_keys(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the files that are read from now on."""
    keys: list[str] = []
    read = LocalPlace.read

    def noting(self: LocalPlace, key: str) -> bytes:
        keys.append(key)
        return read(self, key)

    monkeypatch.setattr(LocalPlace, "read", noting)
    return keys


def records_read(keys: list[str]) -> list[str]:
    return [key for key in keys if key.startswith(COMMITS_DIRECTORY)]


def assert_same_catalogue(one: FeatureStore, other: FeatureStore) -> None:
    for name in COLUMNS:
        assert np.array_equal(getattr(one.catalogue(), name), getattr(other.catalogue(), name)), name


def index_files(store: FeatureStore) -> list[Path]:
    return sorted((Path(store.root) / INDEX_DIRECTORY).iterdir())


def test_a_store_with_an_index_opens_without_reading_records(store: FeatureStore, read_keys: list[str]) -> None:
    opened = FeatureStore.open(store.root)
    assert len(opened.catalogue()) == 12
    assert records_read(read_keys) == []
    assert_same_catalogue(opened, store)
    assert opened.records[2] == store.records[2]
    assert records_read(read_keys) == ["commits/u000002.json"]


def test_records_that_came_after_the_index_are_read(store: FeatureStore, fill: Fill, read_keys: list[str]) -> None:
    units = len(store.records)
    fill(store.root, 15, tokens_per_part=150)
    read_keys.clear()
    opened = FeatureStore.open(store.root)
    assert len(opened.catalogue()) == 15
    assert {int(key[-11:-5]) for key in records_read(read_keys)} == set(range(units, len(opened.records)))


def test_a_new_index_replaces_the_old(store: FeatureStore, fill: Fill) -> None:
    (before,) = index_files(store)
    more = fill(store.root, 15, tokens_per_part=150)
    more.records.save_index(unindexed=1)
    (after,) = index_files(store)
    assert before != after
    assert_same_catalogue(FeatureStore.open(store.root), more)


def test_few_new_records_are_not_worth_an_index(tmp_path: Path, fill: Fill) -> None:
    made = fill(tmp_path / "store", 12, tokens_per_part=150)
    made.records.save_index()
    assert not (tmp_path / "store" / INDEX_DIRECTORY).exists()


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied", "foreign"])
def test_a_damaged_index_is_as_none(store: FeatureStore, read_keys: list[str], damage: str) -> None:
    (path,) = index_files(store)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"flipped": bytes(content), "cut": content[:-9], "emptied": b"", "foreign": b"PAR1"}[damage])
    opened = FeatureStore.open(store.root)
    assert_same_catalogue(opened, store)
    assert len(records_read(read_keys)) == len(store.records)
    (problem,) = verify(opened).problems
    assert problem.startswith(f"{path}: damaged.")


def test_every_flipped_byte_of_the_index_is_found(store: FeatureStore) -> None:
    (path,) = index_files(store)
    content = path.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(content), 50).tolist():
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        assert len(verify(FeatureStore.open(store.root)).problems) == 1


def test_a_record_that_was_removed_is_not_in_the_store_whatever_the_index_says(store: FeatureStore) -> None:
    Path(store.commit_path(1)).unlink()
    opened = FeatureStore.open(store.root)
    assert sorted(opened.records) == [unit for unit in store.records if unit != 1]
    assert 1 not in opened.catalogue().unit
    assert len(opened.catalogue()) == 12 - len(store.records[1].sequences.ids)


def test_a_record_that_took_the_place_of_another_is_read(
    store: FeatureStore, fill: Fill, sequence: Callable[[int], SequenceFeatures]
) -> None:
    last = max(store.records)
    Path(store.commit_path(last)).unlink()
    refilled = fill(store.root, 12, tokens_per_part=10_000)
    assert max(refilled.records) == last
    opened = FeatureStore.open(store.root)
    assert opened.records[last] == refilled.records[last] != store.records[last]
    assert_same_catalogue(opened, refilled)


def test_a_record_that_rots_behind_the_index_is_found_when_it_is_needed(store: FeatureStore) -> None:
    path = Path(store.commit_path(1))
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    opened = FeatureStore.open(store.root)
    result = verify(opened)
    assert list(result.damaged_units) == [1]
    assert str(path) in result.problems[0]


def test_dropping_a_damaged_unit_drops_the_index(store: FeatureStore, fill: Fill) -> None:
    part = Path(store.part_path(store.records[0]))
    next(each for each in (part / "lse" / "c").rglob("0") if each.is_file()).write_bytes(b"")
    opened = FeatureStore.open(store.root)
    result = verify(opened)
    drop_damaged(opened, result)
    assert index_files(store) == []
    assert result.problems == []
    assert 0 not in opened.records
    assert 0 not in opened.catalogue().unit
    again = fill(store.root, 12, tokens_per_part=150)
    assert sorted(again.catalogue().ids.tolist()) == sorted(store.catalogue().ids.tolist())
    assert verify(FeatureStore.open(store.root)).problems == []


def test_a_store_that_cannot_be_written_to_goes_without(
    tmp_path: Path, fill: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fill(tmp_path / "store", 12, tokens_per_part=150)

    def refuse(self: LocalPlace, key: str, content: bytes) -> bool:
        raise StoreError("permission denied")

    monkeypatch.setattr(LocalPlace, "publish", refuse)
    made.records.save_index(unindexed=1)
    assert len(FeatureStore.open(made.root).catalogue()) == 12
