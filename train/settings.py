"""Settings of a training run by subject, without those of the draft. No torch."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from ..config import Option, RunConfig


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str | int | float) else value


class DataSettings(RunConfig):
    """Which sequences are trained on, and in which batches."""

    panel: ClassVar[str] = "Data"

    store: Annotated[tuple[str, ...], BeforeValidator(_several), Field(min_length=1)]
    """Feature store to train from, or several of one target."""
    weights: Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_several), Option(name="weight")] = ()
    """Passes over each store in an epoch, in the order of --store; a fraction is a share of it. By default 1 each."""
    view: Annotated[tuple[str, ...], BeforeValidator(_several)] = ()
    """View, or Parquet file like one: train on its sequences only, with its masks. By default all of the store."""
    max_length: int | None = Field(default=None, ge=4)
    """Cut longer sequences to this many tokens; by default none is cut."""
    holdout_fraction: float = Field(default=0.02, ge=0, lt=1)
    """Share of the sequences, chosen by their hash, that is validated on and never trained on."""
    epochs: int = Field(default=2, ge=1)
    """Passes over the data, unless --max-steps is given."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; by default as many as the epochs give."""
    step_tokens: int = Field(default=16_384, ge=1)
    """Tokens of an optimizer step, on all devices together; a longer sequence is a step of its own."""
    batch_tokens: int = Field(default=16_384, ge=1)
    """Tokens that fit on a device at a time: steps are split into batches of at most this many."""
    shuffle_parts: int | None = Field(default=256, ge=1)
    """Parts of the store whose sequences are mixed at a time; from S3, as many are on the local disk."""
    cache_bytes: int | None = Field(default=None, ge=1)
    """Disk space for parts fetched from S3; by default what is free at TMPDIR."""
    seed: int = 0
    """Seed of the data's order and of the draft's first weights."""


class OptimizerSettings(RunConfig):
    """AdamW and its schedule."""

    panel: ClassVar[str] = "Optimizer"

    lr: float = Field(default=1e-4, gt=0)
    """Peak learning rate of AdamW."""
    warmup_fraction: float = Field(default=0.02, ge=0, lt=1)
    """Share of the steps in which the learning rate rises linearly; it then falls along a cosine."""
    final_lr_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of the peak that is left at the last step."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Betas of AdamW."""
    gradient_clip: float = Field(default=0.5, gt=0)
    """Largest global gradient norm."""


class LoopSettings(RunConfig):
    """How a run is carried out: devices, checkpoints, logs."""

    panel: ClassVar[str] = "Run"

    out: str
    """Directory of the run: checkpoints, logs, result. Rerunning into it resumes."""
    devices: int = Field(default=1, ge=1)
    """Processes that share every step: a GPU each, or on the CPU."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """Lightning's strategy: auto is ddp on several devices; fsdp also shards weights and optimizer, on GPUs only."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """Precision: auto is bf16-mixed on CUDA and 32-true elsewhere."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between checkpoints: what a killed run repeats at most."""
    validate_every: int = Field(default=500, ge=1)
    """Steps between validations."""
    early_stopping: int | None = Field(default=None, ge=1)
    """Early-stopping patience, in validations; by default a run goes to its end."""
    loggers: Annotated[
        tuple[Literal["tensorboard", "csv", "wandb", "mlflow"], ...], BeforeValidator(_several), Option(name="logger")
    ] = ("tensorboard", "csv")
    """Where the curves go: files below logs/ of the run, or the server of wandb or MLflow."""
    log_every: int = Field(default=10, ge=1)
    """Steps between entries of the logs."""
