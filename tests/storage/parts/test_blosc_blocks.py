"""Decoding a part of a Blosc chunk: what decoding the whole gives there."""

import itertools

import numpy as np
import pytest
from numcodecs import blosc

from specx.storage.parts.blosc_blocks import decompress_part

BLOCK = 4096
SIZES = {"whole blocks": 5 * BLOCK, "a short last block": 5 * BLOCK + 1000, "one block": BLOCK, "less": 1000}


def values(kind: str, size: int) -> bytes:
    random = np.random.default_rng(0)
    if kind == "noise":
        return random.bytes(size)
    # Like bfloat16: one byte of two says little.
    return ((random.standard_normal(size).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)).tobytes()[:size]


@pytest.mark.parametrize("codec", ["zstd", "lz4", "blosclz"])
@pytest.mark.parametrize("kind", ["states", "noise"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_a_part_is_that_of_the_whole(codec: str, kind: str, size: int) -> None:
    plain = values(kind, size)
    chunk = blosc.compress(plain, codec.encode(), 1, blosc.SHUFFLE, BLOCK, typesize=2)
    room = np.empty(size, np.uint8)
    edges = sorted({edge for at in range(0, size + 1, BLOCK) for edge in (at - 2, at, at + 2) if 0 <= edge <= size})
    edges.append(size)
    tried = 0
    for start in edges:
        for stop in edges:
            if start < stop:
                # It uses up what it is given.
                given = np.frombuffer(chunk, np.uint8).copy()
                assert bytes(decompress_part(given, start, stop, room)) == plain[start:stop]
                tried += 1
    assert tried


def test_blocks_may_lie_in_any_order() -> None:
    plain = values("states", 3 * BLOCK)
    chunk = np.frombuffer(blosc.compress(plain, b"zstd", 1, blosc.SHUFFLE, BLOCK, typesize=2), np.uint8)
    starts = chunk[16:28].view("<u4").tolist()
    bounds = [*starts, len(chunk)]
    blocks = [chunk[a:b] for a, b in itertools.pairwise(bounds)]
    turned = np.concatenate([chunk[:28], *blocks[::-1]])
    ends = np.cumsum([28, *[len(block) for block in blocks[::-1]]])[:3]
    turned[16:28].view("<u4")[:] = ends[::-1]
    assert blosc.decompress(turned.tobytes()) == plain
    for block in range(3):
        at = slice(block * BLOCK + 10, (block + 1) * BLOCK - 10)
        found = decompress_part(turned.copy(), at.start, at.stop, np.empty(3 * BLOCK, np.uint8))
        assert bytes(found) == plain[at]
