"""The name of a sequence: a hash of its token ids.

The same ids have the same name whoever asks, so a sequence already in a store
is never extracted again, and every split made from names is stable.
"""

import hashlib

import numpy as np
import numpy.typing as npt

SEQUENCE_ID_BYTES = 16


def sequence_id(input_ids: npt.NDArray[np.int32]) -> bytes:
    """Return the 16-byte blake2b hash of ``input_ids`` (T,) as little-endian int32."""
    content = np.ascontiguousarray(input_ids, dtype="<i4").tobytes()
    return hashlib.blake2b(content, digest_size=SEQUENCE_ID_BYTES).digest()


def unit_interval(identifiers: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Map sequence ids (S, 16) uint8 to (S,) float64, uniform in [0, 1), from their first 8 bytes."""
    leading = np.ascontiguousarray(identifiers[:, :8]).view(">u8").reshape(-1)
    # 53 bits fit a float64 exactly, so that no value rounds up to 1.
    return (leading >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def names_of(identifiers: npt.NDArray[np.uint8]) -> list[bytes]:
    """Return sequence ids (S, 16) uint8 as bytes."""
    content = np.ascontiguousarray(identifiers).tobytes()
    return [content[at : at + SEQUENCE_ID_BYTES] for at in range(0, len(content), SEQUENCE_ID_BYTES)]


def find(identifiers: npt.NDArray[np.uint8], among: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Return for each id (S, 16) its row in ``among`` (N, 16), whose rows differ, or -1 if it is not there."""
    if not len(among):
        return np.full(len(identifiers), -1, np.int64)
    # Of one length, so that what numpy strips from the end of a string is stripped from equals alike.
    keys, wanted = (np.ascontiguousarray(each).view("S16").reshape(-1) for each in (among, identifiers))
    order = np.argsort(keys)
    at = np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)
    rows: npt.NDArray[np.int64] = np.where(keys[order[at]] == wanted, order[at], -1)
    return rows
