"""Padding every expert to the same number of rows, so that one batched GEMM computes them, changes no result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longcat.ops.grouped import BLOCK, grouped_linear, grouped_product, grouped_sum, padded_capacity
from longcat.ops.matmul import cpu_has_amx
from longcat.ops.permute import combine, permute, plan_permutation
from parallel.expert.dispatchers import ReceiveOrder
from tests.support.distributed import run_ranks
from tests.support.three_steps import MODEL, train_three_steps

EXPERTS, ZERO, WIDTH = 4, 2, 8


def always(counts: Tensor, like: Tensor) -> int:
    """A capacity for every routing and dtype, where `padded_capacity` would often give None."""
    return max(BLOCK, -(-int(counts.max()) // BLOCK) * BLOCK)


def train_padded(overrides: list[str]) -> dict[str, Any]:
    import longcat.dispatch
    import parallel.expert.dispatchers

    calls = []

    def recording(counts: Tensor, like: Tensor) -> int:
        calls.append(counts.shape[0])
        return always(counts, like)

    longcat.dispatch.padded_capacity = parallel.expert.dispatchers.padded_capacity = recording
    return {**train_three_steps(overrides), "calls": len(calls)}


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return run_ranks(train_three_steps, 1, [*MODEL, "model.num_experts=6"])[0]


@pytest.mark.parametrize(
    "layout",
    [
        [],
        ["parallel.ep=2"],
        ["parallel.ep=2", "parallel.transport=all_gather"],
        ["parallel.ep=2", "overlap.num_chunks=3", "parallel.recompute=full"],
    ],
    ids=["alone", "all_to_all", "all_gather", "chunks_recomputed"],
)
def test_training_with_padding_is_the_same(layout: list[str], plain: dict[str, Any]) -> None:
    for found in run_ranks(train_padded, 2 if layout else 1, [*MODEL, "model.num_experts=6", *layout]):
        assert found["calls"] > 0
        for name, reference in plain["grads"].items():
            error = torch.linalg.vector_norm(found["grads"][name] - reference)
            assert error <= 2e-6 * torch.linalg.vector_norm(reference) + 1e-12, name
        for mine, theirs in zip(found["metrics"], plain["metrics"], strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("tokens,top_k", [(40, 3), (7, 1), (1, 2)])
def test_padding_rows_contribute_nothing_and_receive_zeros(tokens: int, top_k: int) -> None:
    indices = torch.rand(tokens, EXPERTS + ZERO, generator=torch.Generator().manual_seed(tokens)).topk(top_k).indices
    x, gates, weight = draw(0, tokens, WIDTH), draw(1, tokens, top_k), draw(2, EXPERTS, WIDTH, WIDTH)
    plan = plan_permutation(indices, EXPERTS, EXPERTS + ZERO)
    capacity = always(plan.counts[:EXPERTS], x) + BLOCK  # more than the busiest needs
    padded = plan.pad_to_capacity(capacity, EXPERTS)
    assert padded.counts[:EXPERTS].tolist() == [capacity] * EXPERTS
    assert torch.equal(padded.counts[EXPERTS:], plan.counts[EXPERTS:])
    results = []
    for one in (plan, padded):
        rows = grouped_linear(permute(x, one), weight, one.counts[:EXPERTS].cumsum(0).int())
        rows.retain_grad()
        out = combine(rows, gates, one, x)
        assert not permute(x, one)[one.token < 0].any()
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, gates, weight], retain_graph=True)))
        (of_rows,) = torch.autograd.grad(out.square().sum(), [rows])
        assert not of_rows[one.selection < 0].any()
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_batched_product_equals_one_product_per_expert(dtype: torch.dtype) -> None:
    rows, weight = draw(0, 4 * BLOCK, 8).to(dtype), draw(1, 4, 8, 16).to(dtype)
    grad, ends = draw(2, 4 * BLOCK, 16).to(dtype), torch.arange(BLOCK, 5 * BLOCK, BLOCK, dtype=torch.int32)
    each = [slice(end - BLOCK, end) for end in ends.tolist()]
    separate = torch.cat([rows[part].double() @ weight[number].double() for number, part in enumerate(each)])
    summed = torch.stack([grad[part].double().t() @ rows[part].double() for part in each])
    torch.testing.assert_close(grouped_product(rows, weight, ends), separate.to(dtype))
    torch.testing.assert_close(grouped_sum(grad, rows, ends), summed.to(dtype))


def test_capacity_is_padded_only_where_it_pays() -> None:
    narrow, wide = torch.empty(1, dtype=torch.bfloat16), torch.empty(1)
    assert padded_capacity(torch.tensor([250, 260, 240]), narrow) == (272 if cpu_has_amx() else None)
    assert padded_capacity(torch.tensor([250, 260, 240]), wide) is None
    assert padded_capacity(torch.tensor([500, 100, 100]), narrow) is None  # the busiest has twice the mean
    assert padded_capacity(torch.tensor([0, 0]), narrow) is None


def test_rows_reach_their_experts_and_return() -> None:
    received = torch.tensor([[2, 0, 3], [1, 2, 0]])  # from 2 ranks for 3 experts
    rows = torch.arange(1.0, 9.0)[:, None]
    order = ReceiveOrder(received, 8, 4)
    to_experts, to_ranks = order.reorder(to_experts=True), order.reorder(to_experts=False)
    at_experts = to_experts.forward(rows)
    assert at_experts[:, 0].tolist() == [1, 2, 6, 0, 7, 8, 0, 0, 3, 4, 5, 0]
    assert order.counts.tolist() == [4, 4, 4]
    assert torch.equal(to_ranks.forward(at_experts), rows)
    assert torch.equal(to_experts.backward(at_experts, *to_experts.saved()), rows)
    assert torch.equal(to_ranks.backward(rows, *to_ranks.saved()), at_experts)
