"""What ``_pfor.c`` does, in numpy: used where that could not be built, and what it is compared with.

Shapes: R rows, T rows asked for, H channels, E = ceil(H / 8), P packed rows of those asked for.
"""

import numpy as np
import numpy.typing as npt

from .quantization import Bits, Bytes

_ZERO, _PACKED, _PLAIN = range(3)
_HEADER_BYTES = 4
_CODES = 8
_LARGEST_GAP = 256
_MOST_EXCEPTIONS = 65535
_EXPONENTS = 256


def pack(rows: Bits, room: Bytes) -> int:
    """Fill ``room`` with the records of ``rows`` (R, H); return their bytes."""
    R, H = rows.shape
    if len(room) < R * (1 + 2 * H):
        raise ValueError("too little room for what rows may become")
    records = b"".join(map(_record, rows, _best_bases(rows)))
    room[: len(records)] = np.frombuffer(records, np.uint8)
    return len(records)


def _best_bases(rows: Bits) -> list[int]:
    """Return of each row the first of the 8 exponents that most of its values have."""
    R = len(rows)
    keys = _exponents(rows) + np.arange(R)[:, None] * _EXPONENTS
    counts = np.bincount(keys.reshape(-1), minlength=R * _EXPONENTS).reshape(R, _EXPONENTS)
    below = np.pad(counts.cumsum(1), ((0, 0), (1, 0)))
    best: list[int] = (below[:, _CODES:] - below[:, :-_CODES]).argmax(1).tolist()
    return best


def _record(row: Bits, base: int) -> bytes:
    H = len(row)
    if not row.any():
        return bytes([_ZERO])
    exponent = _exponents(row)
    codes = exponent - base
    is_exception = (codes < 0) | (codes >= _CODES)
    codes[is_exception] = 0
    pairs = _pairs(np.flatnonzero(is_exception).tolist(), exponent)
    low = (row >> 8 & 0x80 | row & 0x7F).astype(np.uint8)
    packed = low.tobytes() + _join(codes.astype(np.uint8)).tobytes() + bytes(pairs)
    if len(pairs) > 2 * _MOST_EXCEPTIONS or _HEADER_BYTES + len(packed) > 1 + 2 * H:
        return bytes([_PLAIN]) + row.astype("<u2").tobytes()
    return bytes([_PACKED, base]) + (len(pairs) // 2).to_bytes(2, "little") + packed


def _pairs(exceptions: list[int], exponent: npt.NDArray[np.int64]) -> list[int]:
    """Return distance less 1 and exponent of each exception, and of values between those that are too far apart."""
    pairs, following = [], 0
    for exception in exceptions:
        while following <= exception:
            at = min(exception, following + _LARGEST_GAP - 1)
            pairs += [at - following, int(exponent[at])]
            following = at + 1
    return pairs


def _join(codes: Bytes) -> Bytes:
    """Return codes (H,) in three runs of bytes (3, E)."""
    parts = np.pad(codes, (0, -len(codes) % _CODES)).reshape(_CODES, -1)
    return np.stack(
        [
            parts[0] | parts[1] << 3 | (parts[6] & 3) << 6,
            parts[2] | parts[3] << 3 | (parts[6] & 4) << 4 | (parts[7] & 4) << 5,
            parts[4] | parts[5] << 3 | (parts[7] & 3) << 6,
        ]
    )


def unpack(stored: Bytes, skipped: int, out: Bits) -> tuple[int, int]:
    """Fill ``out`` (T, H) with the rows behind the ``skipped`` first; return where their records begin and end."""
    T, H = out.shape
    starts, at = [], 0
    for row in range(skipped + T):
        starts.append(at)
        size = _record_bytes(stored, at, H)
        if size == 0 or at + size > len(stored):
            raise ValueError(f"row {row} is no record of {H} values")
        at += size
    begin = starts[skipped] if T else at
    starts = starts[skipped:]
    kinds = stored[starts]
    out[kinds == _ZERO] = 0
    for row in np.flatnonzero(kinds == _PLAIN).tolist():
        out[row] = stored[starts[row] + 1 :][: 2 * H].view("<u2")
    rows = np.flatnonzero(kinds == _PACKED)
    if len(rows):
        headers = np.array(starts)[rows]
        out[rows] = _restored(stored, headers, H)
        for row, header in zip(rows.tolist(), headers.tolist(), strict=True):
            if not _put_exceptions(stored, header, out[row]):
                raise ValueError(f"row {skipped + row} is no record of {H} values")
    return begin, at


def _record_bytes(stored: Bytes, at: int, channels: int) -> int:
    """Return the size of the record at ``at``, or 0 if it is none."""
    header = stored[at : at + _HEADER_BYTES].tolist()
    kind = header[0] if header else None
    if kind == _ZERO:
        return 1
    if kind == _PLAIN:
        return 1 + 2 * channels
    if kind == _PACKED and len(header) == _HEADER_BYTES and header[1] <= _EXPONENTS - _CODES:
        return _fixed_bytes(channels) + 2 * _exceptions(header)
    return 0


def _restored(stored: Bytes, headers: npt.NDArray[np.int64], channels: int) -> Bits:
    """Return the values (P, H) of packed rows, of which the exceptions are wrong yet."""
    fixed = stored[headers[:, None] + np.arange(_fixed_bytes(channels))]
    base, low, joined = fixed[:, 1:2], fixed[:, _HEADER_BYTES:][:, :channels], fixed[:, _HEADER_BYTES + channels :]
    first, second, third = joined.reshape(len(fixed), 3, -1).swapaxes(0, 1)
    codes = [first & 7, first >> 3 & 7, second & 7, second >> 3 & 7, third & 7, third >> 3 & 7]
    codes += [first >> 6 | second >> 4 & 4, third >> 6 | second >> 5 & 4]
    exponent = np.concatenate(codes, 1)[:, :channels] + base
    values: Bits = (low & 0x80).astype(np.uint16) << 8 | exponent.astype(np.uint16) << 7 | low & 0x7F
    return values


def _put_exceptions(stored: Bytes, header: int, row: Bits) -> bool:
    """Correct the exceptions of a row (H,); return whether they are all within it."""
    begin = header + _fixed_bytes(len(row))
    pairs = stored[begin : begin + 2 * _exceptions(stored[header : header + _HEADER_BYTES].tolist())].reshape(-1, 2)
    at = np.cumsum(pairs[:, 0].astype(np.int64) + 1) - 1
    if len(at) and at[-1] >= len(row):
        return False
    row[at] = row[at] & 0x807F | pairs[:, 1].astype(np.uint16) << 7
    return True


def _fixed_bytes(channels: int) -> int:
    return _HEADER_BYTES + channels + 3 * -(-channels // _CODES)


def _exceptions(header: list[int]) -> int:
    return header[2] | header[3] << 8


def _exponents(rows: Bits) -> npt.NDArray[np.int64]:
    return (rows >> 7 & 0xFF).astype(np.int64)
