"""Matrix products of rows with weights, by the library that is fastest at them.

On a CPU torch gives bfloat16 to oneDNN and float32 to MKL, which takes up to 1.5 times as long
where the processor is not Intel's. Compiled code calls oneDNN for float32 too, by the operator
that is called here; a torch without it takes MKL. Gradients of weights, which sum over rows, are
as fast by MKL.

Shapes: R rows, I width in, O width out.
"""

from typing import Any

import torch


def product(x: torch.Tensor, weight: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x weightᵀ`` (R, O), ``added`` (R, O) included, of ``x`` (R, I) and ``weight`` (O, I); no gradients."""
    if not _is_for_onednn(x):
        return x @ weight.T if added is None else torch.addmm(added, x, weight.T)
    operator = torch.ops.mkldnn._linear_pointwise
    rows, weight = x.contiguous(), _dense(weight)
    result: torch.Tensor
    if added is None:
        result = operator(rows, weight, None, "none", [], "")
    else:
        result = operator.binary(rows, added, weight, None, "add")
    return result


def linear(x: torch.Tensor, weight: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
    """Return the same, with gradients."""
    result: torch.Tensor = _Linear.apply(x, weight, added)  # type: ignore[no-untyped-call]
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, added)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_added = ctx.needs_input_grad
        return (
            product(grad, weight.T) if needs_x else None,
            grad.T @ x if needs_weight else None,
            grad if needs_added else None,
        )


def _is_for_onednn(x: torch.Tensor) -> bool:
    has_operator = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return x.dtype == torch.float32 and x.device.type == "cpu" and len(x) > 0 and has_operator


def _dense(weight: torch.Tensor) -> torch.Tensor:
    """Return it with nothing between its rows or its columns: oneDNN takes hundreds of times as long otherwise."""
    return weight if weight.is_contiguous() or weight.T.is_contiguous() else weight.contiguous()
