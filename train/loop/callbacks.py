"""What happens around the steps: checkpoints, the best one, early stopping, ^C, plain progress lines."""

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from ..config import TrainConfig
from ..errors import NotFiniteError
from .checkpoint import save_checkpoint
from .module import DraftModule
from .run_directory import RunDirectory

_LINE_EVERY_S = 10.0

_log = logging.getLogger(__name__)


class Checkpoints(Callback):
    """Saves the run now and then, on ^C and before a step that cannot be taken; keeps its best draft; ends it early.

    The best is the one with the longest acceptance length on the held-out split. What is in ``last.ckpt`` includes
    the validation of its step, so that none is left out of a run that was stopped between the two.
    """

    def __init__(self, config: TrainConfig, directory: RunDirectory, validate_every: int | None) -> None:
        """``validate_every`` is in optimizer steps; None if nothing is held out."""
        self._config = config
        self._directory = directory
        self._validate_every = validate_every
        self._is_signalled = False
        self.is_interrupted = False
        """By ^C, and saved"""
        self.is_stopped_early = False
        self.best_step: int | None = None
        self._best_length = 0.0
        self._misses = 0
        """Validations since the best one."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Watch for ^C while the block runs; a second one is not held back."""
        previous = signal.getsignal(signal.SIGINT)

        def note(number: int, frame: FrameType | None) -> None:
            self._is_signalled = True
            signal.signal(signal.SIGINT, previous)

        signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know."""
        return {
            "best_step": self.best_step,
            "best_length": self._best_length,
            "misses": self._misses,
            "is_stopped_early": self.is_stopped_early,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.best_step, self._best_length = state_dict["best_step"], state_dict["best_length"]
        self._misses, self.is_stopped_early = state_dict["misses"], state_dict["is_stopped_early"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End at once where the run had already ended early."""
        trainer.should_stop = self.is_stopped_early

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time to, behind a whole optimizer step that no validation follows."""
        is_whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not is_whole or (self._validate_every and trainer.global_step % self._validate_every == 0):
            return
        self._save(trainer)
        if self.is_interrupted:
            # No validation at a step that has none when the run is not stopped.
            trainer.limit_val_batches = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the draft if it is the best so far, and save if it is time to."""
        assert isinstance(pl_module, DraftModule)
        length = pl_module.last_metrics["acceptance_length"]
        if length > self._best_length:
            self._best_length, self._misses, self.best_step = length, 0, trainer.global_step
            save_checkpoint(trainer, self._directory.best_checkpoint, weights_only=True)
        else:
            self._misses += 1
        if self._config.early_stopping is not None and self._misses >= self._config.early_stopping:
            self.is_stopped_early = trainer.should_stop = True
        if trainer.state.fn == TrainerFn.FITTING:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what was reached before a step that cannot be taken."""
        if isinstance(exception, NotFiniteError) and not exception.is_held_out and trainer.global_step:
            save_checkpoint(trainer, self._directory.checkpoint)

    def _save(self, trainer: Trainer) -> None:
        # Every process must stop at the same step.
        self.is_interrupted = trainer.strategy.reduce_boolean_decision(self._is_signalled, all=False)
        if self.is_interrupted or trainer.global_step % self._config.checkpoint_every == 0:
            # Here and not when the loop has ended: that would count as the end of the run.
            save_checkpoint(trainer, self._directory.checkpoint)
        if self.is_interrupted:
            trainer.should_stop = True


class ProgressLines(Callback):
    """A line of progress now and then, where there is no terminal for a bar."""

    def __init__(self) -> None:
        self._last_line = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the step and its loss."""
        assert isinstance(pl_module, DraftModule)
        now = time.monotonic()
        if now - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            _log.info("step %d of %d: loss %.4f", trainer.global_step, trainer.max_steps, pl_module.last_loss)
