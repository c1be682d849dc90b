"""bfloat16 hidden states in about 8 bits a value: ``int8`` with outliers, and ``fp8``.

Both have one scale a token. A few channels of a language model's hidden states are
hundreds of times the size of the rest (massive activations, Sun et al. 2024,
arXiv 2402.17762): a scale that fits them leaves the others one or two levels. So
``int8`` keeps each token's largest channels as they are.

Shapes: R rows, H channels of a row, O outliers of a row. Values are uint16, the bits
of bfloat16, and finite.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .scratch import scratch

LossyName = Literal["int8", "fp8"]

OUTLIERS = 16
"""Channels of a token that ``int8`` keeps in bfloat16, but of narrow rows no more than one in 32."""

Bits = npt.NDArray[np.uint16]
Bytes = npt.NDArray[np.uint8]

_CHANNELS_AN_OUTLIER = 32
_CHANNELS_A_GROUP = 16
_INT8_MAX = np.float32(127)
_MAGNITUDE = np.uint16(0x7FFF)
_E4M3_CODES = 127
"""Finite values of float8 e4m3fn that are not negative: codes 0 to 126."""
_E4M3_TOP_EXPONENT = 7
"""Every value below 2**8 has a neighbour; the largest is 448 = 1.75 * 2**8."""
_BFLOAT16_BIAS = 127
_BLOCK_VALUES = 1 << 17
"""Restored at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Rows:
    """Rows as ``int8`` keeps them: ``values * scale``, but for the outliers."""

    scale: npt.NDArray[np.float32]
    """(R,)"""
    channels: Bits
    """(R, O) of the outliers, ascending; not bits but numbers"""
    outliers: Bits
    """(R, O)"""
    values: npt.NDArray[np.int8]
    """(R, H); 0 at the outliers"""


def to_int8(rows: Bits) -> Int8Rows:
    """Quantise rows (R, H), H at most 65536; the scale is the largest value left without the outliers, over 127."""
    H = rows.shape[1]
    # Size above, channel below: no two are the same.
    keys = (rows & _MAGNITUDE).astype(np.uint32) << np.uint32(16) | np.arange(H, dtype=np.uint32)
    largest = _largest(keys, _outliers(H) + 1)
    channels = np.sort(largest[:, 1:] & 0xFFFF, axis=1)
    largest_left = (largest[:, 0] >> 16 << 16).view(np.float32)
    scaled = from_bits(rows)
    scaled *= np.divide(_INT8_MAX, largest_left, out=np.zeros_like(largest_left), where=largest_left > 0)[:, None]
    np.put_along_axis(scaled, channels.astype(np.int64), 0, 1)
    return Int8Rows(
        scale=largest_left / _INT8_MAX,
        channels=channels.astype(np.uint16),
        outliers=np.take_along_axis(rows, channels.astype(np.int64), 1),
        values=np.rint(scaled, out=scaled).astype(np.int8),
    )


def _largest(keys: npt.NDArray[np.uint32], count: int) -> npt.NDArray[np.uint32]:
    """Return the ``count`` largest of each row of distinct ``keys`` (R, H), (R, count) ascending.

    As many groups of columns have one that is no less than ``least``, so no smaller one is among them. What is left
    to sort is a hundredth.
    """
    R, H = keys.shape
    groups = max(count, H // _CHANNELS_A_GROUP)
    size = H // groups
    best = keys[:, : size * groups].reshape(R, size, groups).max(1)
    least = np.partition(best, groups - count, axis=1)[:, groups - count]
    at = np.flatnonzero(keys >= least[:, None])
    # The row above 32 bits, so that one sort does for all.
    left = np.sort((at // H).astype(np.uint64) << np.uint64(32) | keys.reshape(-1)[at])
    ends = np.searchsorted(left >> np.uint64(32), np.arange(R, dtype=np.uint64), "right")
    return left[ends[:, None] + np.arange(-count, 0)].astype(np.uint32)


def from_int8(rows: Int8Rows, out: Bits | None = None) -> Bits:
    """Return what quantised rows stand for, (R, H), rounded to bfloat16; in ``out``, if there is one."""
    found = np.empty(rows.values.shape, np.uint16) if out is None else out
    for block in _blocks(rows.values):
        values = _room("values", rows.values[block])
        np.multiply(rows.values[block], rows.scale[block, None], out=values, dtype=np.float32)
        _round(values, _room("carry", values), found[block])
    np.put_along_axis(found, rows.channels.astype(np.int64), rows.outliers, 1)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Rows:
    """Rows as ``fp8`` keeps them: e4m3fn values times ``2 ** exponent``."""

    exponent: npt.NDArray[np.int16]
    """(R,)"""
    values: npt.NDArray[np.uint8]
    """(R, H) codes of float8 e4m3fn (Micikevicius et al. 2022, arXiv 2209.05433)"""


def to_fp8(rows: Bits) -> Fp8Rows:
    """Quantise rows (R, H).

    The scale is a power of two, which costs no precision: a float's does not depend on its size.
    """
    exponent = ((rows & _MAGNITUDE).max(1).astype(np.int16) >> 7) - np.int16(_BFLOAT16_BIAS + _E4M3_TOP_EXPONENT)
    scaled = np.ldexp(from_bits(rows), -exponent[:, None].astype(np.int32))
    return Fp8Rows(exponent=exponent, values=_ENCODE[to_bits(scaled)])


def from_fp8(rows: Fp8Rows, out: Bits | None = None) -> Bits:
    """Return what quantised rows stand for, (R, H); in ``out``, if there is one."""
    found = np.empty(rows.values.shape, np.uint16) if out is None else out
    for block in _blocks(rows.values):
        values = np.take(_DECODE, rows.values[block], out=_room("values", rows.values[block]), mode="clip")
        np.ldexp(values, rows.exponent[block, None].astype(np.int32), out=values)
        _round(values, _room("carry", values), found[block])
    return found


def from_bits(bits: Bits) -> npt.NDArray[np.float32]:
    """Return bfloat16 as float32, any shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bits(values: npt.NDArray[np.float32]) -> Bits:
    """Return float32 rounded to bfloat16, to even where two are as near; any shape."""
    rounded = np.empty(values.shape, np.uint16)
    _round(values.copy(), np.empty_like(values), rounded)
    return rounded


def _round(values: npt.NDArray[np.float32], room: npt.NDArray[np.float32], out: Bits) -> None:
    """Round ``values`` to bfloat16 in ``out``, with ``room`` for as many; both are used up."""
    whole = values.view(np.uint32)
    carry = np.right_shift(whole, 16, out=room.view(np.uint32))
    carry &= 1
    carry += np.uint32(0x7FFF)
    whole += carry
    np.right_shift(whole, 16, out=out, casting="unsafe")


def _blocks(values: npt.NDArray[Any]) -> Iterator[slice]:
    """Yield the rows of ``values`` (R, H), so many at a time that what is made of them stays near the processor."""
    rows = max(1, _BLOCK_VALUES // max(1, values.shape[1]))
    return (slice(first, first + rows) for first in range(0, len(values), rows))


def _room(use: str, like: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return room for as many float32 as there are in another array."""
    return scratch(use, 4 * like.size).view(np.float32).reshape(like.shape)


def _decode_table() -> npt.NDArray[np.float32]:
    """Return the value of each e4m3fn code, (256,); the two codes of NaN are never written and stand for 0."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    magnitude = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), np.ldexp(1 + mantissa / 8, exponent - 7))
    magnitude[_E4M3_CODES:] = 0
    table: npt.NDArray[np.float32] = np.concatenate([magnitude, -magnitude]).astype(np.float32)
    return table


def _encode_table(decoded: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Return the nearest code of each bfloat16, (65536,), the even one of two as near."""
    magnitudes = decoded[:_E4M3_CODES]
    values = from_bits(np.arange(1 << 15, dtype=np.uint16))
    middle = (magnitudes[1:] + magnitudes[:-1]) / 2
    below, above = np.searchsorted(middle, values, "left"), np.searchsorted(middle, values, "right")
    code = np.where(below % 2 == 0, below, above).astype(np.uint8)
    return np.concatenate([code, code | np.uint8(0x80)])


_DECODE = _decode_table()
_ENCODE = _encode_table(_DECODE)


def encode(kind: LossyName, rows: Bits) -> npt.NDArray[np.uint8]:
    """Return the bytes of quantised rows (R, H): each field of ``Int8Rows`` or ``Fp8Rows`` whole, little-endian."""
    quantised = to_int8(rows) if kind == "int8" else to_fp8(rows)
    parts = [getattr(quantised, field.name) for field in fields(quantised)]
    little = [part.astype(part.dtype.newbyteorder("<"), copy=False) for part in parts]
    return np.concatenate([np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in little])


def encoded_bytes(kind: LossyName, shape: tuple[int, int]) -> int:
    """Return the size of what ``encode`` makes of rows (R, H)."""
    return sum(math.prod(each) * np.dtype(dtype).itemsize for dtype, each in _fields(kind, shape))


def decode(
    kind: LossyName, content: bytes | Bytes, shape: tuple[int, int], out: Bits | None = None, start: int = 0
) -> Bits:
    """Return the rows (R, H) that ``encode`` made ``content`` of; raise ValueError if its size is not theirs.

    With ``out`` (T, H) only those from ``start`` on for which there is room, there.
    """
    rows = slice(start, None if out is None else start + len(out))
    found = [part[rows] for part in _split(content, _fields(kind, shape))]
    if kind == "int8":
        scale, channels, kept, values = found
        return from_int8(Int8Rows(scale=scale, channels=channels, outliers=kept, values=values), out)
    exponent, codes = found
    return from_fp8(Fp8Rows(exponent=exponent, values=codes), out)


def _fields(kind: LossyName, shape: tuple[int, int]) -> list[tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of each field of ``Int8Rows`` or ``Fp8Rows``."""
    R, H = shape
    if kind == "fp8":
        return [("<i2", (R,)), ("u1", (R, H))]
    outliers = _outliers(H)
    return [("<f4", (R,)), ("<u2", (R, outliers)), ("<u2", (R, outliers)), ("i1", (R, H))]


def _outliers(channels: int) -> int:
    return min(OUTLIERS, channels // _CHANNELS_AN_OUTLIER)


def _split(content: bytes | Bytes, layout: list[tuple[str, tuple[int, ...]]]) -> list[npt.NDArray[Any]]:
    found, at = [], 0
    for dtype, shape in layout:
        count = math.prod(shape)
        found.append(np.frombuffer(content, dtype, count, at).reshape(shape))
        at += count * np.dtype(dtype).itemsize
    if at != len(content):
        raise ValueError(f"{len(content)} bytes, expected {at}")
    return found


class QuantizationError:
    """Relative L2 error of what was quantised so far: |x - x'| / |x| over all values."""

    def __init__(self) -> None:
        self._squared_error = self._squared = 0.0

    def add(self, rows: Bits, restored: Bits) -> None:
        """Take in rows and what became of them, of one shape."""
        values = from_bits(rows).astype(np.float64)
        self._squared_error += float(((values - from_bits(restored)) ** 2).sum())
        self._squared += float((values**2).sum())

    @property
    def relative(self) -> float:
        return float(np.sqrt(self._squared_error / self._squared)) if self._squared else 0.0
