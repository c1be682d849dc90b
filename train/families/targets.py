"""The targets that drafts can be trained for, by the ``architectures`` of their config.

Another one is another line of ``TARGETS``, and one of ``extract.target.ARCHITECTURES``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
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
"""All of them take EAGLE-3 and EAGLE-1 drafts, which are Llama layers whatever the target is."""


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
