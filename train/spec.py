"""What a draft is: everything that its weights do not say.

A run writes it to ``draft.json``; the export turns it into the ``config.json``
that the engines read.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from ..storage.schema import Record
from .config import TrainConfig
from .errors import TrainError

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class DraftSpec(Record):
    """An EAGLE-3 draft of one decoder layer."""

    target_architecture: str
    num_target_layers: int
    boundaries: tuple[int, ...]
    """Block b's input is boundary b; ascending."""
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


def draft_spec(config: TrainConfig, target_directory: Path, stored: tuple[int, ...]) -> DraftSpec:
    """Derive the draft from the target's config and the run's settings.

    ``stored`` are the boundaries of the store. Raises TrainError if one asked for is not there, or the
    target's rope is not supported.
    """
    boundaries = config.boundaries or stored
    if missing := sorted(set(boundaries) - set(stored)):
        raise TrainError(
            f"{config.store[0]}: boundary {missing[0]} is not in the store, which has "
            f"{','.join(map(str, stored))}. Train on those, or extract again with other --boundaries."
        )
    target = AutoConfig.from_pretrained(target_directory, local_files_only=True)
    heads = target.num_attention_heads
    return DraftSpec(
        target_architecture=target.architectures[0],
        num_target_layers=target.num_hidden_layers,
        boundaries=boundaries,
        hidden_size=target.hidden_size,
        intermediate_size=config.intermediate_size or _intermediate_size(target),
        num_attention_heads=heads,
        num_key_value_heads=target.num_key_value_heads,
        head_dim=target.to_dict().get("head_dim") or target.hidden_size // heads,
        rms_norm_eps=target.rms_norm_eps,
        vocab_size=target.vocab_size,
        draft_vocab_size=min(config.draft_vocab_size, target.vocab_size),
        max_position_embeddings=target.max_position_embeddings,
        rope_parameters=_explicit(target.rope_parameters, config.store[0]),
        norm_output=config.norm_output,
        fc_norm=config.fc_norm,
    )


def _intermediate_size(target: PretrainedConfig) -> int:
    values = target.to_dict()
    is_mixture = any(values.get(key) for key in ("num_local_experts", "num_experts"))
    return 6 * int(values["hidden_size"]) if is_mixture else int(values["intermediate_size"])


def _explicit(rope: Mapping[str, Any], store: str) -> dict[str, Any]:
    """Spell out the YaRN defaults that engines and transformers might fill in differently.

    Raises TrainError for a rope that the draft's layer does not compute.
    """
    if rope["rope_type"] not in _ROPE_TYPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise TrainError(
            f"{store}: the target's rope is {dict(rope)}, expected one of {', '.join(_ROPE_TYPES)} over "
            "the whole head. Drafts of this target are not supported."
        )
    if rope["rope_type"] != "yarn":
        return dict(rope)
    return {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True} | dict(rope)


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
