"""Products of rows with weights, whichever library makes them."""

import pytest
import torch

from specx.train.layers import linear as products
from specx.train.layers.linear import linear, product

R, I, O = 40, 24, 56  # noqa: E741


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return tuple(torch.randn(shape).to(dtype) for shape in ((R, I), (O, I), (R, O)))


def exact(x: torch.Tensor, weight: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    return x.double() @ weight.double().T + added.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_onednn", [True, False])
def test_product_and_gradients_are_those_of_the_formula(
    dtype: torch.dtype, has_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_onednn:
        monkeypatch.setattr(products, "_is_for_onednn", lambda x: False)
    given = [each.requires_grad_() for each in operands(dtype)]
    wide = [each.detach().double().requires_grad_() for each in given]
    slope = torch.randn(R, O).to(dtype)
    found, expected = linear(*given), exact(*wide)
    found.backward(slope)
    expected.backward(slope.double())
    bound = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(found.double(), expected, atol=bound, rtol=bound)
    for one, other in zip(given, wide, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, atol=bound, rtol=bound)


def test_nothing_is_added_unless_given() -> None:
    x, weight, added = operands(torch.float32)
    torch.testing.assert_close(product(x, weight), product(x, weight, added) - added, atol=1e-5, rtol=1e-5)


def test_only_wanted_gradients_are_made() -> None:
    x, weight, added = operands(torch.float32)
    linear(x, weight.requires_grad_(), added).sum().backward()
    assert x.grad is None
    assert added.grad is None
    assert weight.grad is not None


def test_operands_that_are_parts_of_others() -> None:
    x, weight, added = operands(torch.float32)
    torch.testing.assert_close(
        product(x[:, ::2], weight[:, ::2], added), exact(x[:, ::2], weight[:, ::2], added).float(), atol=1e-5, rtol=1e-5
    )


def test_no_rows() -> None:
    x, weight, _ = operands(torch.float32)
    assert product(x[:0], weight).shape == (0, O)
