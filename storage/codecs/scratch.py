"""Memory that a thread uses again and again: what is fresh costs as much as a copy."""

import threading

import numpy as np

from ..schema import Array

_own = threading.local()


def scratch(use: str, size: int) -> Array:
    """Return (size,) uint8, the thread's own and for one use the same each time, with anything in it."""
    room: Array | None = getattr(_own, use, None)
    if room is None or room.nbytes < size:
        room = np.empty(size, np.uint8)
        setattr(_own, use, room)
    return room[:size]
