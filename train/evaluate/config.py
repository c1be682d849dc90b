"""Settings of ``specx evaluate``."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ...config import Option, RunConfig

EngineName = Literal["vllm", "transformers", "server"]


class PromptSettings(RunConfig):
    """Which prompts are decoded, and how conversations are rendered."""

    panel: ClassVar[str] = "Prompts"

    split: Literal["holdout", "all"] = "holdout"
    """Which sequences of --store to use."""
    holdout_fraction: float = Field(default=0.02, gt=0, lt=1)
    """Held-out share of --store; that of the run that trained the draft."""
    limit: int | None = Field(default=None, ge=1)
    """Number of prompts to take, over all data together. All by default."""
    reasoning_effort: str | None = None
    """Reasoning effort in rendered prompts. By default the chat template's own."""
    date: Annotated[str | None, Field(pattern=r"^\d{4}-\d\d-\d\d$"), Option(metavar="YYYY-MM-DD")] = None
    """Date in rendered prompts. By default the chat template's own, or today."""


class DecodingSettings(RunConfig):
    """How prompts are decoded."""

    panel: ClassVar[str] = "Decoding"

    num_speculative_tokens: int = Field(default=3, ge=1)
    """Tokens drafted per verification. A server has its own number."""
    batch_sizes: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Option(name="batch-size")] = ()
    """Conversations decoded at a time; each size is measured separately. May be repeated. By default 1 for
    transformers, 64 for other engines."""
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Tokens generated per turn."""


class DecodingEngineSettings(RunConfig):
    """What decodes."""

    panel: ClassVar[str] = "Engine"

    engine: EngineName = "vllm"
    """What decodes: vllm, our own loop in transformers, or a running server."""
    url: str | None = None
    """Address of a server that drafts, for --engine server."""
    baseline_url: str | None = None
    """Address of a server of the same target without a draft. By default there is no comparison."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type both models run in; auto is the target's, and float32 on a CPU, where bfloat16 decides near-ties by
    chance."""


class EvaluateConfig(PromptSettings, DecodingSettings, DecodingEngineSettings):
    """What to decode, with what."""

    panel: ClassVar[str] = "Input and output"

    draft: str
    """Directory that `specx export` wrote."""
    target: str | None = None
    """Local directory or hub id of the target; --engine server reads only its config and tokenizer. Without it,
    acceptance is estimated from --store."""
    data: tuple[str, ...] = ()
    """Parquet or JSON-lines file of token ids, conversations, prompts or MT-Bench questions. May be repeated."""
    store: str | None = None
    """Feature store whose sequences are the prompts, or the basis of the estimate."""
    out: str | None = None
    """Directory of the results; rerunning into it does what is missing."""

    @model_validator(mode="after")
    def _require_consistent(self) -> Self:
        if not self.data and self.store is None:
            raise ValueError("no prompts; give --data or --store")
        if self.target is None and self.store is None:
            raise ValueError("no target; give --target, or --store for an estimate without an engine")
        if self.target is None and self.data:
            raise ValueError("--data needs an engine, and that --target; an estimate takes --store alone")
        if self.target is None and self.temperature:
            raise ValueError("an estimate is of greedy decoding; of sampling it tells text_acceptance_length")
        if (self.engine == "server") != (self.url is not None):
            raise ValueError("--engine server and --url go together")
        if self.baseline_url is not None and self.engine != "server":
            raise ValueError("--baseline-url is for --engine server")
        if self.engine == "transformers" and set(self.batch_sizes) - {1}:
            raise ValueError("--engine transformers decodes one at a time; leave --batch-size out, or use vllm")
        if len(set(self.batch_sizes)) != len(self.batch_sizes):
            raise ValueError(f"--batch-size is given twice with the same value, found {list(self.batch_sizes)}")
        return self

    @property
    def measured_batch_sizes(self) -> tuple[int, ...]:
        """Batch sizes that are measured."""
        return self.batch_sizes or ((1,) if self.engine == "transformers" else (64,))
