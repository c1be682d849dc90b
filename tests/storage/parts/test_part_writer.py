"""What a part is on disk, as any Zarr library sees it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from specx.storage.catalog.sequence_id import sequence_id
from specx.storage.parts.part_writer import PartWriter
from specx.storage.schema import FORMAT_VERSION, DatasetInfo, SequenceFeatures, StoredObject, array_specs

MakeFeatures = Callable[[int, int], SequenceFeatures]

CODECS = ["lossless", "zstd", "none"]
# The second crosses a chunk of 256 tokens, the third the shard of 4096 and the chunk of 1024.
LENGTHS = (1, 300, 4200, 5)


def write(path: Path, info: DatasetInfo, sequences: list[SequenceFeatures]) -> tuple[StoredObject, ...]:
    part = PartWriter(path, info)
    for features in sequences:
        part.append(features)
    return part.close([sequence_id(features.input_ids) for features in sequences])


@pytest.fixture(scope="module")
def sequences(make_features: MakeFeatures) -> list[SequenceFeatures]:
    return [make_features(length, length) for length in LENGTHS]


@pytest.mark.parametrize("codec", CODECS)
def test_plain_zarr_reads_what_was_appended(
    tmp_path: Path, info: DatasetInfo, sequences: list[SequenceFeatures], codec: str
) -> None:
    write(tmp_path / "part", info.model_copy(update={"codec": codec}), sequences)
    group = zarr.open_group(tmp_path / "part", mode="r")
    for name in array_specs(info):
        expected = np.concatenate([features.arrays()[name] for features in sequences])
        found = np.asarray(group[name])
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), name
        assert found.tobytes() == expected.tobytes(), name


def test_the_sequence_table_says_where_each_sequence_starts_and_what_it_is(
    tmp_path: Path, info: DatasetInfo, sequences: list[SequenceFeatures]
) -> None:
    write(tmp_path / "part", info, sequences)
    group = zarr.open_group(tmp_path / "part", mode="r")
    offsets, names = np.asarray(group["seq_offsets"]), np.asarray(group["seq_ids"])
    assert offsets.dtype == np.int64
    assert offsets.tolist() == [0, 1, 301, 4501, 4506]
    assert names.dtype == np.uint8
    assert [bytes(row) for row in names] == [sequence_id(features.input_ids) for features in sequences]


@pytest.mark.parametrize("codec", CODECS)
def test_every_chunk_ends_in_its_checksum(
    tmp_path: Path, info: DatasetInfo, sequences: list[SequenceFeatures], codec: str
) -> None:
    write(tmp_path / "part", info.model_copy(update={"codec": codec}), sequences[:2])
    arrays = dict(zarr.open_group(tmp_path / "part", mode="r").arrays())
    assert set(arrays) == {*array_specs(info), "seq_offsets", "seq_ids"}
    for name, array in arrays.items():
        kinds = [type(one) for one in array.compressors]
        is_plain = codec == "none" and name not in ("seq_offsets", "seq_ids")
        is_pfor = codec == "lossless" and name in ("aux_hidden", "last_hidden")
        assert kinds == ([Crc32cCodec] if is_plain or is_pfor else [BloscCodec, Crc32cCodec]), name


def test_the_attributes_tell_a_plain_reader_the_format_and_the_bfloat16_arrays(
    tmp_path: Path, info: DatasetInfo, sequences: list[SequenceFeatures]
) -> None:
    write(tmp_path / "part", info, sequences[:1])
    group = zarr.open_group(tmp_path / "part", mode="r")
    assert group.attrs.asdict() == {"specx": {"format": FORMAT_VERSION}}
    attributes = {name: array.attrs.asdict() for name, array in group.arrays()}
    assert attributes.pop("aux_hidden") == {"dtype": "bfloat16"}
    assert attributes.pop("last_hidden") == {"dtype": "bfloat16", "normed": True}
    assert not any(attributes.values())


def test_chunks_and_shards_are_those_of_the_schema(
    tmp_path: Path, info: DatasetInfo, sequences: list[SequenceFeatures]
) -> None:
    write(tmp_path / "part", info, sequences[:2])
    group = zarr.open_group(tmp_path / "part", mode="r")
    for name, spec in array_specs(info).items():
        array: Any = group[name]
        assert array.chunks == spec.chunk, name
        assert array.shards == (spec.shard_tokens, *spec.inner_shape), name


def test_closing_lists_every_file_with_its_size(
    tmp_path: Path, info: DatasetInfo, sequences: list[SequenceFeatures]
) -> None:
    objects = write(tmp_path / "part", info, sequences)
    files = {path for path in (tmp_path / "part").rglob("*") if path.is_file()}
    assert {tmp_path / "part" / stored.key: stored.size for stored in objects} == {
        path: path.stat().st_size for path in files
    }
    assert len(objects) == len(files)
    # Two shards of the hidden states, as the part is longer than one.
    assert {"aux_hidden/c/0/0/0", "aux_hidden/c/1/0/0", "last_hidden/c/1/0", "lse/c/0"} <= {
        stored.key for stored in objects
    }


def test_a_part_is_the_same_however_its_tokens_are_cut(
    tmp_path: Path, info: DatasetInfo, make_features: MakeFeatures
) -> None:
    whole = make_features(5000, 7)
    pieces = [
        SequenceFeatures(**{name: rows[start:stop] for name, rows in whole.arrays().items()})
        for start, stop in ((0, 4095), (4095, 4097), (4097, 5000))
    ]
    write(tmp_path / "whole", info, [whole])
    write(tmp_path / "pieces", info, pieces)
    for name in array_specs(info):
        shards = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole" / name / "c").rglob("*")]
        assert shards
        for shard in shards:
            if (tmp_path / "whole" / shard).is_file():
                assert (tmp_path / "whole" / shard).read_bytes() == (tmp_path / "pieces" / shard).read_bytes(), shard


@pytest.mark.parametrize("name", list(SequenceFeatures.__slots__))
def test_an_array_of_wrong_length_shape_or_dtype_is_refused_by_name(
    tmp_path: Path, info: DatasetInfo, make_features: MakeFeatures, name: str
) -> None:
    features = make_features(10, 0)
    rows = features.arrays()[name]
    wrong = [rows.astype(np.float64), rows[..., None]]
    if name != "input_ids":  # which says how long the sequence is
        wrong.append(rows[:9])
    part = PartWriter(tmp_path / "part", info)
    for other in wrong:
        with pytest.raises(ValueError, match=rf"^{name}: .*expected {rows.dtype}"):
            part.append(replace(features, **{name: other}))
