"""Sums over ranks: integers as integers, floats in float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import wait_span


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a small tensor over all ranks, in place (over gloo if it is on the CPU)."""
    if dist.get_world_size() > 1:
        with wait_span(Event(SpanKind.SUM)):
            dist.all_reduce(values)
    return values


def broadcast(value: Any) -> Any:
    """The first rank's value on all ranks, for decisions about what differs between machines."""
    shared = [value]
    if dist.get_world_size() > 1:
        with wait_span(Event(SpanKind.BROADCAST)):
            dist.broadcast_object_list(shared, src=0)
    return shared[0]


def all_gather_object(value: Any) -> list[Any]:
    """Every rank's value, in rank order."""
    values = [value] * dist.get_world_size()
    if dist.get_world_size() > 1:
        with wait_span(Event(SpanKind.ALL_GATHER_OBJECT)):
            dist.all_gather_object(values, value)
    return values


def mean_over_ranks(value: float) -> float:
    """The mean over ranks."""
    return sum_scalars([value])[0] / dist.get_world_size()


def min_over_ranks(value: float) -> float:
    """The minimum over ranks."""
    least = torch.tensor(value, dtype=torch.float64)
    if dist.get_world_size() > 1:
        with wait_span(Event(SpanKind.MINIMUM)):
            dist.all_reduce(least, dist.ReduceOp.MIN)
    return float(least)


def max_over_ranks(values: Tensor) -> Tensor:
    """The elementwise maximum of a small tensor over all ranks, in place."""
    if dist.get_world_size() > 1:
        with wait_span(Event(SpanKind.MAXIMUM)):
            dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def sum_scalars(values: list[float]) -> list[float]:
    """Sum Python floats over all ranks, in float64."""
    summed: list[float] = sum_over_ranks(torch.tensor(values, dtype=torch.float64)).tolist()
    return summed


def sum_in_one_collective(numbers: Tensor, *parts: Tensor) -> list[Tensor]:
    """Sum ``numbers`` [n] and float64 tensors over all ranks in one collective; shapes as they came.

    The update depends on the numbers, so they are added in the order of ranks. Each rank sends them in its own
    row, where all others send zeros: they arrive unchanged, whatever order the reduction takes.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rows = torch.zeros(world_size, numbers.numel(), dtype=torch.float64)
    rows[rank] = numbers.double().cpu()
    flat = sum_over_ranks(torch.cat([rows.flatten(), *(part.double().cpu().flatten() for part in parts)]))
    summed = flat.split([rows.numel(), *(part.numel() for part in parts)])
    total = torch.zeros(numbers.numel(), dtype=torch.float64)
    for row in summed[0].view(world_size, -1):
        total += row
    return [total, *(one.view(part.shape) for one, part in zip(summed[1:], parts, strict=True))]
