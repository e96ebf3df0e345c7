"""Deferred weight gradients: autograd's sums in the parameter's dtype and layout, each computed once."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from longcat.modules import FeedForward, Linear
from parallel.pipeline.weight_grad_store import WeightGradQueue, add_gradient, defer_weight_gradients
from tests.support.distributed import run_ranks


def feed_forward() -> FeedForward:
    torch.manual_seed(0)
    model = FeedForward(6, 10)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def test_deferred_gradients_equal_autograd_s() -> None:
    """With and without recomputation."""
    batches = torch.randn(3, 5, 6)
    plain = feed_forward()
    for x in batches:
        plain(x).square().sum().backward()
    for recompute in (False, True):
        late, queue = feed_forward(), WeightGradQueue()
        defer_weight_gradients(late, queue)
        waiting = []
        for x in batches:
            y = checkpoint(late, x, use_reentrant=False) if recompute else late(x)
            y.square().sum().backward()
            waiting.append(queue.take())
        assert all(parameter.grad is None for parameter in late.parameters())
        for run in waiting:
            run()
        for mine, theirs in zip(late.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad)  # type: ignore[arg-type]


def test_input_gradients_do_not_wait_for_weight_gradients() -> None:
    late, queue = feed_forward(), WeightGradQueue()
    defer_weight_gradients(late, queue)
    x, y = (torch.randn(5, 6, requires_grad=True) for _ in range(2))
    y.data.copy_(x.data)
    late(x).sum().backward()
    feed_forward()(y).sum().backward()
    assert torch.equal(x.grad, y.grad)  # type: ignore[arg-type]
    assert len(queue) == 3


def test_deferred_gradient_runs_once() -> None:
    layer, queue = Linear(2, 3), WeightGradQueue()
    nn.init.ones_(layer.weight)
    queue.put(layer, "weight", lambda: torch.ones(3, 2))
    run = queue.take()
    run()
    run()
    queue.take()()
    assert torch.equal(layer.weight.grad, torch.ones(3, 2))  # type: ignore[arg-type]


def test_parameter_is_looked_up_when_its_gradient_is_computed() -> None:
    layer, queue = Linear(2, 3), WeightGradQueue()
    queue.put(layer, "weight", lambda: torch.ones(3, 2))
    layer.weight = nn.Parameter(torch.zeros(3, 2, dtype=torch.bfloat16))
    queue.take()()
    assert layer.weight.grad is not None and layer.weight.grad.dtype is torch.bfloat16


def gradient_of_a_shard() -> dict[str, Any]:
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    rank = mesh.get_local_rank()
    parameter = nn.Parameter(DTensor.from_local(torch.zeros(2, 3), mesh, [Shard(0)], run_check=False))
    for _ in range(2):
        add_gradient(parameter, torch.full((2, 3), float(rank + 1)))
    grad = parameter.grad
    assert isinstance(grad, DTensor)
    full = grad.full_tensor()
    torch.distributed.destroy_process_group()
    return {"placements": str(grad.placements), "full": full}


def test_sharded_parameter_gets_a_sharded_gradient() -> None:
    for found in run_ranks(gradient_of_a_shard, 2):
        assert found["placements"] == str((Shard(0),))
        assert found["full"][:, 0].tolist() == [2, 2, 4, 4]
