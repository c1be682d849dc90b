"""Settings of ``specx train``."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ..config import Option, RunConfig
from .families.presets import with_preset
from .loss.names import LossName


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str | int | float) else value


class TrainConfig(RunConfig):
    """What to train, on what, and how."""

    store: Annotated[tuple[str, ...], BeforeValidator(_several), Field(min_length=1)]
    """Feature stores of one target to train from; one may be given without a list."""
    weights: Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_several), Option(name="weight")] = ()
    """Passes over each store in an epoch, in the order of ``store``; a fraction is a share of it. Empty: 1 each."""
    out: str
    """Directory of the run: checkpoints, logs, result. Rerunning into it resumes."""
    view: tuple[str, ...] = ()
    """Names of views, or Parquet files like one: their sequences only, with their masks. Empty: all of the store."""
    boundaries: tuple[int, ...] | None = None
    """Boundaries the draft reads, of those in the store; None is all of them."""

    preset: Literal["eagle3", "specdrift", "eagle1"] | None = None
    """Defaults of the settings by the name of a recipe; what is given overrides them."""
    method: Literal["eagle3", "eagle1"] = "eagle3"
    """Kind of draft; eagle1 implies the preset of that name, and is EAGLE-2 where the engine drafts a tree."""
    ttt_steps: int = Field(default=4, ge=1)
    """Unrolled (test-time training) steps, K."""
    step_decay: float = Field(default=0.8, gt=0, le=1)
    """Weight of step k is its k-th power, normalised over the steps (EAGLE-3)."""
    step_weights: tuple[float, ...] | None = None
    """Weights of the steps one by one, in place of ``step_decay``; normalised to a sum of 1."""
    loss: LossName = "cross_entropy"
    """Of the draft's distribution against the target's; docs/drafts.md has the formulas."""
    draft_vocab_size: int = Field(default=32_000, ge=1)
    """Tokens the draft can propose, the most frequent ones; at most the target's vocabulary."""
    intermediate_size: int | None = Field(default=None, ge=1)
    """Of the draft's MLP. None: the target's, or 6 times the hidden size of a Mixture-of-Experts target."""
    norm_output: bool = True
    """Feed the normed hidden state back into the next step, not the residual stream."""
    fc_norm: bool = True
    """Norm each auxiliary hidden state by itself before they are fused."""
    norm_before_fc: bool = False
    """Norm all auxiliary hidden states as one vector before they are fused, instead of ``fc_norm``."""
    norm_before_residual: bool = False
    """The residual stream starts from the normed hidden state; vLLM only."""
    sliding_window: int | None = Field(default=None, ge=2)
    """Tokens that the draft's attention reaches back, its own included; None is all."""
    train_embeddings: bool = False
    """Train embeddings too, from the target's, instead of sharing those; vLLM only."""
    init_from: str | None = None
    """Directory of an exported draft to start from; the draft vocabulary is that draft's."""
    feature_noise: float = Field(default=0.0, ge=0)
    """Half-width a of uniform noise on the input features: U(-a, a) * 512 / T in a sequence of T tokens, as EAGLE-1's
    code does (``AddUniformNoise`` with std 2a). 0 is none."""
    logit_loss_weight: float = Field(default=0.1, ge=0)
    """EAGLE-1: weight of the cross-entropy beside the features' smooth L1."""

    epochs: int = Field(default=2, ge=1)
    """Passes over the data, unless ``max_steps`` is set."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; None is as many as the epochs give."""
    batch_tokens: int = Field(default=16_384, ge=1)
    """Tokens of a batch; at least the longest sequence fits."""
    batches_per_step: int | None = Field(default=None, ge=1)
    """Batches of an optimizer step, of all devices together and a multiple of them; None is one a device."""
    max_length: int | None = Field(default=None, ge=4)
    """Longer sequences are cut to this many tokens; None is the whole sequence."""
    holdout_fraction: float = Field(default=0.02, ge=0, lt=1)
    """Share of the sequences, chosen by their hash, that is validated on and never trained on."""

    lr: float = Field(default=1e-4, gt=0)
    """Peak learning rate of AdamW."""
    warmup_fraction: float = Field(default=0.02, ge=0, lt=1)
    """Share of the steps in which the learning rate rises linearly; it then falls along a cosine."""
    final_lr_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of the peak that is left at the last step."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    gradient_clip: float = Field(default=0.5, gt=0)
    """Largest global gradient norm."""

    shuffle_parts: int | None = Field(default=256, ge=1)
    """Parts of the store whose sequences are mixed at a time; from S3 so many are on the local disk. None is all."""
    cache_bytes: int | None = Field(default=None, ge=1)
    """Room for parts fetched from S3; None is what the disk at ``TMPDIR`` spares."""

    devices: int = Field(default=1, ge=1)
    """Processes that share every step: a GPU each, or on the CPU."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """Lightning's. auto is ddp on several devices; fsdp also shards weights and optimizer, on GPUs only."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """auto is bf16-mixed on CUDA and 32-true elsewhere."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between checkpoints: what a killed run repeats at most."""
    validate_every: int = Field(default=500, ge=1)
    """Steps between validations."""
    early_stopping: int | None = Field(default=None, ge=1)
    """Stop after so many validations in a row without a longer acceptance length; None never does."""
    loggers: Annotated[tuple[Literal["tensorboard", "csv", "wandb", "mlflow"], ...], Option(name="logger")] = (
        "tensorboard",
        "csv",
    )
    """Where the curves go: files below ``logs/`` of the run, or a server that wandb or MLflow was told of."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of the logs."""
    seed: int = 0
    """Of the order of the data and the draft's first weights."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return with_preset(values) if isinstance(values, dict) else values

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
        if self.method == "eagle1":
            self._require_plain()
        return self

    def _require_plain(self) -> None:
        plain = {
            "ttt_steps": 1,
            "boundaries": None,
            "norm_output": False,
            "fc_norm": False,
            "norm_before_fc": False,
            "norm_before_residual": False,
            "sliding_window": None,
            "train_embeddings": False,
        }
        settings = self.model_dump()
        for key, value in plain.items():
            if settings[key] != value:
                raise ValueError(f"{key} is {settings[key]}, but an EAGLE-1 draft has it at {value}; leave it out")

    @field_validator("boundaries")
    @classmethod
    def _ascending(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and (not value or list(value) != sorted(set(value))):
            raise ValueError(f"must be strictly increasing, got {','.join(map(str, value))}")
        return value

    @model_validator(mode="after")
    def _a_weight_a_store(self) -> Self:
        if self.weights and len(self.weights) != len(self.store):
            raise ValueError(f"{len(self.weights)} weights of {len(self.store)} stores; give one a store, or none")
        return self
