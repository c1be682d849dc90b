"""Which sequences an optimizer step trains on, and how its batches share them: decided from lengths alone.

The plan of steps is a pure function of the lengths, their order (seed and epoch) and the tokens of a step. Devices
and what fits on one of them only decide how a step is split, so they change nothing of what a run computes, and a
resumed run finds its place without reading data.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_MISSES = 16
"""Sequences that may fail to fit before a group is closed."""

Group = tuple[int, ...]
"""Numbers of sequences. Tuples of numbers are what the collector soon stops looking through."""


class BatchPlan(NamedTuple):
    """One batch: the sequences of its one row, one after the other."""

    sequences: Group
    """None is a batch of padding."""
    seeds: tuple[int, ...] = ()
    """One for each sequence, for whatever is random in it; empty where nothing is."""


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


def grouped(lengths: npt.NDArray[np.int64], tokens: int, order: npt.NDArray[np.int64]) -> list[Group]:
    """Fill groups of at most ``tokens`` tokens, one after the other, with the sequences that ``order`` (S,) names.

    ``lengths`` are those of all sequences by their number. What does not fit the open group waits for the next one,
    which it opens; a group is closed once a few did not fit. A sequence longer than ``tokens`` is a group of its own.
    """
    length: list[int] = lengths.tolist()
    shortest = int(lengths[order].min()) if len(order) else 0
    upcoming = deque(order.tolist())
    groups: list[Group] = []
    while upcoming:
        group = [upcoming.popleft()]
        room = tokens - length[group[0]]
        waiting: list[int] = []
        while upcoming and room >= shortest and len(waiting) < _MISSES:
            sequence = upcoming.popleft()
            if length[sequence] <= room:
                group.append(sequence)
                room -= length[sequence]
            else:
                waiting.append(sequence)
        upcoming.extendleft(reversed(waiting))
        groups.append(tuple(group))
    return groups


def split(lengths: Sequence[int], batches: int) -> list[Group]:
    """Share the sequences of one step, given their ``lengths``, evenly among ``batches``.

    Returns for each batch positions in ``lengths``, ascending; it has none where there are fewer sequences. The
    longest goes first and each to the batch that has the fewest tokens so far, the earlier one of two.
    """
    if batches == 1:
        return [tuple(range(len(lengths)))]
    shares: list[list[int]] = [[] for _ in range(batches)]
    loads = [(0, batch) for batch in range(batches)]
    for position in sorted(range(len(lengths)), key=lambda position: -lengths[position]):
        load, batch = loads[0]
        heapq.heapreplace(loads, (load + lengths[position], batch))
        shares[batch].append(position)
    return [tuple(sorted(share)) for share in shares]


def batches_per_device(steps: Sequence[Group], lengths: Sequence[int], devices: int, batch_tokens: int) -> int:
    """Return the fewest batches a device for which every batch of every step has ``batch_tokens`` or one sequence."""
    fewest = 1
    for step in steps:
        tokens = [lengths[sequence] for sequence in step]
        # A batch more leaves none of the batches fuller, so a step that has passed is not looked at again.
        while not _fits(tokens, devices * fewest, batch_tokens):
            fewest += 1
    return fewest


def _fits(lengths: Sequence[int], batches: int, batch_tokens: int) -> bool:
    total = sum(lengths)
    if total <= batch_tokens or len(lengths) == 1:
        return True
    if total > batches * batch_tokens and max(lengths) <= batch_tokens:
        return False
    return all(
        len(share) <= 1 or sum(lengths[position] for position in share) <= batch_tokens
        for share in split(lengths, batches)
    )


def seeds_of_step(seed: int, step: int, count: int) -> list[int]:
    """Return a seed, from 0 to 2**63 - 1, for each of the first ``count`` sequences in the plan of a step.

    They depend on nothing else, so what is random is the same however the step is split. Held-out sequences have
    those of step 0.
    """
    return (np.random.SeedSequence((seed, step)).generate_state(count, np.uint64) >> 1).tolist() if count else []


def of_rank_filled(plans: list[BatchPlan], rank: int, world_size: int) -> list[BatchPlan]:
    """Return the batches of one of several processes, of all batches: who has one less gets one of padding."""
    share = plans[rank::world_size]
    is_short = len(share) < -(-len(plans) // world_size)
    return [*share, BatchPlan(())] if is_short else share


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
