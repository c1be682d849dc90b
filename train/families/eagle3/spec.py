"""What an EAGLE-3 draft is beside the target's sizes."""

from typing import Literal

from ..spec import DraftSpec


class Eagle3Spec(DraftSpec):
    """A draft of one decoder layer that reads auxiliary hidden states."""

    method: Literal["eagle3"] = "eagle3"
    norm_output: bool
    fc_norm: bool
    norm_before_fc: bool = False
    norm_before_residual: bool = False
    sliding_window: int | None = None
    trained_embeddings: bool = False
    """The draft has embeddings of its own."""
