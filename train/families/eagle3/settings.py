"""Settings and presets of EAGLE-3. No torch."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from ...loss.names import LossName
from ..settings import FamilyEntry, FamilySettings


class Eagle3Settings(FamilySettings):
    """EAGLE-3 (arXiv 2503.01840), and EAGLE 3.1 by its switches."""

    method: Literal["eagle3"] = "eagle3"
    """Draft family to train; by default that of --preset, or eagle3."""
    boundaries: tuple[int, ...] | None = None
    """Boundaries that the draft reads, such as 2,12,21; by default all that the store has."""
    draft_vocab_size: int = Field(default=32_000, ge=1)
    """Tokens that the draft can propose, the most frequent ones; at most the target's vocabulary."""
    ttt_steps: int = Field(default=4, ge=1)
    """Unrolled (test-time training) steps, K."""
    step_decay: float = Field(default=0.8, gt=0, le=1)
    """Weight of step k is the k-th power of this, normalized over the steps."""
    step_weights: tuple[float, ...] | None = None
    """Weights of the steps one by one instead of --step-decay; normalized to a sum of 1."""
    loss: LossName = "cross_entropy"
    """Loss of the draft's distribution against the target's; docs/drafts.md has the formulas."""
    norm_output: bool = True
    """Feed the normed hidden state back into the next step instead of the residual stream."""
    fc_norm: bool = True
    """Norm each auxiliary hidden state before they are fused."""
    norm_before_fc: bool = False
    """Norm all auxiliary hidden states as one vector before they are fused, instead of --fc-norm."""
    norm_before_residual: bool = False
    """Start the residual stream from the normed hidden state; served by vLLM only."""
    sliding_window: int | None = Field(default=None, ge=2)
    """Sliding attention window, in tokens; by default attention is full."""
    train_embeddings: bool = False
    """Train embeddings too, starting from the target's; served by vLLM only."""
    feature_noise: float = Field(default=0.0, ge=0)
    """Half-width a of uniform noise on the input features: U(-a, a) * 512 / T in a sequence of T tokens."""

    @field_validator("boundaries")
    @classmethod
    def _ascending(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and (not value or list(value) != sorted(set(value))):
            raise ValueError(f"must be strictly increasing, got {','.join(map(str, value))}")
        return value

    @model_validator(mode="after")
    def _one_recipe(self) -> Self:
        if self.fc_norm and self.norm_before_fc:
            raise ValueError("fc_norm and norm_before_fc exclude each other; turn one off")
        if self.sliding_window is not None and self.sliding_window <= self.ttt_steps:
            raise ValueError(
                f"sliding_window {self.sliding_window} must be above ttt_steps {self.ttt_steps}: "
                "a step reads all the steps before it"
            )
        if self.step_weights is not None and (
            len(self.step_weights) != self.ttt_steps or min(self.step_weights) < 0 or not sum(self.step_weights)
        ):
            raise ValueError(f"step_weights {self.step_weights} must be {self.ttt_steps} numbers from 0, not all 0")
        return self


EAGLE3 = FamilyEntry(
    settings=Eagle3Settings,
    presets={
        # arXiv 2503.01840 and its training code: the residual stream is fed back, no norm before fc.
        "eagle3": {"norm_output": False, "fc_norm": False, "ttt_steps": 7, "lr": 5e-5, "gradient_clip": 0.5},
        # arXiv 2605.09992 (EAGLE 3.1): the normed state is fed back, each auxiliary state is normed.
        "specdrift": {
            "norm_output": True,
            "fc_norm": True,
            "ttt_steps": 4,
            "lr": 1e-4,
            "warmup_fraction": 0.2,
            "epochs": 2,
            "max_length": 4096,
            "step_tokens": 16 * 4096,
        },
    },
    implementation="specx.train.families.eagle3.family:FAMILY",
)
