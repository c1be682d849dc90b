"""Stores put together and made smaller: every sequence once, every bit as it was."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from specx.storage.catalog.rejects import RejectLog, read_rejects
from specx.storage.catalog.sequence_id import sequence_id
from specx.storage.catalog.views import ViewWriter, load_views, view_names
from specx.storage.errors import StoreCorruptError, StoreError, StoreMismatchError
from specx.storage.ops.merge import merge
from specx.storage.ops.prune import prune, pruned_info
from specx.storage.ops.verify import verify
from specx.storage.reader import FeatureReader
from specx.storage.schema import DatasetInfo, Origin, Reject, SequenceFeatures
from specx.storage.store import FeatureStore
from specx.storage.writer import FeatureWriter

Sequence = Callable[[int], SequenceFeatures]
AssertSame = Callable[[SequenceFeatures, SequenceFeatures], None]
Make = Callable[..., FeatureStore]


@pytest.fixture
def make(tmp_path: Path, info: DatasetInfo, sequence: Sequence, origin: Callable[[int], Origin]) -> Make:
    """Make a store of some of the made sequences, with a head, a view of them and a reject."""

    def made(name: str, numbers: range, tokens_per_part: int = 300, **settings: object) -> FeatureStore:
        store = FeatureStore.create(tmp_path / name, info.model_copy(update=settings))
        with store.new_target() as directory:
            (directory / "config.json").write_text("{}")
        with FeatureWriter(store, tokens_per_part=tokens_per_part) as writer, ViewWriter(store.place, name) as view:
            for i in numbers:
                writer.add(sequence(i), origin(i))
                view.add(sequence_id(sequence(i).input_ids), None, origin(i))
        with RejectLog(store.place) as rejects:
            rejects.add(Reject(source=name, row=1, reason="empty", detail=""))
        return store

    return made


def assert_holds(store: FeatureStore, numbers: range, sequence: Sequence, assert_same: AssertSame) -> None:
    """Every one of the made sequences once, whole, and nothing else."""
    opened = FeatureStore.open(store.root)
    reader = FeatureReader(opened)
    expected = {sequence_id(sequence(i).input_ids): i for i in numbers}
    found = [bytes(each) for each in reader.catalogue.ids]
    assert sorted(found) == sorted(expected)
    for position, identifier in enumerate(found):
        assert_same(reader.features(position), sequence(expected[identifier]))
        assert reader.catalogue.row[position] == expected[identifier]
    assert verify(opened).problems == []


def into(tmp_path: Path, info: DatasetInfo) -> FeatureStore:
    return FeatureStore.create(tmp_path / "merged", info)


@pytest.mark.parametrize("link", [False, True])
def test_stores_apart_are_merged_part_by_part(
    tmp_path: Path, make: Make, sequence: Sequence, assert_same: AssertSame, link: bool
) -> None:
    one, other = make("one", range(6)), make("other", range(6, 12))
    merged = into(tmp_path, one.info)
    told = merge([one, other], merged, link=link, tokens_per_part=300)
    assert (told.sequences, told.reused, told.whole_parts) == (12, 0, len(one.records) + len(other.records))
    assert_holds(merged, range(12), sequence, assert_same)
    shard = next((Path(one.part_path(one.records[0])) / "lse" / "c").iterdir())
    assert shard.stat().st_nlink == (2 if link else 1)
    assert merged.has_target
    assert view_names(merged.place) == ["one", "other"]
    assert len(load_views(merged.place, ["other"])) == 6
    assert {reject.source for reject in read_rejects(merged.place)} == {"one", "other"}


def test_what_stores_share_is_there_once(
    tmp_path: Path, make: Make, sequence: Sequence, assert_same: AssertSame
) -> None:
    one, other = make("one", range(8)), make("other", range(4, 12), tokens_per_part=250)
    merged = into(tmp_path, one.info)
    told = merge([one, other], merged, link=False, tokens_per_part=300)
    assert (told.sequences, told.reused) == (12, 4)
    assert_holds(merged, range(12), sequence, assert_same)


def test_merging_again_adds_what_is_new(
    tmp_path: Path, make: Make, sequence: Sequence, assert_same: AssertSame
) -> None:
    one = make("one", range(5))
    merged = into(tmp_path, one.info)
    merge([one], merged, link=True, tokens_per_part=300)
    assert merge([one], merged, link=True, tokens_per_part=300).sequences == 0
    make("one", range(9))
    assert merge([FeatureStore.open(one.root)], merged, link=True, tokens_per_part=300).sequences == 4
    assert_holds(merged, range(9), sequence, assert_same)


def test_linked_files_outlive_the_store_they_came_from(
    tmp_path: Path, make: Make, sequence: Sequence, assert_same: AssertSame
) -> None:
    one = make("one", range(5))
    merged = into(tmp_path, one.info)
    merge([one], merged, link=True, tokens_per_part=300)
    shutil.rmtree(one.root)
    assert_holds(merged, range(5), sequence, assert_same)


def test_a_store_of_other_settings_or_the_same_store_is_refused(tmp_path: Path, make: Make) -> None:
    one = make("one", range(3))
    with pytest.raises(StoreMismatchError, match="codec is lossless in the store, none in this run"):
        merge([make("none", range(3), codec="none")], one, link=False, tokens_per_part=300)
    with pytest.raises(StoreError, match="cannot be merged into itself"):
        merge([one], one, link=False, tokens_per_part=300)


def test_files_that_cannot_be_linked_are_one_line_and_leave_nothing(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make("one", range(3))
    merged = into(tmp_path, one.info)
    link = os.link

    def refuse(source: Path, name: Path, **options: bool) -> None:
        if "parts" in str(name):
            raise OSError(18, "Invalid cross-device link")
        link(source, name, **options)

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StoreError, match=r"cannot be linked \(Invalid cross-device link\). Merge without --link"):
        merge([one], merged, link=True, tokens_per_part=300)
    assert len(FeatureStore.open(merged.root).records) == 0
    assert merged.place.names("parts") == []


def test_a_damaged_part_is_not_taken(tmp_path: Path, make: Make) -> None:
    one = make("one", range(3))
    shard = next((Path(one.part_path(one.records[0])) / "lse" / "c").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(StoreCorruptError, match="the commit record says"):
        merge([one], into(tmp_path, one.info), link=False, tokens_per_part=300)


def finite(features: SequenceFeatures) -> SequenceFeatures:
    """Without the exponent that stands for NaN and infinity."""
    assert features.last_hidden is not None
    return replace(
        features,
        aux_hidden=features.aux_hidden & np.uint16(0xBFFF),
        last_hidden=features.last_hidden & np.uint16(0xBFFF),
    )


def test_a_pruned_store_has_what_was_kept_and_all_else_as_it_was(
    tmp_path: Path, make: Make, sequence: Sequence
) -> None:
    store = make("one", range(8))
    info = pruned_info(store.info, boundaries=(1, 4), codec="none", last_hidden=False)
    smaller = FeatureStore.create(tmp_path / "smaller", info)
    told = prune(store, smaller, tokens_per_part=300)
    assert told.sequences == 8
    reader, before = FeatureReader(FeatureStore.open(smaller.root)), FeatureReader(store)
    for i in range(8):
        found, expected = reader.features(i), before.features(i)
        assert found.last_hidden is None
        assert np.array_equal(found.aux_hidden, expected.aux_hidden[:, [0, 2]])
        assert np.array_equal(found.topk_logprob.view(np.uint16), expected.topk_logprob.view(np.uint16))
        assert np.array_equal(found.input_ids, expected.input_ids)
    assert view_names(smaller.place) == ["one"]
    assert smaller.has_target
    assert verify(FeatureStore.open(smaller.root)).problems == []
    assert prune(store, smaller, tokens_per_part=300).sequences == 0, "a rerun has nothing to do"


def test_a_store_is_quantised_by_pruning(
    tmp_path: Path, info: DatasetInfo, sequence: Sequence, origin: Callable[[int], Origin]
) -> None:
    store = FeatureStore.create(tmp_path / "store", info)
    with FeatureWriter(store, tokens_per_part=300) as writer:
        for i in range(4):
            writer.add(finite(sequence(i)), origin(i))
    info8 = pruned_info(info, boundaries=None, codec="int8", last_hidden=None)
    smaller = FeatureStore.create(tmp_path / "smaller", info8)
    prune(store, smaller, tokens_per_part=300)
    assert FeatureReader(smaller).features(2).aux_hidden.shape == sequence(2).aux_hidden.shape
    assert all(record.quantization_error for record in smaller.records.values())


@pytest.mark.parametrize(
    ("have", "want", "message"),
    [
        ({}, {"boundaries": (1, 3)}, r"boundaries \[3\] are not in the store"),
        ({"last_hidden": False}, {"last_hidden": True}, "no last hidden states to keep"),
        ({"codec": "int8"}, {"codec": "lossless"}, "another codec cannot bring back"),
    ],
)
def test_what_a_store_cannot_give_is_refused(
    info: DatasetInfo, have: dict[str, object], want: dict[str, object], message: str
) -> None:
    wanted = {"boundaries": None, "codec": None, "last_hidden": None} | want
    with pytest.raises(StoreError, match=message):
        pruned_info(info.model_copy(update=have), **wanted)  # type: ignore[arg-type]
