"""Exchanges between ranks as two calls: `start` returns at once, `wait` gives the tensor; both are autograd nodes.

The backward of a wait starts the reverse exchange, the backward of a start waits for it. Autograd runs nodes that
were made later first, so what stands between the two calls covers the exchange in both directions.
"""

# n ranks of the group, the rank of place p holds shard p

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.crumbs import crumb, departed


class Exchange(ABC):
    """One kind of exchange over one group: how to launch it, and which exchange brings gradients back."""

    bytes_sent: ClassVar[int] = 0  # by this process to others, in all exchanges; for measurements

    def __init__(self, name: str, group: dist.ProcessGroup) -> None:
        self.name, self.group = name, group  # the name is what a person reads where an exchange hangs

    @abstractmethod
    def launch(self, x: Tensor) -> tuple[dist.Work | None, Tensor]:
        """Start moving ``x``, which stays as it is until the work is done → (work, where the result will be)."""

    @abstractmethod
    def elements_sent(self, x: Tensor) -> float:
        """Elements of ``x`` that must leave this rank, whatever algorithm moves them."""

    @abstractmethod
    def reverse(self) -> Exchange:
        """The exchange of the gradients."""


class AllToAll(Exchange):
    """Rows [P, D] in n stretches, one for each rank → the stretches of this place from all ranks, in their order."""

    def __init__(self, name: str, group: dist.ProcessGroup, sent: list[int], received: list[int]) -> None:
        super().__init__(name, group)
        self.sent, self.received = sent, received

    def launch(self, x: Tensor) -> tuple[dist.Work | None, Tensor]:
        out = x.new_empty(sum(self.received), *x.shape[1:])
        return dist.all_to_all_single(out, x, self.received, self.sent, self.group, async_op=True), out

    def elements_sent(self, x: Tensor) -> float:
        return (x.shape[0] - self.sent[dist.get_rank(self.group)]) * x[:1].numel()

    def reverse(self) -> Exchange:
        return AllToAll(self.name, self.group, self.received, self.sent)


class AllGather(Exchange):
    """x [...] → the tensors of all ranks, [n, ...]; gradients come back as the sum over ranks."""

    def launch(self, x: Tensor) -> tuple[dist.Work | None, Tensor]:
        out = x.new_empty(dist.get_world_size(self.group), *x.shape)
        return dist.all_gather_single(out.flatten(0, 1), x, self.group, async_op=True), out

    def elements_sent(self, x: Tensor) -> float:
        return x.numel() * (dist.get_world_size(self.group) - 1)

    def reverse(self) -> Exchange:
        return ReduceScatter(self.name, self.group)


class ReduceScatter(Exchange):
    """x [n, ...] → the sum over ranks of what they hold for this place, [...]."""

    def launch(self, x: Tensor) -> tuple[dist.Work | None, Tensor]:
        out = x.new_empty(x.shape[1:])
        return dist.reduce_scatter_single(out, x.flatten(0, 1), group=self.group, async_op=True), out

    def elements_sent(self, x: Tensor) -> float:
        return x.numel() * (1 - 1 / dist.get_world_size(self.group))

    def reverse(self) -> Exchange:
        return AllGather(self.name, self.group)


@dataclass
class Flight:
    """An exchange under way, forward and backward."""

    exchange: Exchange
    edge: Tensor | None = None  # no elements: it ties `wait` to `start` in autograd's graph
    there: Landing | None = None
    back: Landing | None = None


@dataclass
class Landing:
    """One direction of a flight: what is awaited, and what must stay alive until then."""

    exchange: Exchange
    work: dist.Work | None
    result: Tensor
    kept: Tensor

    @classmethod
    def launch(cls, exchange: Exchange, x: Tensor) -> Landing:
        x = x.contiguous()
        num_bytes = int(exchange.elements_sent(x)) * x.element_size()
        Exchange.bytes_sent += num_bytes
        work, result = exchange.launch(x)
        departed(exchange.name, num_bytes, work)
        return cls(exchange, work, result, x)

    def wait(self) -> Tensor:
        if self.work is not None:
            with crumb(self.exchange.name, among=self.exchange.group):
                self.work.wait()
        return self.result


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        flight.there = Landing.launch(flight.exchange, x)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        flight: Flight = ctx.flight
        assert flight.back is not None, "an exchange was started and its result never used"
        grad = flight.back.wait()
        flight.back = None
        return grad, None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, edge: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        assert flight.there is not None, "an exchange can be awaited once"
        result = flight.there.wait()
        flight.there = None
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        flight: Flight = ctx.flight
        flight.back = Landing.launch(flight.exchange.reverse(), grads[0])
        return grads[0].new_empty(0), None


def start(x: Tensor, exchange: Exchange) -> Flight:
    """Start ``exchange`` of x and return at once. Every start needs its `wait`, on all ranks in the same order."""
    flight = Flight(exchange)
    flight.edge = _Start.apply(x, flight)
    return flight


def wait(flight: Flight) -> Tensor:
    """→ what the exchange brought."""
    edge, flight.edge = flight.edge, None
    return _Wait.apply(edge, flight)  # type: ignore[no-any-return]


def exchanged(x: Tensor, exchange: Exchange) -> Tensor:
    """An exchange that nothing covers."""
    return wait(start(x, exchange))
