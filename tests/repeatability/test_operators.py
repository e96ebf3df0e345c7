"""Every operator with a sum repeats bit by bit, and the test notices a sum without an order in each of them.

In float32, on values of very different size, with at least three terms: a few bfloat16 terms add exactly in float32,
and two terms commute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import longcat.ops.attention
import longcat.ops.cross_entropy
import longcat.ops.embedding
import longcat.ops.grouped
import longcat.ops.matmul
import longcat.ops.rows
from longcat.documents import Documents
from longcat.ops.attention import causal_attention
from longcat.ops.cross_entropy import linear_cross_entropy
from longcat.ops.elementwise import rms_norm
from longcat.ops.embedding import embedding
from longcat.ops.fp32_linear import fp32_linear
from longcat.ops.grouped import grouped_gated_linear, grouped_linear
from longcat.ops.matmul import gated_linear, linear
from longcat.ops.permute import combine, permute, plan_permutation
from tests.repeatability import unordered

TOKENS, WIDTH, HEIGHT, EXPERTS, ZERO, TOP_K = 512, 96, 40, 5, 3, 4
REPEATS = 3


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values over about six orders of magnitude, so that the order of a sum shows.

    Sums of bfloat16 are rounded so coarsely that the order rarely shows: half of these cancel each other exactly,
    and what is left depends on when they do.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * torch.exp(2.0 * torch.randn(shape, generator=generator))
    if dtype is torch.bfloat16:
        large = torch.randint(-1, 2, shape, generator=generator) * 2.0**40
        values = torch.where(torch.rand(shape, generator=generator) < 0.5, large, values)
    return values.to(dtype).requires_grad_()


def routing() -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.stack([torch.randperm(EXPERTS + ZERO, generator=generator)[:TOP_K] for _ in range(TOKENS)])


def run_embedding() -> tuple[Tensor, list[Tensor]]:
    table = draw(0, 7, WIDTH)
    ids = torch.randint(0, 7, (TOKENS,), generator=torch.Generator().manual_seed(1))
    return embedding(ids, table), [table]


def run_linear() -> tuple[Tensor, list[Tensor]]:
    x, weight = draw(0, TOKENS, WIDTH), draw(1, HEIGHT, WIDTH)
    return linear(x, weight), [x, weight]


def run_gated_linear() -> tuple[Tensor, list[Tensor]]:
    gate, up, weight = draw(0, TOKENS, WIDTH), draw(1, TOKENS, WIDTH), draw(2, HEIGHT, WIDTH)
    return gated_linear(gate, up, weight), [gate, up, weight]


def run_fp32_linear() -> tuple[Tensor, list[Tensor]]:
    x, weight = draw(0, TOKENS, WIDTH), draw(1, HEIGHT, WIDTH)
    return fp32_linear(x, weight), [x, weight]


def run_grouped(gated: bool, equal: bool) -> tuple[Tensor, list[Tensor]]:
    counts = [96] * EXPERTS if equal else [96, 0, 130, 5, 249]
    x, up, weight = draw(0, sum(counts), WIDTH), draw(1, sum(counts), WIDTH), draw(2, EXPERTS, HEIGHT, WIDTH)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    if gated:
        zeros = torch.zeros(len(x), requires_grad=True)
        return grouped_gated_linear(torch.cat((x, up), -1), weight, ends, log_scale=zeros), [x, up, weight, zeros]
    return grouped_linear(x, weight, ends), [x, weight]


def run_permute(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    x = draw(0, TOKENS, WIDTH, dtype=dtype)
    return permute(x, plan_permutation(routing(), EXPERTS, EXPERTS + ZERO)), [x]


def run_combine(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    plan = plan_permutation(routing(), EXPERTS, EXPERTS + ZERO)
    rows, x = draw(0, plan.token.shape[0], WIDTH, dtype=dtype), draw(1, TOKENS, WIDTH, dtype=dtype)
    gates = draw(2, TOKENS, TOP_K)
    if dtype is torch.bfloat16:  # so that products cancel as rows do
        gates = torch.ones(TOKENS, TOP_K, requires_grad=True)
    return combine(rows, gates, plan, x), [rows, gates, x]


def run_norm() -> tuple[Tensor, list[Tensor]]:
    x, gain = draw(0, TOKENS, WIDTH), draw(1, WIDTH)
    return rms_norm(x, gain, 1e-5), [x, gain]


def run_attention(length: int, documents: bool) -> tuple[Tensor, list[Tensor]]:
    query, key, value = (draw(seed, 2, length, 3, 16 + 8 * (seed < 2)) for seed in range(3))
    numbers = torch.arange(length).div(200, rounding_mode="floor").expand(2, length)
    masks = Documents.of(numbers) if documents else None
    return causal_attention(query, key, value, 0.05, masks), [query, key, value]


def run_cross_entropy() -> tuple[Tensor, list[Tensor]]:
    hidden, weight = draw(0, 3 * 256 + 100, 24), draw(1, 900, 24)
    labels = torch.randint(0, 900, (hidden.shape[0],), generator=torch.Generator().manual_seed(2))
    return linear_cross_entropy(hidden, weight, labels, labels % 5 != 0)[0], [hidden, weight]


CASES: dict[str, Callable[[], tuple[Tensor, list[Tensor]]]] = {
    "embedding": run_embedding,
    "linear": run_linear,
    "gated_linear": run_gated_linear,
    "fp32_linear": run_fp32_linear,
    "grouped_linear": lambda: run_grouped(gated=False, equal=False),
    "grouped_linear_batched": lambda: run_grouped(gated=False, equal=True),
    "grouped_gated_linear": lambda: run_grouped(gated=True, equal=False),
    "permute": lambda: run_permute(torch.float32),
    "permute_bfloat16": lambda: run_permute(torch.bfloat16),
    "combine": lambda: run_combine(torch.float32),
    "combine_bfloat16": lambda: run_combine(torch.bfloat16),
    "rms_norm": run_norm,
    "attention": lambda: run_attention(300, documents=False),
    "attention_long": lambda: run_attention(1100, documents=True),
    "cross_entropy": run_cross_entropy,
}


def bits(name: str) -> list[Tensor]:
    """An operator's output and the gradients of its inputs, for one upstream gradient."""
    out, inputs = CASES[name]()
    upstream = draw(99, *out.shape, dtype=out.dtype).detach()
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def repeats(name: str, times: int = REPEATS) -> bool:
    """Whether an operator gives the same bits so many times."""
    first, others = bits(name), (bits(name) for _ in range(times - 1))
    return all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_operator_repeats_bit_by_bit(name: str) -> None:
    assert repeats(name)


@dataclass(frozen=True)
class Plant:
    """A sum without an order, in place of ``target``'s attribute."""

    case: str
    target: Any
    attribute: str
    sum: Callable[[Any], Any]


PLANTS = [
    Plant("embedding", longcat.ops.embedding, "embedding_bag", unordered.bags),
    Plant("linear", torch, "matmul", unordered.product),
    Plant("gated_linear", torch, "matmul", unordered.product),
    Plant("fp32_linear", torch, "matmul", unordered.product),
    Plant("grouped_linear", torch, "matmul", unordered.product),
    Plant("grouped_linear_batched", torch, "matmul", unordered.product),
    Plant("grouped_gated_linear", torch, "matmul", unordered.product),
    Plant("grouped_gated_linear", longcat.ops.rows, "tree_sum", unordered.columns),
    Plant("permute", longcat.ops.rows, "embedding_bag", unordered.bags),
    Plant("permute_bfloat16", longcat.ops.rows, "sparse_row_sums", unordered.sparse_rows),
    Plant("combine", longcat.ops.rows, "embedding_bag", unordered.bags),
    Plant("combine", longcat.ops.rows, "tree_sum", unordered.columns),
    Plant("combine", longcat.ops.rows, "sum_into_partials", unordered.columns),
    Plant("combine_bfloat16", longcat.ops.rows, "sparse_row_sums", unordered.sparse_rows),
    Plant("combine_bfloat16", longcat.ops.rows, "tree_sum", unordered.columns),
    Plant("rms_norm", Tensor, "sum", unordered.rows_sum),
    Plant("attention", longcat.ops.attention, "product", unordered.product),
    Plant("attention", longcat.ops.attention, "raw_product", unordered.product),
    Plant("attention_long", longcat.ops.attention, "product", unordered.product),
    Plant("cross_entropy", longcat.ops.cross_entropy, "_hidden_gradient", unordered.product),
    Plant("cross_entropy", longcat.ops.cross_entropy, "_weight_gradient", unordered.product),
    Plant("cross_entropy", longcat.ops.cross_entropy, "logits_product", unordered.product),
    Plant("cross_entropy", Tensor, "sum", unordered.rows_sum),
]


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: f"{plant.case}-{plant.attribute}")
def test_planted_unordered_sum_is_noticed(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plant.target, plant.attribute, plant.sum(getattr(plant.target, plant.attribute)))
    assert not repeats(plant.case, times=40)  # two orders of one sum of 868 terms often round alike


def test_every_operator_has_a_plant() -> None:
    assert {plant.case for plant in PLANTS} == set(CASES)
