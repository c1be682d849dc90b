"""Settings of ``specx regenerate``."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from ...config import Option, RunConfig
from ..config import EngineSettings, RowSettings, as_day

Effort = Literal["low", "medium", "high"]


class AnswerPromptSettings(RunConfig):
    """What the chat template puts into the prompt that the target answers."""

    panel: ClassVar[str] = "Prompt"

    reasoning_effort: Effort | None = None
    """Reasoning effort of rows that name none. By default the chat template's own."""
    date: Annotated[str | None, Option(metavar="YYYY-MM-DD")] = None
    """Date in the prompt of rows that name none. By default the day on which the file was started."""

    _day = field_validator("date", mode="before")(as_day)


class SamplingSettings(RunConfig):
    """How the target samples, and how long its answers may be."""

    panel: ClassVar[str] = "Sampling"

    temperature: float | None = Field(default=None, ge=0)
    """Sampling temperature; 0 is greedy. By default the target's own, or 1."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Nucleus sampling. By default the target's own, or 1."""
    top_k: int | None = Field(default=None, ge=0)
    """Sample from the k most likely tokens; 0 is all. By default the target's own, or 0."""
    max_new_tokens: int = Field(default=4096, ge=1)
    """Longest answer; one that is cut off gets no end token."""
    max_length: int | None = Field(default=None, ge=2)
    """Longest prompt and answer together. By default the target's `max_position_embeddings`."""
    seed: int = 0
    """Seed of vLLM's sampling. Answers also depend on which of them are batched together."""


class RegenerateConfig(RowSettings, AnswerPromptSettings, SamplingSettings, EngineSettings):
    """Which prompts the target answers, and how it samples."""

    panel: ClassVar[str] = "Input and output"

    target: str
    """Local directory or hub id of the target."""
    data: tuple[str, ...] = Field(min_length=1)
    """Conversations to answer, in any form that `specx extract --data` takes. A last answer in them is left out.
    May be repeated."""
    out: str
    """Parquet file to create or extend."""
    answers_per_piece: int = Field(default=256, ge=1)
    """Answers saved at once: a killed run loses at most these, and those in progress."""

    @field_validator("out")
    @classmethod
    def _file(cls, value: str) -> str:
        if not value.endswith(".parquet") or "://" in value:
            raise ValueError(f"must be a local file that ends in .parquet, got {value}")
        return value
