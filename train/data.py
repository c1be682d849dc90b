"""The data of a run: which sequences train, which validate, and in which order.

Shapes: S sequences of the catalogue.
"""

import gc
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from lightning.pytorch import LightningDataModule

from ..storage.hashing import unit_interval
from ..storage.reader import FeatureReader
from .config import TrainConfig
from .errors import TrainError
from .loader import BatchLoader
from .packing import BatchPlan, BatchShape, batch_shape, of_rank, plan_epoch, shuffled


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Sequence numbers, ascending."""

    train: npt.NDArray[np.int64]
    holdout: npt.NDArray[np.int64]


def split_sequences(reader: FeatureReader, holdout_fraction: float) -> Split:
    """Split by the hash of the token ids: a sequence is on the same side in every run and store."""
    is_held_out = unit_interval(reader.catalogue.ids) < holdout_fraction
    return Split(train=np.flatnonzero(~is_held_out), holdout=np.flatnonzero(is_held_out))


class FeatureData(LightningDataModule):
    """Streams a store. One Lightning epoch is the whole run, so a position in it is one number."""

    def __init__(self, config: TrainConfig, reader: FeatureReader, boundaries: tuple[int, ...]) -> None:
        """Plan the run; raise TrainError if there is nothing to train on."""
        super().__init__()
        self.reader = reader
        self.split = split_sequences(reader, config.holdout_fraction)
        if not len(self.split.train):
            raise TrainError(f"{config.store}: no sequences to train on. Run `specx extract` first.")
        self._columns = tuple(reader.store.info.boundaries.index(boundary) for boundary in boundaries)
        lengths = reader.catalogue.length
        if config.max_length is not None:
            lengths = np.minimum(lengths, config.max_length)
        self._lengths: list[int] = lengths.tolist()
        shape = batch_shape(lengths[np.concatenate((self.split.train, self.split.holdout))], config.batch_tokens)
        self.plans = _run_plans(config, lengths, reader.catalogue.unit, self.split.train, shape)
        """Of all processes together."""
        # In the order of the store, so that each part is fetched once.
        self._holdout_plans = plan_epoch(lengths, shape, self.split.holdout)
        self.loader: BatchLoader | None = None

    def train_dataloader(self) -> BatchLoader:
        """Return this process's share of the run's batches."""
        self.loader = self._loader(self.plans)
        return self.loader

    def val_dataloader(self) -> BatchLoader:
        """Return this process's share of the held-out batches, the same every time."""
        return self._loader(self._holdout_plans)

    def _loader(self, plans: list[BatchPlan]) -> BatchLoader:
        trainer = self.trainer
        if trainer is not None and trainer.world_size > 1:
            plans = of_rank(plans, trainer.global_rank, trainer.world_size)
        return BatchLoader(self.reader, plans, lengths=self._lengths, columns=self._columns)


def _run_plans(
    config: TrainConfig,
    lengths: npt.NDArray[np.int64],
    units: npt.NDArray[np.int64],
    sequences: npt.NDArray[np.int64],
    shape: BatchShape,
) -> list[BatchPlan]:
    plans: list[BatchPlan] = []
    epoch = 0
    # Of millions of small lists the collector would look through all, again and again, and find nothing.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        while len(plans) < config.max_steps if config.max_steps else epoch < config.epochs:
            order = shuffled(units[sequences], config.shuffle_parts, config.seed, epoch)
            plans += plan_epoch(lengths, shape, sequences[order])
            epoch += 1
    finally:
        if was_enabled:
            gc.enable()
    return plans[: config.max_steps]
