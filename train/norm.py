"""RMSNorm of the training step: over rows, with the weight left to the matrix that follows.

Shapes: R rows, H hidden size.
"""

from typing import Any

import torch


def normalised(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Return ``x`` (…, H) over its root mean square by rows: RMSNorm (arXiv 1910.07467) without its weight.

    ``W (n ∘ x̂)`` equals ``(W ∘ n) x̂``: a matrix takes the weight n once for all rows and steps, and an
    input without a gradient needs no product to find that of n.
    """
    result: torch.Tensor = _Normalised.apply(x, eps)  # type: ignore[no-untyped-call]
    return result


class _Normalised(torch.autograd.Function):
    """In as few passes over memory as it takes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        scale = (torch.linalg.vecdot(wide, wide) / x.shape[-1] + eps).rsqrt_()[..., None]
        y: torch.Tensor = (wide * scale).to(x.dtype)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        y, scale = ctx.saved_tensors
        wide, wide_grad = y.float(), grad.float()
        along = torch.linalg.vecdot(wide, wide_grad)[..., None] / -y.shape[-1]
        return torch.addcmul(wide_grad, wide, along).mul_(scale).to(y.dtype), None
