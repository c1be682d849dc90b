"""bfloat16 hidden states in about 11 bits a value, every bit kept and restored about as fast as memory is copied.

Sign and mantissa of a hidden state look like noise, and 8 of each 16 bits are these. The other 8, its exponent, are
mostly one of 8 neighbours within a row: 99 of 100 values of a normal distribution are. So a row keeps 3 bits for each,
and the few that are elsewhere apart. Entropy coding takes a few per cent less room but eight times as long to decode.

The bytes are described in docs/format.md. Shapes: R rows of a chunk, T rows asked for, H channels.
"""

import logging

import numpy as np

from .quantization import Bits, Bytes
from .scratch import scratch

try:
    from ._packing import pack as _pack
    from ._packing import unpack as _unpack
except ImportError:
    from .packing_plain import pack as _pack
    from .packing_plain import unpack as _unpack

    logging.getLogger(__name__).warning(
        "specx was installed without a C compiler: stores of codec lossless are written and read many times slower. "
        "Install one and specx once more, or use --codec zstd."
    )


def pack(rows: Bits) -> Bytes:
    """Return the records of rows (R, H) uint16, bits of bfloat16."""
    rows = np.ascontiguousarray(rows)
    room = scratch("packed", most_bytes(rows.shape))
    return room[: _pack(rows, room)].copy()


def unpack(stored: Bytes, skipped: int, out: Bits) -> slice:
    """Fill ``out`` (T, H) uint16 with the rows behind the first ``skipped``; return where their records lie.

    The values of a row of ``out`` must lie side by side. Raises ValueError if ``stored``, (bytes,) uint8, does not hold
    them.
    """
    start, stop = _unpack(stored, skipped, out)
    return slice(start, stop)


def most_bytes(shape: tuple[int, ...]) -> int:
    """Return what the records of rows (R, H) take at most."""
    R, H = shape
    return R * (1 + 2 * H)
