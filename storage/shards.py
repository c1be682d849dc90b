"""Reading rows of a sharded array, every byte checked.

The shards are plain Zarr v3 and any Zarr library reads them. We read them
ourselves for one reason: the fast pipeline of zarrs 0.2.3 decodes part of a
shard without looking at the checksums (59 of 60 flipped bytes came back as wrong
values), and zarr-python takes 1 to 3 ms a call.

A shard is its encoded chunks, then an index of (offset, bytes) a chunk as
little-endian uint64, then the crc32c of the index (Zarr v3 sharding, ZEP 2).

Shapes: T rows asked for, D further axes.
"""

import os
from pathlib import Path

import google_crc32c
import numpy as np
import zarr
from numcodecs import blosc
from zarr.codecs import BloscCodec, Crc32cCodec

from .errors import StoreCorruptError
from .schema import Array, ArraySpec

_CRC_BYTES = 4
_ABSENT = np.iinfo(np.uint64).max


class ShardedRows:
    """One array of a part, read by rows."""

    def __init__(self, path: Path, spec: ArraySpec, tokens: int, name: str | None = None) -> None:
        """``path`` is that of the array; ``name`` stands for it in errors if ``path`` is that of a copy."""
        self._path = path
        self._name = name or str(path)
        array = zarr.open_array(path, mode="r")
        if array.shape != (tokens, *spec.inner_shape) or array.dtype != spec.dtype or array.shards is None:
            raise StoreCorruptError(
                f"{self._name}: {array.dtype} {array.shape}, expected sharded {spec.dtype} "
                f"{(tokens, *spec.inner_shape)}. Run `specx store verify` on the store."
            )
        self._dtype = spec.dtype
        self._chunk = array.chunks
        self._chunk_tokens = array.chunks[0]
        self._shard_tokens = array.shards[0]
        self._index_shape = (
            *(shard // chunk for shard, chunk in zip(array.shards, array.chunks, strict=True)),
            2,
        )
        kinds = tuple(type(codec) for codec in array.compressors)
        if kinds not in ((Crc32cCodec,), (BloscCodec, Crc32cCodec)):
            raise StoreCorruptError(f"{self._name}: unknown codecs {[kind.__name__ for kind in kinds]}. Upgrade specx.")
        self._is_blosc = BloscCodec in kinds
        self._indices: dict[int, Array] = {}

    def read(self, start: int, out: Array, column: int | None = None) -> None:
        """Fill ``out`` (T, D…) with rows ``start:start + T``.

        ``column`` picks one entry of the second axis, which must be chunked by 1; ``out`` then
        lacks that axis. Raises StoreCorruptError where a byte differs from what was written.
        """
        stop = start + len(out)
        row = start
        while row < stop:
            chunk = row // self._chunk_tokens
            first = chunk * self._chunk_tokens
            end = min(stop, first + self._chunk_tokens)
            values = self._decode(chunk, column or 0)
            if column is not None:
                values = values[:, 0]
            out[row - start : end - start] = values[row - first : end - first]
            row = end

    def _decode(self, chunk: int, column: int) -> Array:
        shard, within = divmod(chunk, self._shard_tokens // self._chunk_tokens)
        key = "/".join(["c", str(shard), *["0"] * (len(self._chunk) - 1)])
        try:
            descriptor = os.open(self._path / key, os.O_RDONLY)
        except FileNotFoundError as error:
            raise StoreCorruptError(self._damaged(key, "the shard is missing")) from error
        try:
            index = self._indices.get(shard)
            if index is None:
                index = self._indices[shard] = self._read_index(descriptor, key)
            position = (within, column) if len(self._chunk) == 3 else (within,)
            offset, size = index[position].reshape(-1, 2)[0].tolist()
            if offset == _ABSENT:
                raise StoreCorruptError(self._damaged(key, f"chunk {position} was never written"))
            # Two reads, as the checksum wants bytes of its own and slicing would copy them.
            content = os.pread(descriptor, size - _CRC_BYTES, offset)
            checksum = os.pread(descriptor, _CRC_BYTES, offset + size - _CRC_BYTES)
        finally:
            os.close(descriptor)
        if len(checksum) != _CRC_BYTES or google_crc32c.value(content) != _number(checksum):
            raise StoreCorruptError(self._damaged(key, f"the checksum of chunk {position} does not match its bytes"))
        values = np.frombuffer(blosc.decompress(content) if self._is_blosc else content, self._dtype)
        return values.reshape(self._chunk)

    def _read_index(self, descriptor: int, key: str) -> Array:
        size = int(np.prod(self._index_shape)) * 8
        at = os.fstat(descriptor).st_size - size - _CRC_BYTES
        content = os.pread(descriptor, size + _CRC_BYTES, at) if at >= 0 else b""
        if len(content) != size + _CRC_BYTES or google_crc32c.value(content[:size]) != _number(content[size:]):
            raise StoreCorruptError(self._damaged(key, "the checksum of the shard's index does not match its bytes"))
        return np.frombuffer(content[:size], "<u8").reshape(self._index_shape)

    def _damaged(self, key: str, what: str) -> str:
        return (
            f"{self._name}/{key}: {what}. Run `specx store verify` to see all damage, then delete the commit record "
            "that names this part and rerun `specx extract`: only its sequences are extracted again."
        )


def _number(checksum: bytes) -> int:
    return int.from_bytes(checksum, "little")
