"""RMSNorm of the training step: over rows, with the weight left to the matrix that follows.

Shapes: R rows, H hidden size.
"""

from typing import Any

import torch


def normalised(x: torch.Tensor, eps: float, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x`` (…, H) over its root mean square by rows: RMSNorm (arXiv 1910.07467), as a rule without its weight.

    ``W (n ∘ x̂)`` equals ``(W ∘ n) x̂``: a matrix takes the weight n once for all rows and steps, and an
    input without a gradient needs no product to find that of n.
    """
    result: torch.Tensor = _Normalised.apply(x, eps, weight)  # type: ignore[no-untyped-call]
    return result


class _Normalised(torch.autograd.Function):
    """In as few passes over memory as it takes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, eps: float, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        scale = (torch.linalg.vecdot(wide, wide) / x.shape[-1] + eps).rsqrt_()[..., None]
        wide = wide * scale
        y = wide.to(x.dtype)
        ctx.save_for_backward(y, scale, weight)
        weighted: torch.Tensor = y if weight is None else (wide * weight).to(x.dtype)
        return weighted

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor | None]:
        y, scale, weight = ctx.saved_tensors
        wide, wide_grad = y.float(), grad.float()
        grad_weight = None
        if weight is not None:
            grad_weight = (wide_grad * wide).flatten(0, -2).sum(0)
            wide_grad = wide_grad * weight
        along = torch.linalg.vecdot(wide, wide_grad)[..., None] / -y.shape[-1]
        return torch.addcmul(wide_grad, wide, along).mul_(scale).to(y.dtype), None, grad_weight
