"""What every judge is asked to do."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .prompts import Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodingTask:
    """Decode some prompts with a draft, and without."""

    target: Path
    draft: Path
    prompts: list[Prompt]
    num_speculative_tokens: int
    """Tokens drafted per verification."""
    max_new_tokens: int
    """Tokens generated per prompt."""
    stop_ids: frozenset[int]
    """Token ids that end a generation."""
    temperature: float
    """0 is greedy."""
    dtype: Literal["auto", "float32", "bfloat16"]
    """Type to run both models in; auto is the target's."""
