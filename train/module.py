"""The training step, in Lightning's terms.

Shapes: B rows, T tokens, H hidden size, V target vocabulary, Vd draft vocabulary.
"""

import time
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from .batch import Batch
from .config import TrainConfig
from .eagle1 import Eagle1Draft, evaluate_eagle1
from .exported import new_draft
from .noise import with_uniform_noise
from .objective import StepCounts, Vocabulary, evaluate_steps, metrics, total_loss
from .spec import DraftSpec


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
        self.draft = new_draft(spec)
        self.vocabulary = vocabulary
        # The target's and frozen: in the store, not in the checkpoints.
        self.register_buffer("embed_tokens", embed_tokens, persistent=False)
        self.tokens_trained = 0
        self.seconds_trained = 0.0
        """Over all sessions of the run."""
        self.session_seconds = 0.0
        """Since this process started or resumed."""
        self.last_metrics: dict[str, float] = {}
        self._validation: list[StepCounts] | None = None
        self._clock = 0.0

    def forward(self, batch: Batch) -> list[StepCounts]:
        """Unroll the draft over a batch and compare each step with the target."""
        dtype = self.draft.fc.weight.dtype
        embedded = self.draft.embed(batch.input_ids, self.embed_tokens).to(dtype)
        if isinstance(self.draft, Eagle1Draft):
            assert batch.last_hidden is not None
            return evaluate_eagle1(
                self.draft,
                embedded,
                self._noisy(batch.last_hidden.to(dtype), batch),
                batch,
                self.vocabulary,
                logit_loss_weight=self._config.logit_loss_weight,
            )
        aux_hidden = self._noisy(batch.aux_hidden.to(dtype), batch)
        outputs = self.draft.unroll(embedded, aux_hidden, batch.positions, batch.documents, self._config.ttt_steps)
        return evaluate_steps(self.draft.lm_head, outputs, batch, self.vocabulary)

    def on_train_start(self) -> None:
        """Start the clock."""
        self._clock = time.monotonic()

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Return the loss of one batch."""
        counts = self(batch)
        loss = total_loss(counts, self._config.step_decay)
        self.tokens_trained += batch.num_tokens
        step = self.global_step + 1
        if step % self._config.log_every == 0 or step == self._steps:
            self._log("train", metrics(counts) | {"loss": loss.item()}, batch)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Advance the clock, validation left out."""
        now = time.monotonic()
        self.seconds_trained += now - self._clock
        self.session_seconds += now - self._clock
        self._clock = now

    def on_validation_start(self) -> None:
        """Forget the last validation."""
        self._validation = None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one held-out batch."""
        counts = self(batch)
        if self._validation is None:
            self._validation = counts
        else:
            for total, step in zip(self._validation, counts, strict=True):
                total.add(step)

    def on_validation_end(self) -> None:
        """Log what the held-out sequences gave; the clock does not count the time."""
        assert self._validation is not None
        loss = total_loss(self._validation, self._config.step_decay).item()
        values = metrics(self._validation) | {"loss": loss}
        self.last_metrics = values
        named = {f"val/{name}": value for name, value in values.items()}
        for logger in self.loggers:
            logger.log_metrics(named, step=self.global_step)
        self._clock = time.monotonic()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW with linear warm-up and a cosine."""
        config = self._config
        optimizer = torch.optim.AdamW(
            self.draft.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        schedule = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer,
            num_warmup_steps=round(config.warmup_fraction * self._steps),
            num_training_steps=self._steps,
            min_lr_rate=config.final_lr_fraction,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the angles as trained, which the export compares, and the run's totals."""
        rotary = self.draft.rotary
        checkpoint["rope"] = {
            "inv_freq": rotary.inv_freq.cpu(),
            "attention_scaling": float(rotary.attention_scaling),
        }
        checkpoint["totals"] = {
            "tokens": self.tokens_trained,
            "seconds": self.seconds_trained,
            "metrics": self.last_metrics,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting."""
        self.tokens_trained = checkpoint["totals"]["tokens"]
        self.seconds_trained = checkpoint["totals"]["seconds"]
        self.last_metrics = checkpoint["totals"]["metrics"]

    def _noisy(self, features: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Put the step's noise on ``features``, the same whether the run was resumed or not."""
        if not (self.training and self._config.feature_noise):
            return features
        generator = torch.Generator(self.device)
        seed = (self._config.seed * 1_000_003 + self.global_step) * 4096 + self.global_rank
        return with_uniform_noise(features, batch, self._config.feature_noise, generator.manual_seed(seed))

    def _log(self, stage: str, values: dict[str, float], batch: Batch) -> None:
        self.last_metrics = values
        self.log("loss", values["loss"], prog_bar=True, logger=False, batch_size=len(batch.input_ids))
        rate = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        named = {f"{stage}/{name}": value for name, value in values.items()} | {"lr": rate}
        for logger in self.loggers:
            logger.log_metrics(named, step=self.global_step + 1)
