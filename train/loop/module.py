"""The training step, in Lightning's terms.

Shapes: B rows, T tokens, H hidden size, V target vocabulary, Vd draft vocabulary.
"""

import dataclasses
import math
import time
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.distributed.fsdp import FullyShardedDataParallel

from ..config import TrainConfig
from ..data.batch import PADDING, Batch
from ..data.datamodule import FeatureData
from ..errors import NotFiniteError
from ..families.base import DraftModel, StepContext
from ..families.registry import family
from ..families.spec import DraftSpec
from ..loss.metrics import StepCounts, metrics, total_loss
from ..loss.target_distribution import Vocabulary
from .checkpoint import rewind


class DraftModule(LightningModule):
    """A draft, its optimizer and its metrics."""

    embed_tokens: torch.Tensor

    def __init__(
        self,
        config: TrainConfig,
        spec: DraftSpec,
        vocabulary: Vocabulary,
        embed_tokens: torch.Tensor,
        steps: int,
    ) -> None:
        """``embed_tokens`` (V, H) are the target's; ``steps`` is the length of the run."""
        super().__init__()
        self._config = config
        self._steps = steps
        self._family = family(spec.method)
        self._loss_weights = self._family.loss_weights(config.draft)
        self.draft: DraftModel = self._family.build(spec)
        self.vocabulary = vocabulary
        # The target's and frozen: in the store, not in the checkpoints.
        self.register_buffer("embed_tokens", embed_tokens, persistent=False)
        self.tokens_trained = 0
        self.seconds_trained = 0.0
        """Over all sessions of the run."""
        self.session_seconds = 0.0
        """Since this process started or resumed."""
        self.last_metrics: dict[str, float] = {}
        self.last_loss = 0.0
        """Of the last optimizer step."""
        self.validated_step: int | None = None
        """The step whose weights ``last_metrics`` are of, if they are the held-out split's."""
        self._validation: list[StepCounts] | None = None
        self._step = _StepSums()
        self._clock = 0.0
        self._last_pace = _Pace()

    def forward(
        self, batch: Batch, labels: torch.Tensor | None = None, *, with_metrics: bool = True
    ) -> tuple[torch.Tensor, list[StepCounts] | None]:
        """Compare what the draft predicts over a batch with the target; return the loss and each step's sums.

        ``labels`` (K,) are those of the whole optimizer step, if it has other batches; without ``with_metrics`` there
        may be no sums.
        """
        device = batch.input_ids.device.type
        context = StepContext(
            embed_tokens=self.embed_tokens,
            vocabulary=self.vocabulary,
            dtype=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32,
            labels=labels,
            with_metrics=with_metrics,
        )
        return self._family.step(self.draft, batch, self._config.draft, context)

    @property
    def batches_per_step(self) -> int:
        """Batches of an optimizer step, of all processes together."""
        return self.trainer.accumulate_grad_batches * self.trainer.world_size

    def on_train_start(self) -> None:
        """Start the clock."""
        self._step = _StepSums()
        self._clock = time.monotonic()
        self._last_pace = self._pace()

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Return what a batch adds to the loss of its optimizer step."""
        sums = self._step
        if sums.batches == 0 and batch.window_labels is not None:
            sums.labels = self._summed(batch.window_labels)
        loss, counts = self.forward(batch, sums.labels, with_metrics=self._is_logged)
        sums.add(loss.detach(), batch, counts if self._is_logged else None)
        # Lightning divides by the accumulated batches, and DDP by the processes.
        return loss if self.batches_per_step == 1 else loss * self.batches_per_step

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient of a whole optimizer step, and sum the step up; the weights are as they were before it.

        Raises NotFiniteError, in every process, if loss or gradient are not finite.
        """
        sums = self._step
        clipped = self._clip(self._config.gradient_clip).float()
        loss, tokens, norm = self._summed(torch.stack((sums.loss, sums.tokens, clipped))).tolist()
        norm /= self.trainer.world_size
        rate = optimizer.param_groups[0]["lr"]
        if not math.isfinite(loss) or not math.isfinite(norm):
            step = self.global_step + 1
            what = f"loss {loss} and gradient norm {norm} at step {step}, at a learning rate of {rate:.3g}"
            raise NotFiniteError(what, step=step)
        self.tokens_trained += int(tokens)
        self.last_loss = loss
        if self._is_logged:
            values = metrics(self._summed_counts(sums.counts)) | {"loss": loss}
            self.last_metrics = values
            named = {f"train/{name}": value for name, value in values.items()}
            pace = self._pace()
            self._log(named | {"lr": rate, "gradient_norm": norm} | pace.since(self._last_pace))
            self._last_pace = pace

    @property
    def _is_logged(self) -> bool:
        step = self.global_step + 1
        return step % self._config.log_every == 0 or step == self._steps

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Advance the clock, validation left out."""
        if self._step.batches == self.trainer.accumulate_grad_batches:
            self._step = _StepSums()
            self.log("loss", self.last_loss, prog_bar=True, logger=False, batch_size=1)
        now = time.monotonic()
        self.seconds_trained += now - self._clock
        self.session_seconds += now - self._clock
        self._clock = now

    def on_validation_start(self) -> None:
        """Forget the last validation."""
        self._validation = None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one held-out batch."""
        _, counts = self(batch)
        if self._validation is None:
            self._validation = counts
        else:
            for total, step in zip(self._validation, counts, strict=True):
                total.add(step)

    def on_validation_epoch_end(self) -> None:
        """Log what the held-out sequences gave."""
        assert self._validation is not None
        counts = self._summed_counts(self._validation)
        loss = total_loss(counts, self._loss_weights).item()
        if not math.isfinite(loss):
            what = f"loss {loss} of the held-out sequences behind step {self.global_step}"
            raise NotFiniteError(what, step=self.global_step, is_held_out=True)
        values = metrics(counts) | {"loss": loss}
        self.last_metrics = values
        self.validated_step = self.global_step
        named = {f"val/{name}": value for name, value in values.items()}
        for logger in self.loggers:
            logger.log_metrics(named, step=self.global_step)

    def on_validation_end(self) -> None:
        """Leave the time since the last step out."""
        self._clock = time.monotonic()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW with linear warm-up and a cosine."""
        config = self._config
        optimizer = torch.optim.AdamW(
            self.draft.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate_fraction)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate_fraction(self, step: int) -> float:
        """Return the share of the learning rate that a step has (cosine: SGDR, arXiv 1608.03983, section 3)."""
        warm_up = round(self._config.warmup_fraction * self._steps)
        if step < warm_up:
            return step / warm_up
        progress = (step - warm_up) / max(1, self._steps - warm_up)
        lowest = self._config.final_lr_fraction
        return lowest + (1 - lowest) * (1 + math.cos(math.pi * progress)) / 2

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the angles as trained, which the export compares, and the run's totals."""
        rotary = self.draft.rotary
        checkpoint["rope"] = {} if rotary is None else rotary.angles()
        checkpoint["totals"] = {
            "tokens": self.tokens_trained,
            "seconds": self.seconds_trained,
            "metrics": self.last_metrics,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting, also where an optimizer step now has another number of batches in each process."""
        self.tokens_trained = checkpoint["totals"]["tokens"]
        self.seconds_trained = checkpoint["totals"]["seconds"]
        self.last_metrics = checkpoint["totals"]["metrics"]
        rewind(checkpoint, self.trainer.accumulate_grad_batches)

    def _clip(self, largest: float) -> torch.Tensor:
        """Scale the gradient down to a norm of at most ``largest``; return its norm before."""
        model = self.trainer.strategy.model
        if isinstance(model, FullyShardedDataParallel):
            return model.clip_grad_norm_(largest)
        return torch.nn.utils.clip_grad_norm_(self.parameters(), largest)

    def _pace(self) -> "_Pace":
        """Return how far this session is; time of validation is left out."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        return _Pace(
            tokens=self.tokens_trained,
            seconds=self.session_seconds + time.monotonic() - self._clock,
            wait_s=data.loader.wait_s if isinstance(data, FeatureData) and data.loader is not None else 0.0,
        )

    def _summed(self, values: torch.Tensor) -> torch.Tensor:
        """Add up a tensor over all processes."""
        if self.trainer.world_size == 1:
            return values
        total = self.trainer.strategy.reduce(values.clone(), reduce_op="sum")
        assert isinstance(total, torch.Tensor)
        return total

    def _summed_counts(self, counts: list[StepCounts]) -> list[StepCounts]:
        if self.trainer.world_size == 1:
            return counts
        names = StepCounts.__slots__
        total = self._summed(torch.stack([torch.stack([getattr(step, name) for name in names]) for step in counts]))
        return [StepCounts(**dict(zip(names, row.unbind(), strict=True))) for row in total]

    def _log(self, named: dict[str, float]) -> None:
        for logger in self.loggers:
            logger.log_metrics(named, step=self.global_step + 1)


@dataclasses.dataclass(frozen=True, slots=True)
class _Pace:
    """What a session has done at one moment."""

    tokens: int = 0
    seconds: float = 0.0
    wait_s: float = 0.0
    """For batches, in this process."""

    def since(self, before: "_Pace") -> dict[str, float]:
        """Return the speed since an earlier moment."""
        seconds = max(self.seconds - before.seconds, 1e-9)
        return {
            "tokens_per_s": (self.tokens - before.tokens) / seconds,
            "data_wait_fraction": (self.wait_s - before.wait_s) / seconds,
        }


class _StepSums:
    """Sums over those batches of an optimizer step that this process has trained on so far."""

    def __init__(self) -> None:
        self.batches = 0
        self.labels: torch.Tensor | None = None
        """(K,) of all batches of all processes; None where the step has one batch"""
        self.loss = torch.zeros(())
        self.tokens = torch.zeros(())
        self.counts: list[StepCounts] = []

    def add(self, loss: torch.Tensor, batch: Batch, counts: list[StepCounts] | None) -> None:
        """Add a batch; ``counts`` only where they are logged."""
        self.batches += 1
        # Left on the device: looking at a number waits for all that comes before it.
        self.loss = self.loss.to(loss.device) + loss
        self.tokens = self.tokens.to(loss.device) + (batch.documents != PADDING).sum()
        if counts is None:
            return
        for step in counts:
            step.loss = step.loss.detach()
        if not self.counts:
            self.counts = counts
            return
        for total, step in zip(self.counts, counts, strict=True):
            total.add(step)
