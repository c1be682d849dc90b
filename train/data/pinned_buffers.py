"""Memory for the large arrays of batches, used again once nothing refers to it.

Fresh memory is handed out by the system page by page: of 110 MB that takes an eighth of
the time in which they are read.
"""

import math
import weakref
from collections import deque
from typing import Any

import numpy as np
import torch

from ...storage.schema import Array

_Free = deque[tuple[Array, torch.cuda.Event | None]]


class Buffers:
    """Buffers by name; on a machine with CUDA they are pinned, so that copies to the device need not be waited for."""

    def __init__(self) -> None:
        self._is_pinned = torch.cuda.is_available()
        self._free: dict[str, _Free] = {}
        self._largest: dict[str, int] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return an array with anything in it; its memory is used again when it, and every tensor of it, is gone."""
        # A deque is safe without a lock, which a finalizer, that may run at any moment, could not take.
        free = self._free.setdefault(name, deque())
        size = math.prod(shape) * dtype.itemsize
        self._largest[name] = max(size, self._largest.get(name, 0))
        buffer = self._reused(free, size)
        if buffer is None:
            buffer = self._fresh(self._largest[name])
        array = np.ndarray(shape, dtype, buffer=buffer)
        weakref.finalize(array, self._give_back, free, buffer).atexit = False
        return array

    def _fresh(self, size: int) -> Array:
        if self._is_pinned:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
        # Unlike torch, numpy asks for huge pages: a 512th as many are handed out.
        return np.empty(size, np.uint8)

    def _reused(self, free: _Free, size: int) -> Array | None:
        while True:
            try:
                buffer, copied = free.popleft()
            except IndexError:
                return None
            # One that has become too small is not kept.
            if len(buffer) >= size:
                if copied is not None:
                    copied.synchronize()
                return buffer

    @staticmethod
    def _give_back(free: _Free, buffer: Array) -> None:
        copied = None
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            # The device may not have read it yet.
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        free.append((buffer, copied))
