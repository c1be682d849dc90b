"""The data of a run: which sequences train, which validate, and in which order.

Shapes: S sequences of all stores, V target vocabulary.
"""

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningDataModule

from ...storage.catalog.sequence_id import unit_interval
from ..errors import TrainError
from ..settings import DataSettings
from .batch import Batch
from .corpus import Corpus
from .packing import BatchPlan, BatchShape, batch_shape, drawn, of_rank, of_rank_filled, plan_epoch, shuffled
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
        self, config: DataSettings, corpus: Corpus, batches_per_step: int = 1, *, anchors: AnchorSource | None = None
    ) -> None:
        """Plan the run; raise TrainError if there is nothing to train on.

        ``anchors`` gives batches their anchors and counts their labels; without it they have none.
        """
        super().__init__()
        self.corpus = corpus
        self.batches_per_step = batches_per_step
        self.split = split_sequences(corpus, config.holdout_fraction)
        self._anchors = anchors
        self.known: npt.NDArray[np.bool_] | None = None
        """(V,) whether the draft knows a token; needed where an optimizer step has several batches."""
        lengths = corpus.length
        if config.max_length is not None:
            lengths = np.minimum(lengths, config.max_length)
        self.lengths: list[int] = lengths.tolist()
        """Tokens of each sequence that are trained on."""
        shape = batch_shape(lengths[np.concatenate((self.split.train, self.split.holdout))], config.batch_tokens)
        self.plans = _run_plans(config, corpus, lengths, self.split.train, shape, batches_per_step)
        """Of all processes together; whole optimizer steps."""
        if not self.plans:
            raise TrainError(
                f"{corpus.readers[0].store.root}: fewer batches than the {batches_per_step} of one optimizer step. "
                "Lower batches_per_step or batch_tokens, or train for more epochs."
            )
        # In the order of the store, so that each part is fetched once.
        self.holdout_plans = plan_epoch(lengths, shape, self.split.holdout)
        self.loader: BatchLoader | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return len(self.plans) // self.batches_per_step

    def step_plans(self, step: int) -> list[BatchPlan]:
        """Return the batches of one optimizer step, of all processes; the first step is 1."""
        return self.plans[(step - 1) * self.batches_per_step : step * self.batches_per_step]

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
        plans = of_rank(self.plans, rank, world_size)
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


def _run_plans(
    config: DataSettings,
    corpus: Corpus,
    lengths: npt.NDArray[np.int64],
    sequences: npt.NDArray[np.int64],
    shape: BatchShape,
    batches_per_step: int,
) -> list[BatchPlan]:
    weights = config.weights or (1.0,) * len(corpus.readers)
    shares = [sequences[corpus.store[sequences] == number] for number in range(len(weights))]
    wanted = config.max_steps * batches_per_step if config.max_steps else None
    plans: list[BatchPlan] = []
    epoch = 0
    # The collector would look through millions of small lists again and again while they are made, and find nothing.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        while len(plans) < wanted if wanted else epoch < config.epochs:
            taken = [drawn(share, weights[i], (config.seed, i), epoch) for i, share in enumerate(shares)]
            epoch_sequences = np.concatenate(taken)
            order = shuffled(corpus.unit[epoch_sequences], config.shuffle_parts, config.seed, epoch)
            plans += plan_epoch(lengths, shape, epoch_sequences[order])
            epoch += 1
    finally:
        if was_enabled:
            gc.enable()
    # What is left behind the last whole step is not trained on.
    return plans[: wanted if wanted else len(plans) - len(plans) % batches_per_step]
