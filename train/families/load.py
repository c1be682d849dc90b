"""Drafts of any family, read back: a run's spec, an exported draft, and a run's first weights from one.

Shapes: V target vocabulary, Vd draft vocabulary, H hidden size.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..data.target_head import TargetHead
from ..errors import TrainError
from .base import DraftFamily, DraftModel
from .checkpoint import CONFIG_FILE, WEIGHTS_FILE
from .registry import entries, families, family
from .spec import DraftSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedDraft:
    """A draft read back from its checkpoint."""

    draft: DraftModel
    """The torch module; ``draft.spec`` is what it is."""
    vocabulary: torch.Tensor
    """(Vd,) int64, target ids"""

    @property
    def spec(self) -> DraftSpec:
        """What the draft is."""
        return self.draft.spec

    @property
    def family(self) -> DraftFamily[Any, Any, Any]:
        """The draft's family."""
        return family(self.spec.method)


def load_spec(path: Path) -> DraftSpec:
    """Read ``draft.json``; raise TrainError if there is none, or its family is not installed."""
    try:
        values = json.loads(path.read_bytes())
        method = str(values["method"])
        if method not in entries():
            raise TrainError(f"{path}: a draft of family {method}, which is not installed.")
        spec: DraftSpec = family(method).spec_type.model_validate(values)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise TrainError(
            f"{path}: not the draft of a run ({' '.join(str(error).split())[:120]}). Give a directory that "
            "`specx train --out` wrote."
        ) from error
    return spec


def recognize(config: Mapping[str, Any]) -> DraftFamily[Any, Any, Any] | None:
    """Return the family of the draft that a ``config.json`` describes; None if it is no draft's."""
    return next((each for each in families().values() if each.checkpoint.recognizes(config)), None)


def load_draft(directory: str | Path, dtype: torch.dtype = torch.float32) -> ExportedDraft:
    """Read an exported draft of any family and form; raise TrainError if the directory holds none."""
    directory = Path(directory)
    try:
        config = json.loads((directory / CONFIG_FILE).read_text())
        found = recognize(config)
        if found is None:
            raise ValueError(f"architectures {config.get('architectures')} are no draft's")
        written = load_file(directory / WEIGHTS_FILE)
        tensors = {found.checkpoint.trained_name(name, config): tensor for name, tensor in written.items()}
        spec = found.checkpoint.spec_of(config, tensors.keys())
        d2t = tensors.pop("d2t", torch.zeros(spec.draft_vocab_size, dtype=torch.int64))
        draft: DraftModel = found.build(spec)
        # Engines want them; a draft needs neither.
        for name in ("t2d", *found.checkpoint.constant_names):
            tensors.pop(name, None)
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
    found = first.spec
    for key in ("method", "boundaries", "vocab_size"):
        ours, theirs = spec.model_dump()[key], found.model_dump()[key]
        if ours != theirs:
            raise TrainError(f"{directory}: its {key} is {theirs}, this run's {ours}. Start from another draft.")
    wanted = first.family.weight_shapes(spec.model_copy(update={"draft_vocab_size": found.draft_vocab_size}))
    given = first.family.weight_shapes(found)
    for name in sorted(set(wanted) | set(given)):
        may_lack = name in first.family.from_target and name not in given
        if wanted.get(name) != given.get(name) and not may_lack:
            raise TrainError(
                f"{directory}: its {name} is {given.get(name, 'missing')}, this run's {wanted.get(name, 'none')}. "
                "Start from another draft, or train with the settings of this one."
            )
    return first


def set_first_weights(draft: DraftModel, head: TargetHead, first: ExportedDraft | None) -> None:
    """Fill in what does not start at random: what a family takes of the target, or a whole earlier draft."""
    family(draft.spec.method).initialize(draft, head)
    if first is not None:
        draft.load_state_dict(first.draft.state_dict(), strict=False)
