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

BatchPlan = tuple[tuple[int, ...], ...]
"""A batch: for each row, numbers of sequences. Tuples of numbers are what the collector soon stops looking through."""


def batch_shape(lengths: npt.NDArray[np.int64], batch_tokens: int) -> BatchShape:
    """Make rows as long as the longest sequence and as many as ``batch_tokens`` allow, at least one."""
    row_tokens = int(lengths.max())
    return BatchShape(rows=max(1, batch_tokens // row_tokens), row_tokens=row_tokens)


def shuffled(parts: npt.NDArray[np.int64], window: int | None, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the order of an epoch: positions of sequences, given the part that each is in (S,).

    Parts come in random order, and their sequences at random among those of the next ``window`` parts: no more
    have to be at hand at a time, and new ones come at an even pace. None, or as many as there are, is any order.
    """
    random = np.random.default_rng((seed, epoch))
    names, number = np.unique(parts, return_inverse=True)
    if window is None or window >= len(names):
        return random.permutation(len(parts))
    return np.argsort(random.permutation(len(names))[number] + window * random.random(len(parts)))


def plan_epoch(lengths: npt.NDArray[np.int64], shape: BatchShape, order: npt.NDArray[np.int64]) -> list[BatchPlan]:
    """Fill batch after batch with the sequences that ``order`` (S,) names, each in the first row with room.

    ``lengths`` are those of all sequences by their number. What does not fit the open batch waits for the
    next one, which it opens; a batch is closed once a few in a row did not fit.
    """
    tokens: list[int] = lengths.tolist()
    shortest = int(lengths[order].min()) if len(order) else 0
    upcoming = deque(order.tolist())
    batches: list[BatchPlan] = []
    while upcoming:
        rows: list[list[int]] = []
        room: list[int] = []
        # A full row is not looked at again, or many rows of few sequences would take for ever.
        free: list[int] = []
        waiting: list[int] = []
        while upcoming and (free or len(rows) < shape.rows) and len(waiting) < _MISSES:
            index = upcoming.popleft()
            for row in free:
                if room[row] >= tokens[index]:
                    rows[row].append(index)
                    room[row] -= tokens[index]
                    if room[row] < shortest:
                        free.remove(row)
                    break
            else:
                if len(rows) == shape.rows:
                    waiting.append(index)
                    continue
                left = shape.row_tokens - tokens[index]
                if left >= shortest:
                    free.append(len(rows))
                rows.append([index])
                room.append(left)
        upcoming.extendleft(reversed(waiting))
        batches.append(tuple(map(tuple, rows)))
    return batches


def of_rank(plans: list[BatchPlan], rank: int, world_size: int) -> list[BatchPlan]:
    """Return the batches of one of several processes: disjoint, and as many for each; what is over is left out."""
    return plans[: len(plans) - len(plans) % world_size][rank::world_size]


def of_rank_filled(plans: list[BatchPlan], rank: int, world_size: int) -> list[BatchPlan]:
    """Return the batches of one of several processes, of all batches: who has one less gets one of padding."""
    share = plans[rank::world_size]
    is_short = len(share) < -(-len(plans) // world_size)
    return [*share, ((),)] if is_short else share


def drawn(sequences: npt.NDArray[np.int64], weight: float, seed: tuple[int, int], epoch: int) -> npt.NDArray[np.int64]:
    """Return what an epoch takes of ``sequences`` (S,): each as often as ``weight`` says, ascending.

    Passes over the sequences follow each other, each in an order of its own, and an epoch takes up where the last one
    stopped: of half a pass an epoch each sequence comes once in two epochs.
    """
    if weight == 1:
        return sequences
    S = len(sequences)
    start, stop = round(epoch * weight * S), round((epoch + 1) * weight * S)
    taken = []
    for number in range(start // max(S, 1), -(-stop // max(S, 1))):
        order = np.random.default_rng((*seed, number)).permutation(S)
        taken.append(order[max(start - number * S, 0) : stop - number * S])
    return np.sort(sequences[np.concatenate(taken)]) if taken else sequences[:0]
