"""Reading rows of shards: the right ones, or none."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from crc32c import crc32c
from zarr.codecs import Crc32cCodec

from specx.storage.codecs.pfor import pack
from specx.storage.codecs.quantization import to_bits
from specx.storage.errors import StoreCorruptError
from specx.storage.parts.part_writer import PartWriter
from specx.storage.parts.shard_reader import ShardedRows
from specx.storage.schema import ArraySpec, DatasetInfo, SequenceFeatures, array_specs

MakeFeatures = Callable[[int, int], SequenceFeatures]

TOKENS = 9000  # more than two shards of 4096


@pytest.fixture(scope="module")
def features(make_features: MakeFeatures) -> SequenceFeatures:
    features = make_features(TOKENS, 1)
    aux_hidden, last_hidden = features.aux_hidden, features.last_hidden
    assert last_hidden is not None
    # Of three rows one stays random bits, one is as a model has them, and of the third's some are all zero.
    random = np.random.default_rng(1)
    for rows in (aux_hidden, last_hidden):
        rows[1::3] = to_bits(random.standard_normal(rows[1::3].shape).astype(np.float32))
        rows[2::6] = 0
    return features


@pytest.fixture(scope="module", params=["lossless", "zstd", "none"])
def part(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    info: DatasetInfo,
    features: SequenceFeatures,
) -> Path:
    path = tmp_path_factory.mktemp("shards") / "part"
    writer = PartWriter(path, info.model_copy(update={"codec": request.param}))
    writer.append(features)
    writer.close([bytes(16)])
    return path


@pytest.fixture
def lse_shard(tmp_path: Path, info: DatasetInfo, make_features: MakeFeatures) -> Path:
    """The only shard of one small array, to be damaged."""
    writer = PartWriter(tmp_path / "part", info)
    writer.append(make_features(1500, 2))
    writer.close([bytes(16)])
    return tmp_path / "part" / "lse" / "c" / "0"


def read_lse(shard: Path, info: DatasetInfo) -> np.ndarray:
    out = np.empty(1500, np.float32)
    ShardedRows(shard.parents[1], array_specs(info)["lse"], 1500).read(0, out)
    return out


def spans() -> list[tuple[int, int]]:
    """Spans at, before and behind the edges of chunks (256, 1024) and shards (4096), and some at random."""
    edges = [(0, 1), (255, 257), (256, 512), (1000, 1030), (4095, 4097), (4096, 8192), (8999, 9000), (0, TOKENS)]
    starts = np.random.default_rng(0).integers(0, TOKENS - 1, 12).tolist()
    return edges + [(start, min(TOKENS, start + 1 + 97 * i)) for i, start in enumerate(starts)] + [(5, 5)]


@pytest.mark.parametrize("name", [name for name in SequenceFeatures.__slots__ if name != "aux_hidden"])
def test_any_span_is_read_bit_for_bit(part: Path, info: DatasetInfo, features: SequenceFeatures, name: str) -> None:
    expected = features.arrays()[name]
    rows = ShardedRows(part / name, array_specs(info)[name], TOKENS)
    for start, stop in spans():
        out = np.empty_like(expected[start:stop])
        rows.read(start, out)
        assert out.tobytes() == expected[start:stop].tobytes(), (start, stop)


@pytest.mark.parametrize("column", [0, 1, 2])
def test_any_span_of_one_boundary_is_read_bit_for_bit(
    part: Path, info: DatasetInfo, features: SequenceFeatures, column: int
) -> None:
    rows = ShardedRows(part / "aux_hidden", array_specs(info)["aux_hidden"], TOKENS)
    for start, stop in spans():
        out = np.empty((stop - start, info.hidden_size), np.uint16)
        rows.read(start, out, column)
        assert np.array_equal(out, features.aux_hidden[start:stop, column]), (start, stop)


def test_a_view_of_a_larger_buffer_is_filled_and_nothing_else(
    part: Path, info: DatasetInfo, features: SequenceFeatures
) -> None:
    buffer = np.full((400, 2 * info.hidden_size), 7, np.uint16)
    rows = ShardedRows(part / "aux_hidden", array_specs(info)["aux_hidden"], TOKENS)
    rows.read(4000, buffer[50:350, info.hidden_size :], 1)
    assert np.array_equal(buffer[50:350, info.hidden_size :], features.aux_hidden[4000:4300, 1])
    buffer[50:350, info.hidden_size :] = 7
    assert (buffer == 7).all()


def test_every_byte_of_a_shard_is_checked(lse_shard: Path, info: DatasetInfo) -> None:
    content = lse_shard.read_bytes()
    rng = np.random.default_rng(3)
    # The last 1028 bytes are the index and its checksum; its entries past the array are never used.
    positions = {*rng.integers(0, len(content), 60).tolist(), 0, len(content) - 1, len(content) - 1028}
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= int(rng.integers(1, 256))
        lse_shard.write_bytes(damaged)
        with pytest.raises(StoreCorruptError, match="does not match its bytes"):
            read_lse(lse_shard, info)
    lse_shard.write_bytes(content)
    assert len(read_lse(lse_shard, info)) == 1500


@pytest.mark.parametrize("codec", ["lossless", "none"])
@pytest.mark.parametrize("at", [0, -1], ids=["first byte", "last byte"])
def test_a_part_of_a_chunk_is_checked_again_each_time(
    tmp_path: Path, info: DatasetInfo, make_features: MakeFeatures, codec: str, at: int
) -> None:
    wide = info.model_copy(update={"hidden_size": 512, "boundaries": (1,), "codec": codec})
    features = make_features(256, 4)
    hidden = to_bits(np.random.default_rng(4).standard_normal((256, 512)).astype(np.float32))
    writer = PartWriter(tmp_path / "part", wide)
    writer.append(dataclasses.replace(features, aux_hidden=hidden[:, None], last_hidden=hidden))
    writer.close([bytes(16)])
    rows = ShardedRows(tmp_path / "part" / "last_hidden", array_specs(wide)["last_hidden"], 256)
    out = np.empty((100, 512), np.uint16)
    rows.read(50, out)
    shard = tmp_path / "part" / "last_hidden" / "c" / "0" / "0"
    damaged = bytearray(shard.read_bytes())
    wanted = (pack(hidden[50:150]) if codec == "lossless" else hidden[50:150]).tobytes()
    flipped = damaged.index(wanted) + at % len(wanted)
    damaged[flipped] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(StoreCorruptError, match="changed since it was read"):
        rows.read(50, out)
    damaged[flipped] ^= 1
    shard.write_bytes(damaged)
    out[:] = 0
    rows.read(50, out)
    assert np.array_equal(out, hidden[50:150])


def test_records_that_are_none_are_damage_though_their_checksum_is_right(
    tmp_path: Path, info: DatasetInfo, make_features: MakeFeatures
) -> None:
    writer = PartWriter(tmp_path / "part", info)
    writer.append(make_features(256, 4))
    writer.close([bytes(16)])
    path = tmp_path / "part" / "last_hidden"
    shard = path / "c" / "0" / "0"
    offset, size = np.frombuffer(shard.read_bytes()[-16 * 16 - 4 : -4], "<u8")[:2].tolist()
    content = bytearray(shard.read_bytes())
    content[offset] = 255
    content[offset + size - 4 : offset + size] = crc32c(bytes(content[offset : offset + size - 4])).to_bytes(
        4, "little"
    )
    shard.write_bytes(content)
    rows = ShardedRows(path, array_specs(info)["last_hidden"], 256)
    with pytest.raises(StoreCorruptError, match=r"chunk \(0,\): row 0 is no record of 16 values\. Run `specx store"):
        rows.read(5, np.empty((3, 16), np.uint16))


def test_a_missing_shard_is_no_zeros(lse_shard: Path, info: DatasetInfo) -> None:
    lse_shard.unlink()
    with pytest.raises(StoreCorruptError, match="the shard is missing"):
        read_lse(lse_shard, info)


@pytest.mark.parametrize("kept", [0, 1, 500, 1028, -1])
def test_a_shard_cut_short_is_refused(lse_shard: Path, info: DatasetInfo, kept: int) -> None:
    lse_shard.write_bytes(lse_shard.read_bytes()[:kept])
    with pytest.raises(StoreCorruptError, match="Run `specx store verify --drop-bad`"):
        read_lse(lse_shard, info)


def test_a_chunk_that_was_never_written_is_no_zeros(tmp_path: Path) -> None:
    array = zarr.create_array(
        tmp_path / "lse", shape=(2048,), dtype="float32", chunks=(1024,), shards=(2048,), compressors=[Crc32cCodec()]
    )
    array[:1024] = 1.0
    spec = ArraySpec(name="lse", dtype=np.dtype(np.float32), inner_shape=(), chunk=(1024,), shard_tokens=2048)
    rows = ShardedRows(tmp_path / "lse", spec, 2048)
    rows.read(0, np.empty(1024, np.float32))
    with pytest.raises(StoreCorruptError, match="was never written"):
        rows.read(1000, np.empty(100, np.float32))
