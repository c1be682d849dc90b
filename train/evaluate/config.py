"""Settings of ``specx evaluate``."""

from typing import Literal

from pydantic import Field

from ...run_file import RunConfig


class EvaluateConfig(RunConfig):
    """What to decode, with what."""

    draft: str
    """Directory that ``specx export`` wrote."""
    target: str
    """Local directory of the target."""
    data: tuple[str, ...] = Field(min_length=1)
    """Parquet or JSON-lines files with ``input_ids`` and ``loss_mask``: the prompt is what comes first."""
    engine: Literal["vllm", "transformers"] = "vllm"
    """Who decodes."""
    num_speculative_tokens: int = Field(default=3, ge=1)
    """Tokens drafted per verification."""
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy, the only one the transformers engine does."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Tokens generated per prompt."""
    limit: int | None = Field(default=None, ge=1)
    """Prompts to take of all data together; None is all."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto is float32 on a CPU, where bfloat16 decides near-ties by chance, and the target's elsewhere."""
