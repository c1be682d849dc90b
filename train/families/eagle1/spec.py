"""What an EAGLE-1 draft is: the target's sizes alone."""

from typing import Any, Literal

from pydantic import model_validator

from ..spec import DraftSpec

_FORMER_KEYS = (
    "norm_output",
    "fc_norm",
    "norm_before_fc",
    "norm_before_residual",
    "sliding_window",
    "trained_embeddings",
)
"""Written by runs of version 0.1.0, always off."""


class Eagle1Spec(DraftSpec):
    """A draft of one decoder layer that reads the last hidden state; it has the full vocabulary."""

    method: Literal["eagle1"] = "eagle1"

    @model_validator(mode="before")
    @classmethod
    def _without_former_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if key not in _FORMER_KEYS or value}
