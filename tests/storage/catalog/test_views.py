"""Views name subsets of a store; masks and categories are theirs, features are shared."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from specx.storage.catalog.sequence_id import sequence_id
from specx.storage.catalog.views import SCHEMA, ViewWriter, files_of_views, load_views, read_view, view_names
from specx.storage.errors import StoreCorruptError, StoreError
from specx.storage.ops.info import summary
from specx.storage.ops.select import Filter, select
from specx.storage.ops.verify import verify
from specx.storage.reader import FeatureReader
from specx.storage.schema import Array, Origin, SequenceFeatures
from specx.storage.store import FeatureStore

Fill = Callable[..., FeatureStore]
Sequence = Callable[[int], SequenceFeatures]


@pytest.fixture
def store(tmp_path: Path, fill: Fill) -> FeatureStore:
    """10 sequences in several parts."""
    return fill(tmp_path / "store", 10, tokens_per_part=200)


@pytest.fixture
def identifier(sequence: Sequence) -> Callable[[int], bytes]:
    return lambda i: sequence_id(sequence(i).input_ids)


def other_mask(sequence: Sequence, i: int) -> Array:
    return 1 - sequence(i).loss_mask


def add(store: FeatureStore, name: str, rows: dict[bytes, Array | None]) -> None:
    with ViewWriter(store.place, name) as writer:
        for row, (identifier, mask) in enumerate(rows.items()):
            writer.add(identifier, mask, Origin(source="other.parquet", row=row, category="other"))


def numbers(reader: FeatureReader, sequence: Sequence) -> list[int]:
    """Which of the made sequences a reader has, in its order."""
    names = {sequence_id(sequence(i).input_ids): i for i in range(10)}
    return [names[bytes(each)] for each in reader.catalogue.ids]


def test_a_reader_of_a_view_has_its_sequences_masks_and_categories(
    store: FeatureStore, sequence: Sequence, identifier: Callable[[int], bytes]
) -> None:
    add(store, "some", {identifier(7): other_mask(sequence, 7), identifier(2): None})
    reader = FeatureReader(store, view=load_views(store.place, ["some"]))
    assert numbers(reader, sequence) == [2, 7], "in the order of the store"
    assert np.array_equal(reader.features(0).loss_mask, sequence(2).loss_mask)
    assert np.array_equal(reader.features(1).loss_mask, other_mask(sequence, 7))
    prefix = np.empty(20, np.uint8)
    reader.read(1, "loss_mask", prefix)
    assert np.array_equal(prefix, other_mask(sequence, 7)[:20])
    assert np.array_equal(reader.features(1).aux_hidden, sequence(7).aux_hidden)
    assert reader.catalogue.category.tolist() == ["other", "other"]
    assert reader.catalogue.row.tolist() == [1, 0]


def test_supervised_tokens_are_those_of_the_view(
    store: FeatureStore, sequence: Sequence, identifier: Callable[[int], bytes]
) -> None:
    add(store, "some", {identifier(i): other_mask(sequence, i) if i % 2 else None for i in (1, 2, 5, 8)})
    reader = FeatureReader(store, view=load_views(store.place, ["some"]))
    found = np.concatenate(list(reader.supervised_tokens(np.arange(4))))
    masks = {i: other_mask(sequence, i) if i % 2 else sequence(i).loss_mask for i in (1, 2, 5, 8)}
    expected = np.concatenate([sequence(i).input_ids[masks[i] == 1] for i in (1, 2, 5, 8)])
    assert np.array_equal(np.sort(found), np.sort(expected))
    assert [len(each) for each in reader.supervised_tokens(np.zeros(0, np.int64))] == []


def test_a_view_grows_and_holds_each_sequence_once(
    store: FeatureStore, sequence: Sequence, identifier: Callable[[int], bytes]
) -> None:
    add(store, "some", {identifier(1): None})
    add(store, "some", {identifier(1): other_mask(sequence, 1), identifier(3): None})
    assert len(files_of_views(store.place, ["some"])) == 2
    view = load_views(store.place, ["some"])
    assert len(view) == 2
    assert view.loss_mask(0 if bytes(view.ids[0]) == identifier(1) else 1) is None


def test_views_together_have_what_either_has(
    store: FeatureStore, sequence: Sequence, identifier: Callable[[int], bytes]
) -> None:
    add(store, "a", {identifier(1): None, identifier(4): other_mask(sequence, 4)})
    add(store, "b", {identifier(4): None, identifier(9): None})
    reader = FeatureReader(store, view=load_views(store.place, ["a", "b"]))
    assert numbers(reader, sequence) == [1, 4, 9]
    assert np.array_equal(reader.features(1).loss_mask, other_mask(sequence, 4)), "as the first has it"
    assert view_names(store.place) == ["a", "b"]


def test_sequences_that_the_store_lacks_are_left_out_and_counted(
    store: FeatureStore, sequence: Sequence, identifier: Callable[[int], bytes]
) -> None:
    add(store, "some", {identifier(1): None, b"\0" * 16: None})
    assert numbers(FeatureReader(store, view=load_views(store.place, ["some"])), sequence) == [1]
    told = summary(store)["views"]
    assert told == {"some": {"sequences": 1, "tokens": len(sequence(1).input_ids), "missing": 1}}


def test_files_frozen_by_a_run_do_not_grow(
    store: FeatureStore, sequence: Sequence, identifier: Callable[[int], bytes]
) -> None:
    add(store, "some", {identifier(1): None})
    files = files_of_views(store.place, ["some"])
    add(store, "some", {identifier(2): None})
    assert len(read_view(store.place, files)) == 1


def test_a_parquet_file_of_one_s_own_is_a_view(
    store: FeatureStore, sequence: Sequence, identifier: Callable[[int], bytes], tmp_path: Path
) -> None:
    mask = other_mask(sequence, 6)
    path = tmp_path / "masks.parquet"
    pq.write_table(pa.table({"id": pa.array([identifier(6)], pa.binary()), "loss_mask": [mask.tolist()]}), path)
    reader = FeatureReader(store, view=load_views(store.place, [str(path)]))
    assert numbers(reader, sequence) == [6]
    assert np.array_equal(reader.features(0).loss_mask, mask)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"loss_mask": [[1]]}, "not a view"),
        ({"id": [b"short"], "loss_mask": [[1]]}, "not a view"),
        ({"id": [b"0" * 16], "loss_mask": [[2]]}, "entries other than 0 and 1"),
        ({"id": [b"0" * 16], "loss_mask": ["text"]}, "not a view"),
    ],
)
def test_a_file_that_is_no_view_is_refused(
    store: FeatureStore, tmp_path: Path, columns: dict[str, list[object]], message: str
) -> None:
    path = tmp_path / "masks.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(StoreError, match=message) as error:
        load_views(store.place, [str(path)])
    assert str(error.value).startswith(f"{path}: ")
    path.write_bytes(b"no Parquet")
    with pytest.raises(StoreError, match="not a view"):
        load_views(store.place, [str(path)])
    path.unlink()
    with pytest.raises(StoreError, match="no such view"):
        load_views(store.place, [str(path)])


def test_a_mask_of_another_length_is_named(store: FeatureStore, identifier: Callable[[int], bytes]) -> None:
    add(store, "some", {identifier(1): np.ones(3, np.uint8)})
    reader = FeatureReader(store, view=load_views(store.place, ["some"]))
    with pytest.raises(StoreError, match=f"mask of 3 entries for sequence {identifier(1).hex()} of 67 tokens"):
        reader.features(0)


@pytest.mark.parametrize("name", ["", "../out", "a/b", ".hidden", "-x", "a b"])
def test_a_name_that_cannot_be_one_is_refused(store: FeatureStore, name: str) -> None:
    with pytest.raises(StoreError, match="not the name of a view"):
        ViewWriter(store.place, name)


def test_a_view_that_is_not_there_is_named_with_those_that_are(
    store: FeatureStore, identifier: Callable[[int], bytes]
) -> None:
    add(store, "some", {identifier(1): None})
    with pytest.raises(StoreError, match="no view other, there are: some"):
        load_views(store.place, ["other"])


def test_a_changed_file_of_a_view_is_found_by_reading_and_by_verify(
    store: FeatureStore, identifier: Callable[[int], bytes]
) -> None:
    add(store, "some", {identifier(1): None})
    (path,) = (Path(store.root) / file for file in files_of_views(store.place, ["some"]))
    content = path.read_bytes()
    for position in range(0, len(content), 97):
        flipped = bytearray(content)
        flipped[position] ^= 4
        path.write_bytes(flipped)
        with pytest.raises(StoreCorruptError, match="changed since it was written"):
            load_views(store.place, ["some"])
        assert len(verify(store).problems) == 1


def test_masks_come_back_whatever_their_length(store: FeatureStore) -> None:
    random = np.random.default_rng(0)
    masks = {random.bytes(16): random.integers(0, 2, length, np.uint8) for length in range(1, 60)}
    add(store, "some", dict(masks))
    view = load_views(store.place, ["some"])
    assert len(view) == 59
    for i in range(59):
        found = view.loss_mask(i)
        assert found is not None
        assert np.array_equal(found, masks[bytes(view.ids[i])])
    assert SCHEMA.names == pq.read_schema(Path(store.root) / files_of_views(store.place, ["some"])[0]).names


def test_select_makes_a_view_of_what_passes(store: FeatureStore, sequence: Sequence) -> None:
    lengths = {i: len(sequence(i).input_ids) for i in range(10)}
    made = select(store, "long", Filter(min_length=60, max_length=120))
    wanted = sorted(i for i, length in lengths.items() if 60 <= length <= 120)
    assert (made.view, made.sequences, made.tokens) == ("long", len(wanted), sum(lengths[i] for i in wanted))
    assert numbers(FeatureReader(store, view=load_views(store.place, ["long"])), sequence) == wanted
    assert select(store, "chat", Filter(categories=("chat",))).sequences == sum(i % 3 != 0 for i in range(10))
    assert select(store, "first", Filter(source=r"^first\.")).sequences == 5
    assert select(store, "two", Filter(limit=2)).sequences == 2


def test_select_from_views_keeps_their_masks(
    store: FeatureStore, sequence: Sequence, identifier: Callable[[int], bytes]
) -> None:
    add(store, "some", {identifier(i): other_mask(sequence, i) for i in range(5)})
    select(store, "fewer", Filter(categories=("other",), max_length=100), views=("some",))
    reader = FeatureReader(store, view=load_views(store.place, ["fewer"]))
    assert numbers(reader, sequence) == [i for i in range(5) if len(sequence(i).input_ids) <= 100]
    for number, i in enumerate(numbers(reader, sequence)):
        assert np.array_equal(reader.features(number).loss_mask, other_mask(sequence, i))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Filter(min_length=10_000), "no sequence passes"),
        (Filter(categories=("nothing",)), "no sequence passes"),
        (Filter(source="("), "not a regular expression"),
    ],
)
def test_a_filter_that_leaves_nothing_makes_no_view(store: FeatureStore, wanted: Filter, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        select(store, "none", wanted)
    assert view_names(store.place) == []


def test_a_view_is_not_made_twice(store: FeatureStore) -> None:
    select(store, "some", Filter(limit=2))
    with pytest.raises(StoreError, match="there is a view some already"):
        select(store, "some", Filter(limit=3))
