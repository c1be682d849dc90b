"""The targets that drafts can be trained for, and what a store's copy of one says.

Another target is another line of ``TARGETS``, and one of ``extract.target.ARCHITECTURES``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TrainError


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """What a draft must know of a target besides the sizes, whose keys are the same in all."""

    is_mixture: bool = False
    """Its MLP is a mixture of experts, each much narrower than the draft's has to be."""
    has_partial_rotary: bool = False
    """Its attention honours ``partial_rotary_factor``; the others ignore it."""


TARGETS: Mapping[str, Architecture] = {
    "GptOssForCausalLM": Architecture(is_mixture=True),
    "LlamaForCausalLM": Architecture(),
    "Phi3ForCausalLM": Architecture(has_partial_rotary=True),
    "Qwen3ForCausalLM": Architecture(),
    "Qwen3MoeForCausalLM": Architecture(is_mixture=True),
}
"""By the ``architectures`` of their config. All take all draft families, whose layers are the same for any target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetRecord:
    """A target as a store records it."""

    name: str
    """Architecture, one of ``TARGETS``."""
    architecture: Architecture
    config: Mapping[str, Any]
    """Its config.json, with the defaults that transformers adds."""
    where: str
    """The store, for errors."""


def architecture_of(config: Mapping[str, Any], where: str) -> tuple[str, Architecture]:
    """Return name and record of a target's config; raise TrainError if there is none for it."""
    names = config.get("architectures") or []
    for name in names:
        if name in TARGETS:
            return name, TARGETS[name]
    raise TrainError(
        f"{where}: the target is a {', '.join(names) or 'model without architectures'}, expected one of "
        f"{', '.join(sorted(TARGETS))}. docs/drafts.md says how to add one."
    )


def read_target(directory: Path, where: str) -> TargetRecord:
    """Return the target whose config is in a store's target directory. Raises TrainError for an unknown one."""
    config = _target_config(directory)
    name, architecture = architecture_of(config, where)
    return TargetRecord(name=name, architecture=architecture, config=config, where=where)


def _target_config(directory: Path) -> dict[str, Any]:
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
