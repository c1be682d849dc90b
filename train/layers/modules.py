"""What drafts are built of: norm, projections of attention, MLP.

Shapes: B rows, T tokens of a row, H hidden size, D head dimension, n heads.
"""

import torch
from torch import nn
from torch.nn import functional as F

from ..rope.rotary import rotate


class RMSNorm(nn.RMSNorm):
    """torch's, with the weight brought to the input's type: autocast mixes them, and the fused kernel refuses."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (…, H) to (…, H)."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class DraftAttention(nn.Module):
    """Projections of the one attention."""

    def __init__(self, *, width: int, heads: int, kv_heads: int, head_dim: int, hidden_size: int) -> None:
        """``width`` is that of the inputs, ``hidden_size`` that of the outputs."""
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden_size, bias=False)

    def heads_of(
        self, inputs: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Map ``inputs`` (B, T, width) to rotated q (B, n, T, D), rotated k and plain v, both (B, kv heads, T, D)."""
        queries, keys, values = (
            projection(inputs).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(queries, cos, sin), rotate(keys, cos, sin), values

    def project(
        self, inputs: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Map ``inputs`` (B, T, width) to rotated q, k and plain v, each (B, n, T, D), kv heads repeated."""
        queries, keys, values = self.heads_of(inputs, cos, sin)
        groups = self.heads // self.kv_heads
        return queries, keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)

    def output(self, attended: torch.Tensor) -> torch.Tensor:
        """Map ``attended`` (B, n, T, D) to (B, T, H)."""
        mixed: torch.Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return mixed


class DraftMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map (…, H) to (…, H)."""
        mixed: torch.Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return mixed
