"""The draft's MLP with its backward: between the matrix products, rows pass through the cache once.

Shapes: R rows, H hidden size, I intermediate size.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from .linear import product

_CPU_BLOCK = 1 << 18
"""Elements of a block of rows, of which a CPU's cache holds several."""


def add_swiglu_mlp(residual: torch.Tensor, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Return ``residual + (silu(x gateᵀ) * (x upᵀ)) downᵀ`` (R, H): SwiGLU (arXiv 2002.05202).

    ``gate_up`` (2I, H) has both matrices one below the other, ``down`` is (H, I).
    """
    result: torch.Tensor = _SwigluMLP.apply(residual, x, gate_up, down)  # type: ignore[no-untyped-call]
    return result


class _SwigluMLP(torch.autograd.Function):
    """Keeps three tensors (R, I) where autograd would keep four, and makes one in the backward instead of five."""

    @staticmethod
    def forward(
        ctx: Any, residual: torch.Tensor, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
    ) -> torch.Tensor:
        projected = product(x, gate_up)
        inner = projected.new_empty(len(x), down.shape[1])
        for g, u, out in _blocks(*projected.chunk(2, dim=1), inner):
            torch.mul(F.silu(g), u, out=out)
        ctx.save_for_backward(x, gate_up, down, inner)
        # Its gradient takes its place.
        ctx.projected = projected
        return product(inner, down, residual)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, gate_up, down, inner = ctx.saved_tensors
        projected = ctx.projected
        for g, u, change in _blocks(*projected.chunk(2, dim=1), product(grad, down.T)):
            activated = F.silu(g)
            torch.ops.aten.silu_backward.grad_input(u.mul_(change), g, grad_input=g)
            torch.mul(activated, change, out=u)
        return grad, product(projected, gate_up.T), projected.T @ x, grad.T @ inner


def _blocks(*wide: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Cut the rows of some tensors into blocks; on a GPU all are one."""
    rows = max(1, _CPU_BLOCK // wide[0].shape[1] if wide[0].device.type == "cpu" else len(wide[0]))
    starts = range(0, len(wide[0]), rows)
    return (tuple(each[start : start + rows] for each in wide) for start in starts)
