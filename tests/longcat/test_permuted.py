"""Permuted operands give the same bits: products of all shapes in use, and whole operators."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import longcat.ops.fp32_linear
from longcat.documents import Documents
from longcat.ops import fusion
from longcat.ops.attention import causal_attention
from longcat.ops.cross_entropy import linear_cross_entropy, softmax_loss
from longcat.ops.elementwise import added_norm, residual_sum, rms_norm, swiglu, swiglu_backward
from longcat.ops.fp32_linear import fp32_linear
from longcat.ops.grouped import grouped_gated_linear, grouped_linear
from longcat.ops.matmul import gated_linear, linear, product, rotated_linear
from longcat.ops.one_pass import by_halves
from longcat.ops.permuted import can_roll, distance, mirrored, permuting, rolled
from longcat.ops.rotation import expanded_keys, rotary

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [1, 2, 3, 5, 8, 16, 24, 31, 48, 64, 96, 100, 128, 192, 257, 320]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16 if x.dtype is torch.bfloat16 else torch.int32)


def draw(*shape: int, dtype: torch.dtype, transposed: bool = False, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if transposed:
        *batch, rows, columns = shape
        return torch.randn(*batch, columns, rows, generator=generator).to(dtype).mT
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", itertools.product([False, True], repeat=2), ids=str)
def test_permuted_products_have_the_same_bits(dtype: torch.dtype, transposed: tuple[bool, bool]) -> None:
    chance = torch.Generator().manual_seed(sum(transposed))
    rolls = 0
    for seed in range(400):
        rows, depth, columns = (SIZES[int(i)] for i in torch.randint(len(SIZES), (3,), generator=chance))
        batch = ((), (), (1,), (4,))[seed % 4]
        a = draw(*batch, rows, depth, dtype=dtype, transposed=transposed[0], seed=seed)
        b = draw(*batch, depth, columns, dtype=dtype, transposed=transposed[1], seed=seed + 1000)
        with permuting():
            second = product(a, b)
        assert torch.equal(bits(product(a, b)), bits(second)), (batch, rows, depth, columns)
        rolls += sum(can_roll(a, b))
    assert rolls > 200, "most products must be permuted, or the comparison shows nothing"


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "part"])
def test_rolling_keeps_values_and_layout(layout: str) -> None:
    x = draw(3, 6, 5, dtype=torch.float32, transposed=layout == "transposed")
    x = draw(3, 6, 10, dtype=torch.float32).chunk(2, -1)[1] if layout == "part" else x
    for dim in (0, -2, -1):
        there = rolled(x, dim)
        assert torch.equal(there, x.roll(distance(x.shape[dim]), dim)) and not torch.equal(there, x)
        assert torch.equal(rolled(there, dim, back=True), x)
        assert there.stride() == x.stride()
    assert [distance(size) for size in (1, 2, 3, 16, 64)] == [0, 1, 1, 9, 33]


def leaf(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return draw(*shape, dtype=dtype, seed=seed).requires_grad_()


def operators(dtype: torch.dtype, size: int) -> dict[str, tuple[list[Tensor], object]]:
    """Name → the leaves and a function of them that gives a tensor; ``size`` is the number of tokens."""
    x, gate, up = (leaf(2, size, 48, dtype=dtype, seed=seed) for seed in range(3))
    weight = leaf(32, 48, dtype=torch.float32, seed=3)
    stack, narrow = leaf(4, 32, 48, dtype=torch.float32, seed=4), leaf(12, 48, dtype=torch.float32, seed=5)
    rows, other = leaf(size, 48, dtype=dtype, seed=6), leaf(size, 48, dtype=dtype, seed=7)
    gain, head = leaf(48, dtype=torch.float32, seed=8), leaf(96, 48, dtype=torch.float32, seed=9)
    ends = torch.tensor([size // 3, size // 3, size - 1, size], dtype=torch.int32)
    q, k = (leaf(2, size, 4, 24, dtype=dtype, seed=seed) for seed in (10, 11))
    v = leaf(2, size, 4, 16, dtype=dtype, seed=12)
    halves = leaf(size, 24, dtype=dtype, seed=13)  # of odd vectors
    thin = leaf(4, 20, 12, dtype=torch.float32, seed=14)
    zeros = torch.zeros(len(rows), requires_grad=True)
    documents = Documents.of((torch.arange(size) // 7).expand(2, -1))
    angles = torch.polar(torch.ones(size, 12), torch.randn(size, 12))
    labels, valid = torch.arange(size) % 96, torch.arange(size) % 5 > 0
    return {
        "linear": ([x, weight], lambda: linear(x, weight)),
        "gated": ([gate, up, weight], lambda: gated_linear(gate, up, weight)),
        "router": ([rows, narrow], lambda: fp32_linear(rows, narrow)),
        "experts": ([rows, stack], lambda: grouped_linear(rows, stack, ends)),
        "gated experts": (
            [rows, other, stack, zeros],
            lambda: grouped_gated_linear(torch.cat((rows, other), -1), stack, ends, log_scale=zeros),
        ),
        "halves": ([halves, thin], lambda: grouped_gated_linear(halves, thin, ends)),
        "norm": ([x, gain], lambda: rms_norm(x, gain, 1e-6)),
        "rotary": ([q], lambda: rotary(q, angles)),
        "attention": ([q, k, v], lambda: causal_attention(q, k, v, 0.2, documents)),
        "cross-entropy": ([rows, head], lambda: linear_cross_entropy(rows, head, labels, valid)[0]),
    }


def results(function: Any, leaves: list[Tensor]) -> list[Tensor]:
    """The result and the gradients of all operands."""
    out = function()
    grad = draw(*out.shape, dtype=out.dtype, seed=99)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_permuted_alike(function: Any, leaves: list[Tensor]) -> None:
    first = results(function, leaves)
    with permuting():
        second = results(function, leaves)
    assert all(torch.equal(bits(one), bits(other)) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [7, 64, 300])
@pytest.mark.parametrize("name", list(operators(torch.float32, 8)))
def test_permuted_operators_have_the_same_bits(name: str, size: int, dtype: torch.dtype) -> None:
    leaves, function = operators(dtype, size)[name]
    assert_permuted_alike(function, leaves)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs, by the plain versions."""
    monkeypatch.setattr(fusion, "is_on_gpu", lambda _: True)
    monkeypatch.setattr(longcat.ops.fp32_linear, "multiplies_in_parts", lambda _, dtype: dtype is torch.bfloat16)


def joined(*parts: Tensor) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def operators_of_one_pass(dtype: torch.dtype, size: int, width: int) -> dict[str, tuple[list[Tensor], object]]:
    """As `operators`, those that have one kernel each; ``width`` is that of the residual stream."""
    x, y, z = (leaf(2, size, width, dtype=dtype, seed=seed) for seed in range(3))
    gain, weight = leaf(width, dtype=torch.float32, seed=3), leaf(96, width, dtype=torch.float32, seed=4)
    rows, router = leaf(size, width, dtype=dtype, seed=5), leaf(12, width, dtype=torch.float32, seed=6)
    expanded, k_rope = leaf(2, size, 4, 32, dtype=dtype, seed=7), leaf(2, size, 8, dtype=dtype, seed=8)
    angles = torch.polar(torch.ones(size, 4), torch.randn(size, 4))
    return {
        "norm": ([x, gain], lambda: rms_norm(x, gain, 1e-6)),
        "norm of a sum": ([x, y, gain], lambda: joined(*added_norm(x, y, gain, 1e-6))),
        "residual sum": ([x, y, z], lambda: residual_sum(x, y, z)),
        "gated": ([x, y, weight], lambda: gated_linear(x, y, weight)),
        "queries": ([x, weight], lambda: rotated_linear(x, weight, 24, angles)),
        "keys": ([expanded, k_rope], lambda: joined(*expanded_keys(expanded, k_rope, angles, 16, 24))),
        "router": ([rows, router], lambda: fp32_linear(rows, router)),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "width"), [(8, 64), (64, 48), (64, 192), (300, 96)])
@pytest.mark.parametrize("name", list(operators_of_one_pass(torch.float32, 8, 48)))
def test_permuted_operators_of_one_pass_have_the_same_bits(
    name: str, size: int, width: int, dtype: torch.dtype, on_gpu: None
) -> None:
    leaves, function = operators_of_one_pass(dtype, size, width)[name]
    assert_permuted_alike(function, leaves)


@pytest.mark.parametrize("width", [1, 2, 3, 48, 64, 100, 192, 1536, 6144])
def test_sums_by_halves_do_not_depend_on_mirroring(width: int) -> None:
    """1,536 and 6,144 are the report's widths of queries' latents and of the residual stream."""
    x = draw(200, width, dtype=torch.float32)
    assert torch.equal(bits(by_halves(mirrored(x))), bits(by_halves(x)))
    assert torch.equal(mirrored(mirrored(x)), x)
    block = width & -width
    assert block == 1 or not (mirrored(x) == x).any(), "an element stays in its place"


@pytest.mark.parametrize("threads", [2, 3])
def test_several_threads_give_the_same_bits(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        gate, up = (draw(1237, 96, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
        a, b = draw(1237, 128, dtype=torch.float32), draw(128, 192, dtype=torch.float32, seed=1)
        first = swiglu(gate, up), product(a, b), product(a.bfloat16(), b.bfloat16())
        with permuting():
            second = swiglu(gate, up), product(a, b), product(a.bfloat16(), b.bfloat16())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(bits(one), bits(other)) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("rows", [4, 5, 32, 33])
@pytest.mark.parametrize("width", [10, 16, 97])
def test_rests_behind_whole_vectors_are_not_moved(rows: int, width: int) -> None:
    """Scalar code's exp rounds differently, but only in some of a thousand numbers."""
    for seed in range(150):
        gate, up, grad = (draw(rows, width, dtype=torch.float32, seed=3 * seed + i) for i in range(3))
        labels, valid = torch.arange(rows) % width, torch.ones(rows, dtype=torch.bool)

        def run() -> list[Tensor]:
            loss = softmax_loss(gate.clone(), labels, valid, torch.float32)  # noqa: B023
            return [swiglu(gate, up), *swiglu_backward(grad, gate, up), *loss]  # noqa: B023

        first = run()
        with permuting():
            second = run()
        assert all(torch.equal(bits(one), bits(other)) for one, other in zip(first, second, strict=True)), seed
