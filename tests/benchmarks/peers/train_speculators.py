"""speculators' training command on a CPU, which its trainer does not know of."""

from typing import Any

import speculators.train.cli as cli
import speculators.train.trainer as trainer
from speculators.__main__ import app

__all__ = ["app"]


class CpuTrainer(trainer.Trainer):
    def setup_trainer(self) -> None:
        self.local_rank, self.device_type = "cpu", "cpu"
        super().setup_trainer()


class NoTimer(trainer._StepTimer):
    """Its profile of a step waits for the GPU."""

    def reset(self, enabled: Any) -> None:
        super().reset(enabled=False)


cli.Trainer = CpuTrainer
trainer._StepTimer = NoTimer
