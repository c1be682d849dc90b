"""Decoding a part of a Blosc chunk: only the blocks that hold it.

A chunk is a header of 16 bytes, where each block starts as little-endian int32, and the
blocks, in any order, each compressed for itself (README_CHUNK_FORMAT.rst of c-blosc 1.21).
Its library decodes whole chunks; so it is given a chunk of just those blocks.
"""

from typing import Any

import numpy as np
from numcodecs import blosc

from ..schema import Array

_HEADER_BYTES = 16
_FLAGS = 2
_SIZES = slice(4, _HEADER_BYTES)
"""Bytes when decoded, bytes of a block when decoded, bytes of the chunk; little-endian uint32 each."""
_MEMCPYED = 0x2
"""The chunk did not compress: what follows the header is the plain bytes."""
_NOT_SPLIT = 0x10
"""No block is in several streams, as those of zstd are not; a last one that is shorter is like any other then."""


def decompress_part(chunk: Array, start: int, stop: int, room: Array) -> Array:
    """Return bytes ``start:stop`` of what ``chunk`` (bytes,) uint8 decodes to, in ``room``, uint8 of that size.

    ``chunk`` must be whole and checked, and is overwritten.
    """
    decoded, block, _ = _sizes(chunk).tolist()
    if chunk[_FLAGS] & _MEMCPYED:
        return chunk[_HEADER_BYTES + start : _HEADER_BYTES + stop]
    blocks = -(-decoded // block)
    first, end = (start // block, -(-stop // block)) if chunk[_FLAGS] & _NOT_SPLIT else (0, blocks)
    if (first, end) == (0, blocks):
        blosc.decompress(chunk, room[:decoded])
        return room[start:stop]
    starts = _starts(chunk, blocks)[first:end].copy()
    # Before the first of the blocks there is room for a header, as there was one of all blocks.
    base = int(starts.min()) - _HEADER_BYTES - starts.nbytes
    part = chunk[base:]
    part[:_HEADER_BYTES] = chunk[:_HEADER_BYTES].copy()
    plain = room[: min(decoded, end * block) - first * block]
    _sizes(part)[:] = len(plain), min(block, len(plain)), len(part)
    _starts(part, len(starts))[:] = starts - base
    blosc.decompress(part, plain)
    return plain[start - first * block : stop - first * block]


def _sizes(chunk: Array) -> Any:
    return chunk[_SIZES].view("<u4")


def _starts(chunk: Array, blocks: int) -> Any:
    return chunk[_HEADER_BYTES : _HEADER_BYTES + 4 * blocks].view(np.dtype("<i4"))
