"""Making, opening and refusing stores."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from specx.storage.catalog.sequence_id import sequence_id
from specx.storage.errors import StoreCorruptError, StoreError, StoreMismatchError
from specx.storage.schema import FORMAT_VERSION, CommitRecord, DatasetInfo, Origin, SequenceFeatures
from specx.storage.store import FeatureStore

Fill = Callable[..., FeatureStore]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, fill: Fill) -> Path:
    """A store of 7 sequences in 3 parts."""
    return Path(fill(tmp_path_factory.mktemp("filled") / "store", 7, tokens_per_part=200).root)


@pytest.fixture
def store(tmp_path: Path, filled: Path) -> FeatureStore:
    """A copy of ``filled``, to be damaged."""
    return FeatureStore.open(shutil.copytree(filled, tmp_path / "store"))


def replace_record(store: FeatureStore, unit: int, record: CommitRecord) -> None:
    Path(store.commit_path(unit)).write_bytes(record.sealed().to_bytes())


def test_an_opened_store_is_the_one_that_was_made(tmp_path: Path, info: DatasetInfo) -> None:
    made = FeatureStore.create(tmp_path / "store", info)
    opened = FeatureStore.open(str(tmp_path / "store"))
    assert opened.info == made.info == info
    assert opened.records == {}
    assert len(opened.catalogue()) == 0


def test_the_catalogue_lists_every_sequence_in_the_order_of_commit(
    store: FeatureStore, sequence: Callable[[int], SequenceFeatures], origin: Callable[[int], Origin]
) -> None:
    catalogue = FeatureStore.open(store.root).catalogue()
    features = [sequence(i) for i in range(7)]
    assert [bytes(row) for row in catalogue.ids] == [sequence_id(one.input_ids) for one in features]
    assert catalogue.length.tolist() == [len(one.input_ids) for one in features]
    origins = [origin(i) for i in range(7)]
    assert list(zip(catalogue.source, catalogue.row, catalogue.category, strict=True)) == [
        (one.source, one.row, one.category) for one in origins
    ]
    assert catalogue.unit.tolist() == sorted(catalogue.unit.tolist())
    for unit in set(catalogue.unit.tolist()):
        lengths = catalogue.length[catalogue.unit == unit]
        assert catalogue.offset[catalogue.unit == unit].tolist() == (np.cumsum(lengths) - lengths).tolist()


def test_refresh_shows_what_others_committed_since(tmp_path: Path, fill: Fill) -> None:
    fill(tmp_path / "store", 2, tokens_per_part=50)
    reader = FeatureStore.open(tmp_path / "store")
    before = dict(reader.records)
    fill(tmp_path / "store", 4, tokens_per_part=50)
    assert reader.records == before
    reader.refresh()
    assert len(reader.records) > len(before)
    assert reader.records == FeatureStore.open(tmp_path / "store").records


def test_a_directory_that_is_no_store_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(StoreError, match=r"no feature store here.*specx extract --store"):
            FeatureStore.open(path)


def test_a_directory_with_other_things_is_not_made_a_store(tmp_path: Path, info: DatasetInfo) -> None:
    (tmp_path / "thesis.txt").write_text("text")
    with pytest.raises(StoreError, match=r"not empty and not a feature store\. Choose another"):
        FeatureStore.create(tmp_path, info)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_is_not_made_a_store(tmp_path: Path, info: DatasetInfo) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(StoreError, match="Choose another"):
        FeatureStore.create(tmp_path / "file", info)


def test_an_empty_directory_becomes_a_store(tmp_path: Path, info: DatasetInfo) -> None:
    assert FeatureStore.create(tmp_path, info).root == str(tmp_path)


def test_a_store_whose_making_was_killed_is_made_again(tmp_path: Path, info: DatasetInfo) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".tmp-1-dataset.json").write_text("{")
    assert FeatureStore.create(tmp_path / "store", info).info == info


@pytest.mark.parametrize("url", ["file:///data/store", "gs://bucket/store"])
def test_a_url_of_another_kind_is_refused(info: DatasetInfo, url: str) -> None:
    with pytest.raises(StoreError, match=r"neither a path nor s3://BUCKET/PREFIX"):
        FeatureStore.open(url)
    with pytest.raises(StoreError, match=r"neither a path nor s3://BUCKET/PREFIX"):
        FeatureStore.create(url, info)


def test_a_store_of_another_target_is_refused_and_left_as_it_is(tmp_path: Path, info: DatasetInfo) -> None:
    FeatureStore.create(tmp_path / "store", info)
    before = (tmp_path / "store" / "dataset.json").read_bytes()
    other = info.model_copy(update={"target": info.target.model_copy(update={"weights_hash": "c" * 64})})
    with pytest.raises(StoreMismatchError, match=r"target\.weights_hash is b+ in the store, c+ in this run"):
        FeatureStore.create(tmp_path / "store", other)
    assert (tmp_path / "store" / "dataset.json").read_bytes() == before


def test_a_store_with_another_codec_is_refused(tmp_path: Path, info: DatasetInfo) -> None:
    FeatureStore.create(tmp_path / "store", info)
    with pytest.raises(StoreMismatchError, match="codec is lossless in the store, none in this run"):
        FeatureStore.create(tmp_path / "store", info.model_copy(update={"codec": "none"}))


def test_a_store_of_a_newer_format_is_refused(tmp_path: Path, info: DatasetInfo) -> None:
    FeatureStore.create(tmp_path / "store", info)
    newer = info.model_dump(mode="json") | {"format": FORMAT_VERSION + 1, "novelty": 1}
    (tmp_path / "store" / "dataset.json").write_text(json.dumps(newer))
    with pytest.raises(StoreError, match=rf"dataset\.json: format {FORMAT_VERSION + 1} is newer.*Upgrade specx"):
        FeatureStore.open(tmp_path / "store")


def test_a_commit_of_a_newer_format_is_refused(store: FeatureStore) -> None:
    newer = store.records[1].model_copy(update={"format": FORMAT_VERSION + 1})
    replace_record(store, 1, newer)
    with pytest.raises(StoreError, match=r"u000001\.json: format .* is newer.*Upgrade specx"):
        FeatureStore.open(store.root)


def test_a_truncated_data_set_file_is_refused(store: FeatureStore) -> None:
    path = Path(store.root) / "dataset.json"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StoreCorruptError, match=r"dataset\.json: not a record"):
        FeatureStore.open(store.root)


def test_a_truncated_commit_record_is_refused(store: FeatureStore) -> None:
    path = Path(store.commit_path(1))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(StoreCorruptError, match=r"u000001\.json: not a record.*extracted again"):
        FeatureStore.open(store.root)


def test_a_commit_record_with_a_changed_digit_is_refused(store: FeatureStore) -> None:
    path = Path(store.commit_path(1))
    content = path.read_bytes()
    at = content.index(b'"size":') + len(b'"size":')
    digit = b"1" if content[at : at + 1] != b"1" else b"2"
    path.write_bytes(content[:at] + digit + content[at + 1 :])
    with pytest.raises(StoreCorruptError, match=r"u000001\.json: the record's checksum is"):
        FeatureStore.open(store.root)


def test_a_record_under_the_name_of_another_unit_is_refused(store: FeatureStore) -> None:
    Path(store.commit_path(1)).rename(store.commit_path(9))
    with pytest.raises(StoreCorruptError, match=r"u000009\.json: the record says it is of unit 1"):
        FeatureStore.open(store.root)


@pytest.mark.parametrize("part", ["../outside", "/outside", "../../outside", ""])
def test_a_part_outside_the_store_is_refused(store: FeatureStore, part: str) -> None:
    replace_record(store, 0, store.records[0].model_copy(update={"part": part}))
    opened = FeatureStore.open(store.root)
    with pytest.raises(StoreCorruptError, match="expected one inside the store"):
        opened.part_path(opened.records[0])


def test_a_unit_that_is_gone_is_named(store: FeatureStore) -> None:
    Path(store.commit_path(1)).unlink()
    opened = FeatureStore.open(store.root)
    assert sorted(opened.records) == [0, 2]
    with pytest.raises(StoreError, match=r"u000001\.json: missing"):
        opened.require(1)


def test_unfinished_and_foreign_files_among_the_commits_are_no_commits(store: FeatureStore) -> None:
    for name in (".tmp-0123-u000003.json", "notes.txt", "unfinished.json"):
        (Path(store.root) / "commits" / name).write_text("{")
    assert FeatureStore.open(store.root).records == store.records
