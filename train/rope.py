"""Rotary position embedding of a draft, computed by transformers from the config that is exported.

Training and serving thus start from the same block of numbers; ``check`` compares
what an engine would build from the exported file with what was trained.

Shapes: T positions, D head dimension.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


def rotary_embedding(config: Mapping[str, Any]) -> LlamaRotaryEmbedding:
    """Return the module that turns positions (B, T) into cos and sin (B, T, D), D in two equal halves.

    ``config`` has ``hidden_size``, ``num_attention_heads``, ``head_dim``, ``max_position_embeddings``
    and ``rope_parameters``. cos and sin carry YaRN's concentration 0.1 ln(factor) + 1 (arXiv 2309.00071,
    section 3.4). Raises KeyError for a missing key.
    """
    keys = ("hidden_size", "num_attention_heads", "head_dim", "max_position_embeddings")
    geometry = {key: config[key] for key in keys}
    return LlamaRotaryEmbedding(LlamaConfig(**geometry, rope_parameters=dict(config["rope_parameters"])))


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate ``heads`` (B, n, T, D) by ``cos`` and ``sin`` (B, T, D)."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
