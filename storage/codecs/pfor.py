"""bfloat16 hidden states in about 11 bits a value, every bit kept, and restored about as fast as memory is copied.

Sign and mantissa of a hidden state are noise: 8 of its 16 bits. The other 8, its exponent, are within a row mostly one
of 8 neighbours, as are those of 99 of 100 values of a normal distribution. So a row keeps 3 bits for each and the
exceptions apart: a patched frame of reference (PFOR; Zukowski et al. 2006, "Super-Scalar RAM-CPU Cache Compression",
section 3). Entropy coding saves a few per cent more and takes eight times as long to decode.

docs/format.md has the bytes. Shapes: R rows of a chunk, T rows asked for, H channels.
"""

import logging

import numpy as np

from .quantization import Bits, Bytes
from .scratch import scratch

try:
    from ._pfor import pack as _pack
    from ._pfor import unpack as _unpack
except ImportError:
    from .pfor_numpy import pack as _pack
    from .pfor_numpy import unpack as _unpack

    logging.getLogger(__name__).warning(
        "specx was installed without a C compiler: stores of codec lossless are read and written far more slowly. "
        "Install one and then specx again, or use --codec zstd."
    )


def pack(rows: Bits) -> Bytes:
    """Return the records of rows (R, H) uint16, bits of bfloat16."""
    rows = np.ascontiguousarray(rows)
    room = scratch("pfor", most_bytes(rows.shape))
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
