"""The data of a run: which sequences train, which validate, and in which order.

Shapes: S sequences of all stores, V target vocabulary.
"""

import functools
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningDataModule

from ...storage.catalog.sequence_id import unit_interval
from ..errors import TrainError
from ..settings import DataSettings
from .batch import Batch
from .corpus import Corpus
from .packing import (
    BatchPlan,
    Group,
    batches_per_device,
    drawn,
    grouped,
    of_rank_filled,
    seeds_of_step,
    shuffled,
    split,
)
from .pinned_buffers import Buffers
from .prefetch import BatchLoader, Window


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Sequence numbers, ascending."""

    train: npt.NDArray[np.int64]
    holdout: npt.NDArray[np.int64]
    """What several stores have is here once."""


def split_sequences(corpus: Corpus, holdout_fraction: float) -> Split:
    """Split by the hash of the token ids: a sequence is on the same side in every run and store.

    Raises TrainError for a store without any to train on.
    """
    is_held_out = unit_interval(corpus.ids) < holdout_fraction
    train, holdout = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
    for number, reader in enumerate(corpus.readers):
        if not (corpus.store[train] == number).any():
            raise TrainError(f"{reader.store.root}: no sequences to train on. Run `specx extract` first.")
    if len(corpus.readers) > 1:
        holdout = np.sort(holdout[np.unique(corpus.ids[holdout], axis=0, return_index=True)[1]])
    return Split(train=train, holdout=holdout)


class AnchorSource(Protocol):
    """What a draft family does with a batch as it is read."""

    def draw(self, batch: Batch) -> torch.Tensor:
        """Return the anchors (K, B, T) bool of a batch."""
        ...

    def count_labels(self, batch: Batch, t2d: torch.Tensor) -> torch.Tensor:
        """Return (K,) float32: labels that count at a batch's anchors, given the draft vocabulary ``t2d`` (V,) bool."""
        ...


class FeatureData(LightningDataModule):
    """Streams a corpus. One Lightning epoch is the whole run, so a position in it is one number."""

    def __init__(
        self, config: DataSettings, corpus: Corpus, devices: int = 1, *, anchors: AnchorSource | None = None
    ) -> None:
        """Plan the run; raise TrainError if there is nothing to train on.

        ``devices`` share every step. ``anchors`` gives batches their anchors and counts their labels; without it they
        have none.
        """
        super().__init__()
        self.corpus = corpus
        self._anchors = anchors
        self.split = split_sequences(corpus, config.holdout_fraction)
        self.known: npt.NDArray[np.bool_] | None = None
        """(V,) whether the draft knows a token; needed where an optimizer step has several batches."""
        lengths = corpus.length
        if config.max_length is not None:
            lengths = np.minimum(lengths, config.max_length)
        self._seed, self._batch_tokens = config.seed, config.batch_tokens
        self.lengths: list[int] = lengths.tolist()
        """Tokens of each sequence that are trained on."""
        self.plan = _run_plan(config, corpus, lengths, self.split.train)
        """Of each optimizer step the sequences, whoever computes them."""
        if not self.plan:
            raise TrainError(
                f"{corpus.readers[0].store.root}: the weights leave no sequence to train on. Raise weights or epochs."
            )
        self.accumulated = batches_per_device(self.plan, self.lengths, devices, config.batch_tokens)
        """Batches that each process adds to every optimizer step."""
        self.batches_per_step = devices * self.accumulated
        """Of all processes together."""
        self.holdout_plans = _holdout_plans(config, lengths, self.split.holdout)
        self.loader: BatchLoader | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return len(self.plan)

    def step_plans(self, step: int) -> list[BatchPlan]:
        """Return the batches of one optimizer step, of all processes; the first step is 1."""
        sequences = self.plan[step - 1]
        seeds = seeds_of_step(self._seed, step, len(sequences))
        shares = split([self.lengths[sequence] for sequence in sequences], self.batches_per_step)
        return [BatchPlan(tuple(sequences[i] for i in share), tuple(seeds[i] for i in share)) for share in shares]

    def oversized(self) -> str | None:
        """Return a line that names the sequences longer than a batch may be; None if there are none."""
        used = np.concatenate((self.split.train, self.split.holdout))
        lengths = np.asarray(self.lengths)[used]
        number = int((lengths > self._batch_tokens).sum())
        if not number:
            return None
        longest = int(used[lengths.argmax()])
        reader, at = self.corpus.locate(longest)
        part = reader.store.part_path(reader.store.records[int(reader.catalogue.unit[at])])
        return (
            f"{part}: sequence {bytes(self.corpus.ids[longest]).hex()} has {self.lengths[longest]} tokens, more than a "
            f"batch may have (batch_tokens = {self._batch_tokens}), as {number} of {len(used)} sequences do; each is a "
            f"batch of its own. If memory runs out, cut them with --max-length; if it does not, give "
            f"--batch-tokens {self.lengths[longest]}."
        )

    def train_dataloader(self) -> BatchLoader:
        """Return this process's share of the run's batches."""
        rank, world_size = self._place()
        window = None
        if self.batches_per_step > 1:
            assert self.known is not None
            assert self._anchors is not None
            window = Window(
                batches=self.batches_per_step // world_size,
                count_labels=functools.partial(self._anchors.count_labels, t2d=torch.from_numpy(self.known)),
            )
        plans = _ShareOfSteps(self, rank, world_size)
        self.loader = BatchLoader(
            self.corpus, plans, self.lengths, window=window, buffers=Buffers(), draw_anchors=self._draw_anchors
        )
        return self.loader

    def val_dataloader(self) -> BatchLoader:
        """Return this process's share of the held-out batches, the same every time."""
        plans = of_rank_filled(self.holdout_plans, *self._place())
        return BatchLoader(self.corpus, plans, self.lengths, draw_anchors=self._draw_anchors)

    @property
    def _draw_anchors(self) -> Callable[[Batch], torch.Tensor] | None:
        return None if self._anchors is None else self._anchors.draw

    def _place(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


class _ShareOfSteps(Sequence[BatchPlan]):
    """The batches of one process over the whole run, each split off its step when it is asked for."""

    def __init__(self, data: FeatureData, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        self._each = data.batches_per_step // world_size
        self._steps = data.steps
        # Batches are read in order, and their parts are fetched in order some batches ahead.
        self._step_plans = functools.lru_cache(maxsize=2)(data.step_plans)

    def __len__(self) -> int:
        return self._steps * self._each

    @overload
    def __getitem__(self, number: int) -> BatchPlan: ...

    @overload
    def __getitem__(self, number: slice) -> list[BatchPlan]: ...

    def __getitem__(self, number: int | slice) -> BatchPlan | list[BatchPlan]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        step, batch = divmod(number, self._each)
        return self._step_plans(step + 1)[batch * self._world_size + self._rank]


def _run_plan(
    config: DataSettings, corpus: Corpus, lengths: npt.NDArray[np.int64], sequences: npt.NDArray[np.int64]
) -> list[Group]:
    """Return the sequences of every step. No step spans two epochs: the last one of an epoch has what is left."""
    weights = config.weights or (1.0,) * len(corpus.readers)
    shares = [sequences[corpus.store[sequences] == number] for number in range(len(weights))]
    plan: list[Group] = []
    epoch = 0
    # The collector would look through millions of small lists again and again while they are made, and find nothing.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        while len(plan) < config.max_steps if config.max_steps else epoch < config.epochs:
            taken = [drawn(share, weights[i], (config.seed, i), epoch) for i, share in enumerate(shares)]
            epoch_sequences = np.concatenate(taken)
            order = shuffled(corpus.unit[epoch_sequences], config.shuffle_parts, config.seed, epoch)
            plan += grouped(lengths, config.step_tokens, epoch_sequences[order])
            epoch += 1
    finally:
        if was_enabled:
            gc.enable()
    return plan[: config.max_steps]


def _holdout_plans(
    config: DataSettings, lengths: npt.NDArray[np.int64], holdout: npt.NDArray[np.int64]
) -> list[BatchPlan]:
    """Return the held-out batches, in the order of the store, so that each part is fetched once."""
    seed = dict(zip(holdout.tolist(), seeds_of_step(config.seed, 0, len(holdout)), strict=True))
    groups = grouped(lengths, config.batch_tokens, holdout)
    return [BatchPlan(group, tuple(seed[sequence] for sequence in group)) for group in groups]
