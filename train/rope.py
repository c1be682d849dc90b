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


def rotate_rows(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate ``heads`` (R, n, D) by one half of ``cos`` and ``sin``, (R, D/2), in fewer passes than ``rotate``."""
    rotated: torch.Tensor = _Rotation.apply(heads, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


class _Rotation(torch.autograd.Function):
    """A rotation; its gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(heads, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1), None, None


def _rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int) -> torch.Tensor:
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    first, second = heads.chunk(2, dim=-1)
    new_first, new_second = rotated.chunk(2, dim=-1)
    torch.mul(first, cos, out=new_first).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=new_second).addcmul_(first, sin, value=direction)
    return rotated
