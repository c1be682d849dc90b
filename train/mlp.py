"""The draft's MLP with its backward: between the matrix products, rows pass through the cache once.

Shapes: R rows, H hidden size, I intermediate size.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

_CPU_BLOCK = 1 << 18
"""Elements of a block of rows, of which a CPU's cache holds several."""


def add_swiglu_mlp(
    residual: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Return ``residual + (silu(x gateᵀ) * (x upᵀ)) downᵀ`` (R, H), ``gate`` and ``up`` (I, H) and ``down`` (H, I).

    SwiGLU (arXiv 2002.05202).
    """
    result: torch.Tensor = _SwigluMLP.apply(residual, x, gate, up, down)  # type: ignore[no-untyped-call]
    return result


class _SwigluMLP(torch.autograd.Function):
    """Keeps three tensors (R, I) where autograd would keep four, and makes one in the backward instead of five."""

    @staticmethod
    def forward(
        ctx: Any,
        residual: torch.Tensor,
        x: torch.Tensor,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
    ) -> torch.Tensor:
        gated, lifted = x @ gate.T, x @ up.T
        inner = torch.empty_like(gated)
        for g, u, out in _blocks(gated, lifted, inner):
            torch.mul(F.silu(g), u, out=out)
        ctx.save_for_backward(x, gate, up, down, inner)
        # Their gradients take their place.
        ctx.projected = gated, lifted
        return torch.addmm(residual, inner, down.T)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, gate, up, down, inner = ctx.saved_tensors
        gated, lifted = ctx.projected
        for g, u, change in _blocks(gated, lifted, grad @ down):
            grad_lifted = F.silu(g).mul_(change)
            torch.ops.aten.silu_backward.grad_input(u.mul_(change), g, grad_input=g)
            u.copy_(grad_lifted)
        return grad, (gated @ gate).addmm_(lifted, up), gated.T @ x, lifted.T @ x, grad.T @ inner


def _blocks(*wide: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Cut the rows of some tensors into blocks; on a GPU all are one."""
    rows = max(1, _CPU_BLOCK // wide[0].shape[1] if wide[0].device.type == "cpu" else len(wide[0]))
    starts = range(0, len(wide[0]), rows)
    return (tuple(each[start : start + rows] for each in wide) for start in starts)
