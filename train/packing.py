"""Which sequences share a row, and which rows a batch: decided from lengths alone.

The plan of an epoch is a pure function of the lengths, the seed and the epoch, so
a resumed run finds its place in it without reading data.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchShape:
    """Room in a batch."""

    rows: int
    row_tokens: int


_MISSES = 16
"""Sequences that may fail to fit before a batch is closed."""

BatchPlan = list[list[int]]
"""A batch: for each row, positions in the list of lengths."""


def batch_shape(lengths: npt.NDArray[np.int64], batch_tokens: int) -> BatchShape:
    """Make rows as long as the longest sequence and as many as ``batch_tokens`` allow, at least one."""
    row_tokens = int(lengths.max())
    return BatchShape(rows=max(1, batch_tokens // row_tokens), row_tokens=row_tokens)


def plan_epoch(lengths: npt.NDArray[np.int64], shape: BatchShape, seed: int, epoch: int) -> list[BatchPlan]:
    """Order the sequences at random and fill batch after batch, each sequence in the first row with room.

    What does not fit the open batch waits for the next one, which it opens; a batch is closed once
    a few in a row did not fit.
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(lengths))
    upcoming = deque(order.tolist())
    batches: list[BatchPlan] = []
    while upcoming:
        rows: BatchPlan = [[] for _ in range(shape.rows)]
        free = [shape.row_tokens] * shape.rows
        waiting: list[int] = []
        while upcoming and len(waiting) < _MISSES:
            index = upcoming.popleft()
            row = next((i for i, room in enumerate(free) if room >= lengths[index]), None)
            if row is None:
                waiting.append(index)
            else:
                rows[row].append(index)
                free[row] -= int(lengths[index])
        upcoming.extendleft(reversed(waiting))
        batches.append([row for row in rows if row])
    return batches
