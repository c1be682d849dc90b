"""Which sequences share a row, and which rows a batch: decided from lengths alone.

The plan of an epoch is a pure function of the lengths, the seed and the epoch, so
a resumed run finds its place in it without reading data.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchShape:
    """Room in a batch."""

    rows: int
    row_tokens: int


BatchPlan = list[list[int]]
"""A batch: for each row, positions in the list of lengths."""


def batch_shape(lengths: npt.NDArray[np.int64], batch_tokens: int) -> BatchShape:
    """Make rows as long as the longest sequence and as many as ``batch_tokens`` allow, at least one."""
    row_tokens = int(lengths.max())
    return BatchShape(rows=max(1, batch_tokens // row_tokens), row_tokens=row_tokens)


def plan_epoch(lengths: npt.NDArray[np.int64], shape: BatchShape, seed: int, epoch: int) -> list[BatchPlan]:
    """Order the sequences at random and put each into the first row of the open batch with room for it."""
    order = np.random.default_rng((seed, epoch)).permutation(len(lengths))
    batches: list[BatchPlan] = []
    rows: BatchPlan = []
    free: list[int] = []
    for index in order.tolist():
        length = int(lengths[index])
        row = next((i for i, room in enumerate(free) if room >= length), None)
        if row is None and len(rows) == shape.rows:
            batches.append(rows)
            rows, free = [], []
        if row is None:
            rows.append([])
            free.append(shape.row_tokens)
            row = len(rows) - 1
        rows[row].append(index)
        free[row] -= length
    if rows:
        batches.append(rows)
    return batches
