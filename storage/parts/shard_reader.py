"""Reading rows of a sharded array, every byte checked.

The shards are plain Zarr v3 and any Zarr library reads them. We read them
ourselves for one reason: the fast pipeline of zarrs 0.2.3 decodes part of a
shard without looking at the checksums (59 of 60 flipped bytes came back as wrong
values), and zarr-python takes 1 to 3 ms a call.

A shard is its encoded chunks, then an index of (offset, bytes) a chunk as
little-endian uint64, then the crc32c of the index (Zarr v3 sharding, ZEP 2).

Shapes: T rows asked for, D further axes.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from crc32c import crc32c
from numcodecs import blosc

from ..codecs.pfor import unpack
from ..codecs.quantization import LossyName, decode, encoded_bytes
from ..codecs.scratch import scratch
from ..errors import StoreCorruptError
from ..schema import Array, ArraySpec
from .array_metadata import read_layout
from .blosc_blocks import decompress_part

_CRC_BYTES = 4
_ENTRY_BYTES = 16
"""Of the index: offset and size of a chunk."""
_WORTH_KNOWING = 1 << 16
"""Bytes of a chunk that need not be read again."""
_ABSENT = np.iinfo(np.uint64).max


@dataclass(frozen=True, slots=True)
class _Shard:
    """One that is open."""

    key: str
    descriptor: int
    index: Array


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Where one is in its shard."""

    position: tuple[int, ...]
    offset: int
    size: int
    """Bytes, with the checksum."""


_Rows = tuple[str, tuple[int, ...], int, int]
"""Which rows of a chunk: its shard, where it is there, the first row and how many."""


@dataclass(frozen=True, slots=True)
class _KnownPart:
    """Bytes of a chunk that were read before, when all of it was checked."""

    offset: int
    """Within the chunk."""
    size: int
    checksum: int


class ShardedRows:
    """One array of a part, read by rows."""

    def __init__(
        self,
        path: Path,
        spec: ArraySpec,
        tokens: int,
        name: str | None = None,
        hashes: Mapping[str, str] | None = None,
    ) -> None:
        """``path`` is that of the array; ``name`` stands for it in errors if ``path`` is that of a copy.

        ``hashes`` are what ``chunks_hash`` was of each shard, by its key, where that is known.
        """
        self._path = path
        self._name = name or str(path)
        self._hashes = hashes
        layout = read_layout(path, spec, tokens, self._name)
        self._dtype = spec.dtype
        self._chunk = layout.chunk
        self._chunk_tokens = layout.chunk[0]
        self._shard_tokens = layout.shard[0]
        self._index_shape = (*layout.chunks_of_a_shard, 2)
        self._form = layout.form
        self._indices: dict[int, Array] = {}
        self._known_parts: dict[_Rows, _KnownPart] = {}
        """About two for each sequence."""

    def read(self, start: int, out: Array, column: int | None = None) -> None:
        """Fill ``out`` (T, D…) with rows ``start:start + T``.

        ``column`` picks one entry of the second axis, which must be chunked by 1; ``out`` then
        lacks that axis. Raises StoreCorruptError where a byte differs from what was written.
        """
        stop = start + len(out)
        row = start
        while row < stop:
            number = row // self._shard_tokens
            end = min(stop, (number + 1) * self._shard_tokens)
            with self._shard(number) as shard:
                self._read_shard(shard, row - number * self._shard_tokens, out[row - start : end - start], column)
            row = end

    @contextmanager
    def _shard(self, number: int) -> Iterator[_Shard]:
        key = "/".join(["c", str(number), *["0"] * (len(self._chunk) - 1)])
        try:
            descriptor = os.open(self._path / key, os.O_RDONLY)
        except FileNotFoundError as error:
            raise StoreCorruptError(self._damaged(key, "the shard is missing")) from error
        try:
            index = self._indices.get(number)
            if index is None:
                index = self._indices[number] = self._read_index(descriptor, key)
            yield _Shard(key, descriptor, index)
        finally:
            os.close(descriptor)

    def _read_shard(self, shard: _Shard, start: int, out: Array, column: int | None) -> None:
        """Fill ``out`` with the rows of a shard from ``start`` on."""
        stop = start + len(out)
        row = start
        while row < stop:
            chunk = row // self._chunk_tokens
            first = chunk * self._chunk_tokens
            end = min(stop, first + self._chunk_tokens)
            rows = out[row - start : end - start]
            place = self._place(shard, chunk, column or 0)
            is_contiguous = rows.flags.c_contiguous
            if self._form == "pfor":
                self._unpack(shard, place, row - first, rows)
            elif self._form == "int8" or self._form == "fp8":
                self._restore(self._form, self._content(shard, place), row - first, rows)
            elif is_contiguous and self._form == "plain":
                self._read_plain(shard, place, row - first, rows)
            elif is_contiguous and end - row == self._chunk_tokens:
                # No other copy than the decoder's.
                blosc.decompress(self._content(shard, place), rows)
            else:
                values = self._values(self._content(shard, place), row - first, end - first)
                rows[:] = values if column is None else values[:, 0]
            row = end

    def _place(self, shard: _Shard, number: int, column: int) -> _Chunk:
        position = (number, column) if len(self._chunk) == 3 else (number,)
        offset, size = shard.index[position].reshape(-1, 2)[0].tolist()
        if offset == _ABSENT:
            raise StoreCorruptError(self._damaged(shard.key, f"chunk {position} was never written"))
        return _Chunk(position, offset, size)

    def _read_plain(self, shard: _Shard, chunk: _Chunk, start: int, out: Array) -> None:
        """Fill ``out`` (T, …) with rows of a plain chunk from ``start`` on; they are copied only once.

        Where only a part of a chunk is wanted all of it is read and checked once, and from then on that part alone.
        """
        wanted = out.reshape(-1).view(np.uint8)
        rows = shard.key, chunk.position, start, len(out)
        known = self._known_parts.get(rows)
        if known:
            self._read_again(shard, chunk, known, wanted)
            return
        row_bytes = wanted.nbytes // len(out)
        before, after = start * row_bytes, (self._chunk_tokens - start - len(out)) * row_bytes
        self._read_checked(shard, chunk, (scratch("before", before), wanted, scratch("after", after)))
        self._remember(rows, chunk, before, wanted)

    def _unpack(self, shard: _Shard, chunk: _Chunk, start: int, out: Array) -> None:
        """Fill ``out`` (T, …, H) with rows of a ``pfor`` chunk from ``start`` on, read as those of a plain one are."""
        rows = shard.key, chunk.position, start, len(out)
        known = self._known_parts.get(rows)
        if known:
            content = scratch("stored", known.size)
            self._read_again(shard, chunk, known, content)
        else:
            content = self._content(shard, chunk)
        try:
            part = unpack(content, 0 if known else start, out.reshape(len(out), -1))
        except ValueError as error:
            raise StoreCorruptError(self._damaged(shard.key, f"chunk {chunk.position}: {error}")) from error
        if not known:
            self._remember(rows, chunk, part.start, content[part])

    def _remember(self, rows: _Rows, chunk: _Chunk, offset: int, part: Array) -> None:
        """Note the bytes of some rows of a chunk, if that saves enough the next time."""
        if chunk.size - part.nbytes >= _WORTH_KNOWING:
            self._known_parts[rows] = _KnownPart(offset, part.nbytes, crc32c(part.data))

    def _read_again(self, shard: _Shard, chunk: _Chunk, known: _KnownPart, out: Array) -> None:
        """Fill ``out``, (bytes,) uint8, with a part of a chunk."""
        found = os.preadv(shard.descriptor, [out.data], chunk.offset + known.offset)
        if found != known.size or crc32c(out.data) != known.checksum:
            raise StoreCorruptError(self._damaged(shard.key, f"chunk {chunk.position} was changed since it was read"))

    def _content(self, shard: _Shard, chunk: _Chunk) -> Array:
        """Return the stored bytes of a chunk (bytes,) uint8, checked; they are valid until the thread's next call."""
        content = scratch("stored", chunk.size - _CRC_BYTES)
        self._read_checked(shard, chunk, (content,))
        return content

    def _read_checked(self, shard: _Shard, chunk: _Chunk, pieces: tuple[Array, ...]) -> None:
        """Fill ``pieces``, (bytes,) uint8 each, with the stored bytes of a chunk, one behind the other."""
        checksum = bytearray(_CRC_BYTES)
        is_whole = sum(piece.nbytes for piece in pieces) + _CRC_BYTES == chunk.size
        found = (
            os.preadv(shard.descriptor, [*(piece.data for piece in pieces), checksum], chunk.offset) if is_whole else 0
        )
        computed = 0
        for piece in pieces:
            # For what is large it lets go of the interpreter.
            computed = crc32c(piece.data, computed)
        if found != chunk.size or computed != _number(checksum):
            what = f"the checksum of chunk {chunk.position} does not match its bytes"
            raise StoreCorruptError(self._damaged(shard.key, what))

    def _restore(self, lossy: LossyName, content: Array, start: int, out: Array) -> None:
        """Fill ``out`` (T, …, H) with rows of a quantised chunk from ``start`` on; ``content`` is used up."""
        shape = self._chunk[0], self._chunk[-1]
        size = encoded_bytes(lossy, shape)
        content = decompress_part(content, 0, size, scratch("plain", size))
        decode(lossy, content, shape, out.reshape(len(out), -1), start)

    def _values(self, content: Array, start: int, stop: int) -> Array:
        """Return rows ``start:stop`` of a chunk, valid until the thread's next call; ``content`` is used up."""
        row_bytes = math.prod(self._chunk[1:]) * self._dtype.itemsize
        if self._form == "blosc":
            room = scratch("plain", self._chunk_tokens * row_bytes)
            content = decompress_part(content, start * row_bytes, stop * row_bytes, room)
        else:
            content = content[start * row_bytes : stop * row_bytes]
        return content.view(self._dtype).reshape(stop - start, *self._chunk[1:])

    def _read_index(self, descriptor: int, key: str) -> Array:
        size = math.prod(self._index_shape) * 8
        at = os.fstat(descriptor).st_size - size - _CRC_BYTES
        content = os.pread(descriptor, size + _CRC_BYTES, at) if at >= 0 else b""
        if len(content) != size + _CRC_BYTES or crc32c(content[:size]) != _number(content[size:]):
            raise StoreCorruptError(self._damaged(key, "the checksum of the shard's index does not match its bytes"))
        if self._hashes is not None and self._hashes.get(key) != _chunks_hash(descriptor, content[:size]):
            raise StoreCorruptError(self._damaged(key, "this is another shard than the one committed"))
        return np.frombuffer(content[:size], "<u8").reshape(self._index_shape)

    def _damaged(self, key: str, what: str) -> str:
        return (
            f"{self._name}/{key}: {what}. Run `specx store verify --drop-bad`, which finds all damage, and rerun "
            "`specx extract`: only the sequences of damaged parts are extracted again."
        )


def chunks_hash(path: Path, spec: ArraySpec) -> str:
    """Return the XXH3 128-bit hash, hex, of a shard's index and of the checksums of its chunks in that order.

    Every chunk is checked by its own checksum when it is read; this tells that they are this shard's.
    """
    across = math.prod(-(-size // chunk) for size, chunk in zip(spec.inner_shape, spec.chunk[1:], strict=True))
    size = spec.shard_tokens // spec.chunk[0] * across * _ENTRY_BYTES
    descriptor = os.open(path, os.O_RDONLY)
    try:
        index = os.pread(descriptor, size, os.fstat(descriptor).st_size - size - _CRC_BYTES)
        return _chunks_hash(descriptor, index)
    finally:
        os.close(descriptor)


def _chunks_hash(descriptor: int, index: bytes) -> str:
    digest = xxhash.xxh3_128(index)
    for offset, size in np.frombuffer(index, "<u8").reshape(-1, 2).tolist():
        if offset != _ABSENT:
            digest.update(os.pread(descriptor, _CRC_BYTES, offset + size - _CRC_BYTES))
    return digest.hexdigest()


def _number(checksum: bytes | bytearray) -> int:
    return int.from_bytes(checksum, "little")
