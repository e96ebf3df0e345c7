"""Sums over ranks: integers as integers, floats in float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longcat.documents import to_device
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import device_span, launching, wait_span


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


def to_host(values: Tensor) -> Tensor:
    """Copy a tensor to the host; waits until the device has computed it, in a span that the watchdog sees."""
    if values.device.type == "cpu":
        return values.cpu()
    with device_span():
        return values.cpu()


def own_row(numbers: Tensor) -> Tensor:
    """``numbers`` [n] in this rank's row, zeros in all others: [W, n] float64, summed over ranks each rank's numbers.

    They arrive unchanged, whatever order the reduction takes.
    """
    rows = torch.zeros(dist.get_world_size(), numbers.numel(), dtype=torch.float64, device=numbers.device)
    rows[dist.get_rank()] = numbers.double()
    return rows


def sum_in_rank_order(rows: Tensor) -> Tensor:
    """The sum of rows [W, n] → [n], added one row after the other from 0, bit for bit."""
    return rows.cumsum(0)[-1] + 0.0  # a reduction may add in pairs, a cumulative sum cannot; -0.0 becomes 0.0


def sum_in_one_collective(numbers: Tensor, *parts: Tensor) -> list[Tensor]:
    """Sum ``numbers`` [n] and other tensors over all ranks in one collective → float64 on the host, shapes as given.

    The update depends on the numbers, so each rank sends them in a row of its own and they are added in the order of
    ranks. The collective runs on the device of the numbers, by its backend, and the host reads the result in one copy.
    """
    device, rows = numbers.device, own_row(numbers)
    flat = sum_over_ranks(torch.cat([rows.flatten(), *(to_device(part.double(), device).flatten() for part in parts)]))
    summed = to_host(flat).split([rows.numel(), *(part.numel() for part in parts)])
    total = sum_in_rank_order(summed[0].view(rows.shape))
    return [total, *(one.view(part.shape) for one, part in zip(summed[1:], parts, strict=True))]


class PendingSum:
    """The sum of tensors over all ranks, in float64, that has begun: nothing waits for it before `wait`."""

    def __init__(self, *parts: Tensor) -> None:
        device = parts[0].device
        self._shapes = [part.shape for part in parts]
        self._flat = torch.cat([to_device(part.double(), device).flatten() for part in parts])
        with launching(Event(SpanKind.SUM)):
            self._work = dist.all_reduce(self._flat, async_op=True) if dist.get_world_size() > 1 else None

    def wait(self) -> list[Tensor]:
        """The sums on the host, in one copy."""
        if self._work is not None:
            with wait_span(Event(SpanKind.SUM)):
                self._work.wait()
        summed = to_host(self._flat).split([shape.numel() for shape in self._shapes])
        return [one.view(shape) for one, shape in zip(summed, self._shapes, strict=True)]
