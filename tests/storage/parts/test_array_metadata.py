"""What is read of an array's metadata: the same as Zarr's own library reads, or one clear line."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec

from specx.storage.codecs.quantization import OUTLIERS
from specx.storage.codecs.zarr_codecs import PforCodec
from specx.storage.errors import StoreCorruptError
from specx.storage.parts.array_metadata import Layout, read_layout
from specx.storage.parts.part_writer import PartWriter
from specx.storage.schema import ArraySpec, DatasetInfo, SequenceFeatures, array_specs

MakeFeatures = Callable[[int, int], SequenceFeatures]

TOKENS = 300
SPEC = ArraySpec(name="lse", dtype=np.dtype(np.float32), inner_shape=(), chunk=(1024,), shard_tokens=2048)


@pytest.fixture
def make_part(tmp_path: Path, info: DatasetInfo, make_features: MakeFeatures) -> Callable[[str], Path]:
    def make(codec: str) -> Path:
        features = make_features(TOKENS, 1)
        # Made of any bits, of which not all are finite.
        hidden = {name: np.zeros_like(getattr(features, name)) for name in ("aux_hidden", "last_hidden")}
        writer = PartWriter(tmp_path / codec, info.model_copy(update={"codec": codec}))
        writer.append(dataclasses.replace(features, **hidden))
        writer.close([bytes(16)])
        return tmp_path / codec

    return make


@pytest.mark.parametrize("codec", ["lossless", "zstd", "none", "int8", "fp8"])
def test_layout_is_what_zarr_says_it_is(make_part: Callable[[str], Path], info: DatasetInfo, codec: str) -> None:
    part = make_part(codec)
    for name, spec in array_specs(info).items():
        array = zarr.open_array(part / name, mode="r")
        assert array.shards is not None
        own = {"lossless": "pfor", "int8": "int8", "fp8": "fp8"} if spec.is_hidden else {}
        assert read_layout(part / name, spec, TOKENS, name) == Layout(
            chunk=array.chunks,
            shard=array.shards,
            form=own.get(codec, "blosc" if isinstance(array.compressors[0], BloscCodec) else "plain"),
        )


def create(folder: Path, **settings: Any) -> Path:
    """Make an array that is ``SPEC`` but for some settings; return its folder."""
    plain = {"shape": (10,), "dtype": "float32", "chunks": (1024,), "shards": (2048,), "compressors": [Crc32cCodec()]}
    zarr.create_array(folder / "lse", **(plain | settings))
    return folder / "lse"


def refused(path: Path, tokens: int = 10) -> str:
    with pytest.raises(StoreCorruptError) as caught:
        read_layout(path, SPEC, tokens, "part/lse")
    return str(caught.value)


def test_an_array_of_other_length_or_dtype_is_refused(tmp_path: Path) -> None:
    assert "part/lse: float32 (10,), expected float32 (11,)" in refused(create(tmp_path), 11)
    assert "part/lse: int32 (10,), expected float32 (10,)" in refused(create(tmp_path / "other", dtype="int32"))


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"compressors": [GzipCodec()]}, "['bytes', \"gzip {'level': 5}\"]"),
        ({"compressors": []}, "['bytes']"),
        ({"serializer": BytesCodec(endian="big")}, "[\"bytes {'endian': 'big'}\", 'crc32c']"),
    ],
    ids=["compressed otherwise", "not checked", "bytes in another order"],
)
def test_an_unknown_codec_is_refused(tmp_path: Path, settings: dict[str, Any], found: str) -> None:
    assert f"part/lse: unknown codecs {found}. Upgrade specx." in refused(create(tmp_path, **settings))


def test_another_number_of_outliers_is_refused(make_part: Callable[[str], Path], info: DatasetInfo) -> None:
    path = make_part("int8") / "last_hidden"
    metadata = (path / "zarr.json").read_text()
    (path / "zarr.json").write_text(metadata.replace(f'"outliers": {OUTLIERS}', '"outliers": 8'))
    with pytest.raises(
        StoreCorruptError, match=r"unknown codecs \[\"specx.int8 \{'outliers': 8\}\", 'blosc', 'crc32c'"
    ):
        read_layout(path, array_specs(info)["last_hidden"], TOKENS, "part/last_hidden")


def test_what_no_writer_compresses_is_refused_compressed(tmp_path: Path) -> None:
    spec = ArraySpec(name="lse", dtype=np.dtype(np.uint16), inner_shape=(8,), chunk=(1024, 8), shard_tokens=2048)
    settings = {"shape": (10, 8), "dtype": "uint16", "chunks": (1024, 8), "shards": (2048, 8)}
    path = create(tmp_path, **settings, serializer=PforCodec(), compressors=[BloscCodec(), Crc32cCodec()])
    with pytest.raises(StoreCorruptError, match=r"unknown codecs \['specx\.pfor', 'blosc', 'crc32c'\]"):
        read_layout(path, spec, 10, "part/lse")


def test_an_index_at_the_start_of_a_shard_is_refused(tmp_path: Path) -> None:
    sharding = ShardingCodec(chunk_shape=(1024,), codecs=[BytesCodec(), Crc32cCodec()], index_location="start")
    path = create(tmp_path, serializer=sharding, chunks=(2048,), shards=None, compressors=None, filters=None)
    assert "unknown codecs" in refused(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"shape": [10], "data_type": "float32", "codecs": []}',
        json.dumps({"shape": [10], "data_type": "float32", "codecs": ["bytes"]}).encode(),
    ],
)
def test_what_is_not_of_a_sharded_array_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "zarr.json").write_bytes(content)
    assert "part/lse/zarr.json: not of a sharded array" in refused(tmp_path)


def test_an_array_without_shards_is_refused(tmp_path: Path) -> None:
    assert "not of a sharded array" in refused(create(tmp_path, shards=None))


def test_missing_metadata_is_told(tmp_path: Path) -> None:
    assert "FileNotFoundError" in refused(tmp_path)
