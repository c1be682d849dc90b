"""What happens around the steps: ^C, plain progress lines."""

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from .checkpoint import save_checkpoint

_LINE_EVERY_S = 10.0

_log = logging.getLogger(__name__)


class StopOnInterrupt(Callback):
    """Turns the first ^C into a checkpoint behind the step in progress, and a stop."""

    def __init__(self, checkpoint: Path) -> None:
        self.is_interrupted = False
        self._checkpoint = checkpoint

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Watch for ^C while the block runs; a second one is not held back."""
        previous = signal.getsignal(signal.SIGINT)

        def note(number: int, frame: FrameType | None) -> None:
            self.is_interrupted = True
            signal.signal(signal.SIGINT, previous)

        signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop if ^C was pressed."""
        if self.is_interrupted:
            # Here and not when the loop has ended: that would count as the end of the run.
            save_checkpoint(trainer, self._checkpoint)
            trainer.should_stop = True


class ProgressLines(Callback):
    """A line of progress now and then, where there is no terminal for a bar."""

    def __init__(self) -> None:
        self._last_line = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the step and its loss."""
        now = time.monotonic()
        if now - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            _log.info("step %d of %d: loss %.4f", trainer.global_step, trainer.max_steps, outputs["loss"].item())
