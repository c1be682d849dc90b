"""Records: their canonical bytes, their checksum, and what is refused of text from outside."""

import json
from typing import Any

import numpy as np
import pytest
from crc32c import crc32c

from specx.storage.errors import StoreCorruptError, StoreError, StoreMismatchError
from specx.storage.schema import (
    FORMAT_VERSION,
    CommitRecord,
    DatasetInfo,
    Reject,
    SequenceColumns,
    SequenceFeatures,
    array_specs,
    parse_record,
)

PATH = "commits/u000003.json"


@pytest.fixture
def record() -> CommitRecord:
    return CommitRecord(
        unit=3,
        part="u000003-made-up.zarr",
        sequences=SequenceColumns(
            ids=("00" * 16, "ff" * 16), lengths=(5, 7), categories=("", "chat"), sources=("a", "a"), rows=(0, 2)
        ),
        rejected=(Reject(source="a", row=1, reason="too_long", detail="9000 tokens"),),
        objects=(),
        writer="specx 0.0.0 host:1",
        time="2020-01-01T00:00:00+00:00",
    ).sealed()


def changed(record: CommitRecord, **changes: Any) -> bytes:
    """The bytes of a record with some keys set anew, its checksum left as it was."""
    return json.dumps(json.loads(record.to_bytes()) | changes).encode()


def test_a_record_is_read_as_it_was_written(record: CommitRecord) -> None:
    assert CommitRecord.from_bytes(record.to_bytes(), PATH) == record


def test_the_checksum_is_that_of_sorted_compact_json_with_zero_in_its_place(record: CommitRecord) -> None:
    tree = json.loads(record.to_bytes())
    assert record.to_bytes() == json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()
    tree["crc32c"] = 0
    content = json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()
    assert crc32c(content) == record.crc32c


def test_a_record_with_any_byte_flipped_is_refused(record: CommitRecord) -> None:
    content = record.to_bytes()
    flips = np.random.default_rng(0).integers(1, 256, len(content))
    for position, flip in enumerate(flips.tolist()):
        damaged = bytearray(content)
        damaged[position] ^= flip
        with pytest.raises(StoreError, match=r"u000003\.json"):
            CommitRecord.from_bytes(bytes(damaged), PATH)


def test_a_record_cut_short_anywhere_is_refused(record: CommitRecord) -> None:
    content = record.to_bytes()
    for length in range(len(content)):
        with pytest.raises(StoreCorruptError, match=r"u000003\.json"):
            CommitRecord.from_bytes(content[:length], PATH)


def test_a_record_of_another_unit_number_is_told_by_its_checksum(record: CommitRecord) -> None:
    with pytest.raises(StoreCorruptError, match="changed or damaged; `specx store verify`"):
        CommitRecord.from_bytes(changed(record, unit=4), PATH)


def test_a_newer_format_is_refused_before_its_unknown_keys(record: CommitRecord) -> None:
    content = changed(record, format=FORMAT_VERSION + 1, novelty=True)
    with pytest.raises(StoreError, match=rf"format {FORMAT_VERSION + 1} is newer than {FORMAT_VERSION}.*Upgrade specx"):
        CommitRecord.from_bytes(content, PATH)


def test_a_newer_data_set_is_refused(info: DatasetInfo) -> None:
    content = json.dumps(info.model_dump() | {"format": FORMAT_VERSION + 1, "novelty": 1}).encode()
    with pytest.raises(StoreError, match="Upgrade specx"):
        parse_record(DatasetInfo, content, "dataset.json")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"novelty": 1}, "novelty"),
        ({"unit": "three"}, "unit"),
        ({"objects": [{"key": "zarr.json"}]}, r"objects\.0"),
        ({"part": None}, "part"),
    ],
)
def test_an_unknown_key_or_a_wrong_type_is_refused_by_name(
    record: CommitRecord, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(StoreCorruptError, match=field):
        CommitRecord.from_bytes(changed(record, **changes), PATH)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"3", b"{}", b'{"format": "1"}', b"\xff\xfe"])
def test_what_is_no_record_is_refused(content: bytes) -> None:
    with pytest.raises(StoreCorruptError, match="not a record of a feature store"):
        CommitRecord.from_bytes(content, PATH)


def test_columns_of_different_lengths_are_refused(record: CommitRecord) -> None:
    columns = record.sequences.model_copy(update={"lengths": (5,)})
    uneven = record.model_copy(update={"sequences": columns}).sealed()
    with pytest.raises(StoreCorruptError, match="columns of sequences have different lengths"):
        CommitRecord.from_bytes(uneven.to_bytes(), PATH)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"compute_dtype": "float32"}, "compute_dtype is bfloat16 in the store, float32 in this run"),
        ({"boundaries": (1, 2, 3)}, r"boundaries is \[1, 2, 4\] in the store, \[1, 2, 3\] in this run"),
        ({"hidden_size": 32}, "hidden_size is 16 in the store, 32 in this run"),
        ({"vocab_size": 65}, "vocab_size is 64"),
        ({"top_k": 8}, "top_k is 4"),
        ({"codec": "none"}, "codec is lossless"),
    ],
)
def test_every_other_setting_is_named(info: DatasetInfo, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(StoreMismatchError, match=said):
        info.require_same(info.model_copy(update=changes), "store")


def test_another_target_is_named_with_all_that_differs(info: DatasetInfo) -> None:
    target = info.target.model_copy(update={"architecture": "Other", "weights_hash": "c" * 64})
    with pytest.raises(StoreMismatchError, match=r"target\.architecture is .*; target\.weights_hash is bbb"):
        info.require_same(info.model_copy(update={"target": target}), "store")


def test_the_same_settings_are_accepted(info: DatasetInfo) -> None:
    info.require_same(info.model_copy(), "store")


def test_a_part_has_exactly_the_arrays_of_a_sequence(info: DatasetInfo) -> None:
    assert set(array_specs(info)) == set(SequenceFeatures.__slots__)


def test_every_shard_is_whole_chunks(info: DatasetInfo) -> None:
    for spec in array_specs(info).values():
        assert spec.shard_tokens % spec.chunk[0] == 0, spec.name
        for size, chunk in zip(spec.inner_shape, spec.chunk[1:], strict=True):
            assert size % chunk == 0, spec.name
