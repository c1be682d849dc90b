"""Settings of ``specx evaluate``."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ...config import RunConfig

EngineName = Literal["vllm", "transformers", "server"]


class EvaluateConfig(RunConfig):
    """What to decode, with what."""

    draft: str
    """Directory that ``specx export`` wrote."""
    target: str | None = None
    """Local directory of the target, of which ``--engine server`` reads config and tokenizer only; None is no decoding
    but an estimate from ``store``."""
    data: tuple[str, ...] = ()
    """Parquet or JSON-lines files: rows of token ids, conversations, prompts, or questions in turns."""
    store: str | None = None
    """Feature store whose sequences are the prompts, or what the estimate is made from."""
    split: Literal["holdout", "all"] = "holdout"
    """Which sequences of the store."""
    holdout_fraction: float = Field(default=0.02, gt=0, lt=1)
    """Share of the store that is held out; that of the run which trained the draft."""
    engine: EngineName = "vllm"
    """Who decodes."""
    url: str | None = None
    """Address of a server that drafts, for ``--engine server``."""
    baseline_url: str | None = None
    """Address of one of the same target that does not; None is no comparison."""
    num_speculative_tokens: int = Field(default=3, ge=1)
    """Tokens drafted per verification. A server has a number of its own."""
    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Conversations decoded at a time, each measured on its own; none is 1 for transformers, 64 for others."""
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Tokens generated per turn."""
    limit: int | None = Field(default=None, ge=1)
    """Prompts to take of all data together; None is all."""
    reasoning_effort: str | None = None
    """Effort in rendered prompts; None is the chat template's own."""
    date: str | None = Field(default=None, pattern=r"^\d{4}-\d\d-\d\d$")
    """YYYY-MM-DD in rendered prompts; None is the chat template's own, or today."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto is float32 on a CPU, where bfloat16 decides near-ties by chance, and the target's elsewhere."""
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
