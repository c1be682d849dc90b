"""An exported draft, read back; and a run's first weights from one.

Shapes: V target vocabulary, Vd draft vocabulary, H hidden size.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..data.target_head import TargetHead
from ..errors import TrainError
from .checkpoint import spec_of, trained_name
from .eagle1.draft import Eagle1Draft
from .eagle3.checkpoint import CONFIG_FILE, WEIGHTS_FILE, weight_shapes
from .eagle3.draft import Draft
from .spec import DraftSpec

AnyDraft = Draft | Eagle1Draft


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedDraft:
    """A draft read back from its checkpoint."""

    draft: AnyDraft
    vocabulary: torch.Tensor
    """(Vd,) int64, target ids"""


def new_draft(spec: DraftSpec) -> AnyDraft:
    """Return a draft with random weights."""
    return Eagle1Draft(spec) if spec.method == "eagle1" else Draft(spec)


def load_draft(directory: Path, dtype: torch.dtype) -> ExportedDraft:
    """Read an exported draft of any form; raise TrainError if the directory holds none."""
    try:
        config = json.loads((directory / CONFIG_FILE).read_text())
        tensors = {trained_name(name, config): tensor for name, tensor in load_file(directory / WEIGHTS_FILE).items()}
        spec = spec_of(config, trained_embeddings="embed_tokens.weight" in tensors)
        d2t = tensors.pop("d2t", torch.zeros(spec.draft_vocab_size, dtype=torch.int64))
        tensors.pop("t2d", None)
        tensors.pop("fc.bias", None)
        draft = new_draft(spec)
        draft.load_state_dict(tensors)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160]
        raise TrainError(f"{directory}: not an exported draft: {reason}. Make one with `specx export`.") from error
    return ExportedDraft(draft=draft.to(dtype).eval(), vocabulary=d2t + torch.arange(len(d2t)))


def load_first(directory: Path, spec: DraftSpec) -> ExportedDraft:
    """Read the draft that a run of ``spec`` starts from, in float32; the draft vocabulary may differ.

    Raises TrainError if it does not fit, naming the first thing that differs.
    """
    first = load_draft(directory, torch.float32)
    found = first.draft.spec
    for key in ("method", "boundaries", "vocab_size"):
        ours, theirs = spec.model_dump()[key], found.model_dump()[key]
        if ours != theirs:
            raise TrainError(f"{directory}: its {key} is {theirs}, this run's {ours}. Start from another draft.")
    wanted = weight_shapes(spec.model_copy(update={"draft_vocab_size": found.draft_vocab_size}))
    given = weight_shapes(found)
    for name in sorted(set(wanted) | set(given)):
        # Embeddings that are to be trained start from the target's.
        if wanted.get(name) != given.get(name) and not (name == "embed_tokens.weight" and name not in given):
            raise TrainError(
                f"{directory}: its {name} is {given.get(name, 'missing')}, this run's {wanted.get(name, 'none')}. "
                "Start from another draft, or train with the settings of this one."
            )
    return first


def set_first_weights(draft: AnyDraft, head: TargetHead, first: ExportedDraft | None) -> None:
    """Fill in what does not start at random: the target's head and embeddings, or a whole earlier draft."""
    if isinstance(draft, Draft):
        with torch.no_grad():
            draft.lm_head.weight.copy_(head.lm_head_rows)
            if draft.spec.trained_embeddings:
                draft.embed_tokens.weight.copy_(head.embed_tokens)
    if first is not None:
        draft.load_state_dict(first.draft.state_dict(), strict=False)
