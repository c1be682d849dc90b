"""What a draft is: everything that its weights do not say.

A run writes it to ``draft.json``; the export turns it into the ``config.json`` that the engines read.
"""

import json
from pathlib import Path
from typing import Any

from ...storage.schema import Record
from ..rope.rotary import draft_rope
from .settings import FamilySettings
from .targets import TargetRecord


class DraftSpec(Record):
    """A draft of any family; each family's own class narrows ``method`` and adds its keys."""

    method: str
    target_architecture: str
    num_target_layers: int
    boundaries: tuple[int, ...]
    """Auxiliary hidden states that the draft reads, ascending: boundary b is the input of block b. None: ()."""
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    vocab_size: int
    """Of the target."""
    draft_vocab_size: int
    max_position_embeddings: int
    """The target's: an engine stops drafting after the draft's own."""
    rope_parameters: dict[str, Any]
    """As transformers writes them, every default spelled out."""


def target_geometry(target: TargetRecord, settings: FamilySettings) -> dict[str, Any]:
    """Return the keys of a ``DraftSpec`` that come from the target: its sizes and rope.

    Raises TrainError for a rope that no draft can have.
    """
    values, architecture = target.config, target.architecture
    hidden_size, heads = int(values["hidden_size"]), int(values["num_attention_heads"])
    own = 6 * hidden_size if architecture.is_mixture else int(values["intermediate_size"])
    rope = draft_rope(values["rope_parameters"], target.where, has_partial_rotary=architecture.has_partial_rotary)
    return {
        "target_architecture": target.name,
        "num_target_layers": values["num_hidden_layers"],
        "hidden_size": hidden_size,
        "intermediate_size": settings.intermediate_size or own,
        "num_attention_heads": heads,
        "num_key_value_heads": values["num_key_value_heads"],
        "head_dim": values.get("head_dim") or hidden_size // heads,
        "rms_norm_eps": values["rms_norm_eps"],
        "vocab_size": values["vocab_size"],
        "max_position_embeddings": values["max_position_embeddings"],
        "rope_parameters": rope,
    }


def save_spec(spec: DraftSpec, path: Path) -> None:
    """Write ``draft.json``."""
    path.write_text(json.dumps(spec.model_dump(mode="json"), indent=2) + "\n")
