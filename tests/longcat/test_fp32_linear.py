"""The router's product from bfloat16 parts is as exact as the float32 product, and is chosen where it is faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from longcat.ops import fp32_linear as module
from longcat.ops.fp32_linear import (
    fp32_linear,
    multiplies_in_parts,
    split,
    split_input_gradient,
    split_linear,
    split_weight_gradient,
)
from longcat.ops.torch_internals import TorchDispatchMode

ROWS, INPUTS, OUTPUTS = 128, 3072, 192


def draw(*shape: int) -> Tensor:
    """Numbers of about six orders of magnitude."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator) * torch.exp(2.0 * torch.randn(shape, generator=generator))


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_parts_add_up_exactly(scale: float) -> None:
    x = draw(200, 300) * scale
    parts = split(x)
    assert all(part.dtype is torch.bfloat16 for part in parts)
    assert torch.equal(sum((part.double() for part in parts), torch.zeros(())), x.double())


def ulps(found: Tensor, exact: Tensor, terms: Tensor) -> Tensor:
    """Errors in units of the last place of each sum's terms, all taken as positive."""
    return (found.double() - exact).abs() / (terms * torch.finfo(torch.float32).eps)


X, WEIGHT, GRAD = draw(ROWS, INPUTS).bfloat16(), draw(OUTPUTS, INPUTS), draw(ROWS, OUTPUTS)
PRODUCTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]] = {
    "logits": (split_linear, lambda x, w: x @ w.t(), X, WEIGHT),
    "input_gradient": (split_input_gradient, lambda grad, w: grad @ w, GRAD, WEIGHT),
    "weight_gradient": (split_weight_gradient, lambda grad, x: grad.t() @ x, GRAD, X),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_errors_are_those_of_a_float32_product(name: str) -> None:
    ours, plain, a, b = PRODUCTS[name]
    exact, terms = plain(a.double(), b.double()), plain(a.double().abs(), b.double().abs())
    of_ours, of_plain = (ulps(found, exact, terms) for found in (ours(a, b), plain(a.float(), b.float())))
    rms = [one.square().mean().sqrt().item() for one in (of_ours, of_plain)]
    print(f"{name}: rms {rms[0]:.3f} (float32 {rms[1]:.3f}) ulp, largest {of_ours.max():.2f} ({of_plain.max():.2f})")
    assert rms[0] <= 1.2 * rms[1]
    assert of_ours.max() <= 2 * max(float(of_plain.max()), 1.0)


@pytest.mark.parametrize(
    ("device", "dtype", "in_parts"),
    [("cuda", torch.bfloat16, True), ("cuda", torch.float16, False), ("cuda", torch.float32, False)]
    + [("cpu", dtype, False) for dtype in (torch.bfloat16, torch.float32)],
)
def test_where_parts_are_multiplied(device: str, dtype: torch.dtype, in_parts: bool) -> None:
    assert multiplies_in_parts(device, dtype) == in_parts


def gradients(x: Tensor, weight: Tensor) -> list[Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = fp32_linear(x, weight)
    return [out.detach(), *torch.autograd.grad(out, (x, weight), GRAD)]


def test_the_layer_in_parts_is_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = gradients(X, WEIGHT)
    monkeypatch.setattr(module, "multiplies_in_parts", lambda *_: True)
    found = gradients(X, WEIGHT)
    for ours, theirs, tolerance in zip(found, plain, (1e-5, 2**-7, 1e-5), strict=True):
        assert ours.dtype is theirs.dtype
        assert torch.linalg.vector_norm(ours - theirs) <= tolerance * torch.linalg.vector_norm(theirs)


class Products(TorchDispatchMode):
    """The dtypes that products on the meta device multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname == "mm":
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_a_gpu_multiplies_bfloat16_only() -> None:
    x = torch.empty(ROWS, INPUTS, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(OUTPUTS, INPUTS, device="meta", requires_grad=True)
    with Products() as products:
        out = fp32_linear(x, weight)
        out.backward(torch.empty_like(out))
    assert products.dtypes == [torch.bfloat16] * 3
    assert x.grad is not None and x.grad.dtype is torch.bfloat16
    assert weight.grad is not None and weight.grad.dtype is torch.float32
