"""What a draft is: everything that its weights do not say.

A run writes it to ``draft.json``; the export turns it into the ``config.json``
that the engines read.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ...storage.schema import Record
from ..config import TrainConfig
from ..errors import TrainError
from ..rope.rotary import draft_rope
from .targets import Architecture, architecture_of


class DraftSpec(Record):
    """A draft of one decoder layer."""

    method: Literal["eagle3", "eagle1"] = "eagle3"
    target_architecture: str
    num_target_layers: int
    boundaries: tuple[int, ...]
    """Block b's input is boundary b; ascending. EAGLE-1 reads none of them, but the last hidden state."""
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
    """The target's: an engine stops drafting behind the draft's own."""
    rope_parameters: dict[str, Any]
    """As transformers writes them, every default spelled out."""
    norm_output: bool
    fc_norm: bool
    norm_before_fc: bool = False
    norm_before_residual: bool = False
    sliding_window: int | None = None
    trained_embeddings: bool = False
    """The draft has embeddings of its own."""


def draft_spec(
    config: TrainConfig, target_directory: Path, stored: tuple[int, ...], *, has_last_hidden: bool = True
) -> DraftSpec:
    """Derive the draft from the target's config and the run's settings.

    ``stored`` are the boundaries of the store. Raises TrainError if what the draft reads is not there, or
    the target or its rope is not supported.
    """
    is_eagle1 = config.method == "eagle1"
    if is_eagle1 and not has_last_hidden:
        raise TrainError(
            f"{config.store[0]}: has no last hidden states, which EAGLE-1 is trained on. Extract again with "
            "--last-hidden."
        )
    boundaries = () if is_eagle1 else config.boundaries or stored
    if missing := sorted(set(boundaries) - set(stored)):
        raise TrainError(
            f"{config.store[0]}: boundary {missing[0]} is not in the store, which has "
            f"{','.join(map(str, stored))}. Train on those, or extract again with other --boundaries."
        )
    target = _target_values(target_directory)
    name, architecture = architecture_of(target, config.store[0])
    heads = target["num_attention_heads"]
    return DraftSpec(
        method=config.method,
        target_architecture=name,
        num_target_layers=target["num_hidden_layers"],
        boundaries=boundaries,
        hidden_size=target["hidden_size"],
        intermediate_size=config.intermediate_size or _intermediate_size(target, architecture),
        num_attention_heads=heads,
        num_key_value_heads=target["num_key_value_heads"],
        head_dim=target.get("head_dim") or target["hidden_size"] // heads,
        rms_norm_eps=target["rms_norm_eps"],
        vocab_size=target["vocab_size"],
        draft_vocab_size=target["vocab_size"] if is_eagle1 else min(config.draft_vocab_size, target["vocab_size"]),
        max_position_embeddings=target["max_position_embeddings"],
        rope_parameters=draft_rope(target["rope_parameters"], architecture, config.store[0]),
        norm_output=config.norm_output,
        fc_norm=config.fc_norm,
        norm_before_fc=config.norm_before_fc,
        norm_before_residual=config.norm_before_residual,
        sliding_window=config.sliding_window,
        trained_embeddings=config.train_embeddings,
    )


def _target_values(directory: Path) -> dict[str, Any]:
    """Return the target's config, completed by transformers if it leaves something to its defaults.

    Extraction has completed it, where that could be. In a store from before it did, and for targets whose config has
    no ``head_dim``, importing transformers takes a second here.
    """
    values: dict[str, Any] = json.loads((directory / "config.json").read_text())
    if {"head_dim", "num_key_value_heads", "rms_norm_eps", "rope_parameters"} <= values.keys():
        return values
    from transformers import AutoConfig

    completed: dict[str, Any] = AutoConfig.from_pretrained(directory, local_files_only=True).to_dict()
    return completed


def _intermediate_size(target: Mapping[str, Any], architecture: Architecture) -> int:
    return 6 * int(target["hidden_size"]) if architecture.is_mixture else int(target["intermediate_size"])


def save_spec(spec: DraftSpec, path: Path) -> None:
    """Write ``draft.json``."""
    path.write_text(json.dumps(spec.model_dump(mode="json"), indent=2) + "\n")


def load_spec(path: Path) -> DraftSpec:
    """Read ``draft.json``; raise TrainError if there is none."""
    try:
        return DraftSpec.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TrainError(
            f"{path}: not the draft of a run ({' '.join(str(error).split())[:120]}). Give a directory that "
            "`specx train --out` wrote."
        ) from error
