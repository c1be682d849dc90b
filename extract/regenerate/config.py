"""Settings of ``specx regenerate``."""

from typing import Any, Literal

from pydantic import Field, field_validator

from ...config import RunConfig
from ..config import as_day

Effort = Literal["low", "medium", "high"]


class RegenerateConfig(RunConfig):
    """Which prompts the target answers, and how it samples."""

    target: str
    """Local directory or hub id of the target."""
    data: tuple[str, ...] = Field(min_length=1)
    """Files, directories, patterns or splits of prompts; see ``sources``."""
    out: str
    """Parquet file to write, or to add to."""
    limit: int | None = Field(default=None, ge=1)
    """Rows to read of all data together; None is all."""
    messages_column: str | None = None
    """Column of the conversations; None is ``conversations`` or ``messages``."""
    category_column: str | None = None
    """None is ``category``, which rows may lack."""
    reasoning_effort: Effort | None = None
    """Of rows that name none; None is the chat template's own."""
    date: str | None = None
    """Day in the prompt, YYYY-MM-DD, of rows that name none; None is the day on which the file was begun."""
    temperature: float | None = Field(default=None, ge=0)
    """0 is greedy; None is the target's own, or 1."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """None is the target's own, or 1."""
    top_k: int | None = Field(default=None, ge=0)
    """0 is all; None is the target's own, or 0."""
    max_new_tokens: int = Field(default=4096, ge=1)
    """Longest answer; one that is cut off gets no end token."""
    max_length: int | None = Field(default=None, ge=2)
    """Longest prompt and answer together; None is the target's own ``max_position_embeddings``."""
    seed: int = 0
    """Of vLLM's sampling as a whole. Answers also depend on what is run together."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type the target runs in; auto is its checkpoint's."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs that share each layer."""
    pipeline_parallel: int = Field(default=1, ge=1)
    """Groups of GPUs, each with some of the layers."""
    expert_parallel: bool = False
    """Whether the GPUs of ``tensor_parallel`` hold whole experts instead of a slice of each."""
    engine_options: dict[str, Any] = Field(default_factory=dict)
    """More of vLLM's own engine arguments, by name."""
    answers_per_piece: int = Field(default=256, ge=1)
    """Answers made durable at once, and what a killed run loses at most, beside those in progress."""

    _day = field_validator("date", mode="before")(as_day)

    @field_validator("out")
    @classmethod
    def _file(cls, value: str) -> str:
        if not value.endswith(".parquet") or "://" in value:
            raise ValueError(f"must be a local file that ends in .parquet, got {value}")
        return value
