"""The target's embedding and head, from the copy that the store holds.

Shapes: V target vocabulary, Vd draft vocabulary, H hidden size.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from ...storage.errors import StoreCorruptError
from ...storage.store import TARGET_DIRECTORY, FeatureStore


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetHead:
    """What training needs of the target's weights, in their own dtype."""

    embed_tokens: torch.Tensor
    """(V, H)"""
    lm_head_rows: torch.Tensor
    """(Vd, H), of the draft vocabulary"""


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
    return TargetHead(embed_tokens=embed_tokens, lm_head_rows=rows)
