"""Settings of ``specx train``."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ..run_file import RunConfig


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str | int | float) else value


class TrainConfig(RunConfig):
    """What to train, on what, and how."""

    store: Annotated[tuple[str, ...], BeforeValidator(_several), Field(min_length=1)]
    """Feature stores of one target to train from; one may be given without a list."""
    weights: Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_several)] = ()
    """Passes over each store in an epoch, in the order of ``store``; a fraction is a share of it. Empty: 1 each."""
    out: str
    """Directory of the run: checkpoints, logs, result. Rerunning into it resumes."""
    view: tuple[str, ...] = ()
    """Names of views, or Parquet files like one: their sequences only, with their masks. Empty: all of the store."""
    boundaries: tuple[int, ...] | None = None
    """Boundaries the draft reads, of those in the store; None is all of them."""

    ttt_steps: int = Field(default=4, ge=1)
    """Unrolled (test-time training) steps, K."""
    step_decay: float = Field(default=0.8, gt=0, le=1)
    """Weight of step k is its k-th power, normalised over the steps (EAGLE-3)."""
    draft_vocab_size: int = Field(default=32_000, ge=1)
    """Tokens the draft can propose, the most frequent ones; at most the target's vocabulary."""
    intermediate_size: int | None = Field(default=None, ge=1)
    """Of the draft's MLP. None: the target's, or 6 times the hidden size of a Mixture-of-Experts target."""
    norm_output: bool = True
    """Feed the normed hidden state back into the next step, not the residual stream."""
    fc_norm: bool = True
    """Norm each auxiliary hidden state by itself before they are fused."""

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
    loggers: tuple[Literal["tensorboard", "csv", "wandb", "mlflow"], ...] = ("tensorboard", "csv")
    """Where the curves go: files below ``logs/`` of the run, or a server that wandb or MLflow was told of."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of the logs."""
    seed: int = 0
    """Of the order of the data and the draft's first weights."""

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
