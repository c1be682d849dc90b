"""The target's embedding and head, and what it does to the head's logits, from the copy that the store holds.

Shapes: V target vocabulary, Vd draft vocabulary, H hidden size.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from ...storage.errors import StoreCorruptError
from ...storage.store import TARGET_DIRECTORY, FeatureStore


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadTransform:
    """What a target does to the logits of its head before they are its distribution."""

    scale: float = 1.0
    """Factor on the logits."""
    softcap: float | None = None
    """c of ``c tanh(logits / c)``, after the scale."""

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Map logits of any shape; returned as they are where the target does nothing."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetHead:
    """What training needs of the target's weights, in their own dtype."""

    embed_tokens: torch.Tensor
    """(V, H)"""
    lm_head_rows: torch.Tensor
    """(Vd, H), of the draft vocabulary"""
    transform: HeadTransform


def read_head(store: FeatureStore, vocabulary: npt.NDArray[np.int64]) -> TargetHead:
    """Read the embedding and the head's rows of ``vocabulary`` (Vd,); raise StoreCorruptError."""
    path = store.target_directory / "head.safetensors"
    where = store.place.name_of(TARGET_DIRECTORY)
    try:
        with safe_open(path, framework="pt") as tensors:
            embed_tokens = tensors.get_tensor("embed_tokens")
            rows = tensors.get_tensor("lm_head")[torch.from_numpy(vocabulary)]
    except (OSError, SafetensorError) as error:
        raise StoreCorruptError(
            f"{where}/head.safetensors: not readable ({error}). Delete {where} and rerun `specx extract`."
        ) from error
    config = json.loads((store.target_directory / "config.json").read_text())
    return TargetHead(embed_tokens=embed_tokens, lm_head_rows=rows, transform=head_transform(config))


def head_transform(config: Mapping[str, Any]) -> HeadTransform:
    """Return what a target does to its head's logits, by the keys of its config.

    ``logit_scale`` multiplies (Cohere), ``logits_scaling`` divides (Granite), ``final_logit_softcapping`` caps (Gemma).
    """
    scale = float(config.get("logit_scale") or 1.0) / float(config.get("logits_scaling") or 1.0)
    cap = config.get("final_logit_softcapping")
    return HeadTransform(scale=scale, softcap=None if cap is None else float(cap))
