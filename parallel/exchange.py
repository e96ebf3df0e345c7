"""Exchanges between ranks as two calls: `start` returns at once, `wait` gives the tensor; both are autograd nodes.

The backward of a wait starts the reverse exchange, the backward of a start waits for it. Autograd runs nodes that
were made later first, so what stands between the two calls covers the exchange in both directions.

The nodes are made on the caller's stream and switch to the side stream (`parallel/streams.py`) inside, forward and
backward: autograd would make the caller's stream wait for a node of another stream as soon as the node is queued.
Rows are reordered beside an exchange, on the side stream too: a `Move` before it leaves, a `Move` after it has come.
"""

# n ranks of the group, the rank of place p holds shard p

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import all_gather, reduce_scatter
from parallel.crumbs import crumb, departed
from parallel.streams import HERE, Lanes


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
        return all_gather(out, x, self.group), out

    def elements_sent(self, x: Tensor) -> float:
        return x.numel() * (dist.get_world_size(self.group) - 1)

    def reverse(self) -> Exchange:
        return ReduceScatter(self.name, self.group)


class ReduceScatter(Exchange):
    """x [n, ...] → the sum over ranks of what they hold for this place, [...]."""

    def launch(self, x: Tensor) -> tuple[dist.Work | None, Tensor]:
        out = x.new_empty(x.shape[1:])
        return reduce_scatter(out, x, self.group), out

    def elements_sent(self, x: Tensor) -> float:
        return x.numel() * (1 - 1 / dist.get_world_size(self.group))

    def reverse(self) -> Exchange:
        return AllGather(self.name, self.group)


class Move(NamedTuple):
    """A reordering of rows beside an exchange, and that of their gradients on the way back.

    ``back`` gets ``saved()`` behind the gradients. Autograd keeps these tensors, as it keeps what any node saves, so
    that a region that is computed again does without them in between.
    """

    there: Callable[[Tensor], Tensor]
    back: Callable[..., Tensor]
    saved: Callable[[], tuple[Tensor, ...]] = tuple  # asked when the exchange is awaited


STAY = Move(lambda x: x, lambda grad: grad)


def arrive(name: str, group: dist.ProcessGroup, lanes: Lanes, *given: Tensor) -> None:
    """Let the caller's stream wait for the side stream and use ``given`` from there: for an exchange is what it waits.

    How long it stands here is what nothing has covered. With one lane the wait has been behind the exchange itself.
    """
    if lanes.runs_ahead:
        with crumb(name, among=group):
            lanes.join(*given)


@dataclass
class Landing:
    """One direction of a flight: what is awaited, and what must stay alive until then."""

    exchange: Exchange
    work: dist.Work | None
    result: Tensor | None
    kept: Tensor | None
    move: Callable[[Tensor], Tensor]
    lanes: Lanes

    @classmethod
    def launch(
        cls,
        exchange: Exchange,
        x: Tensor,
        before: Callable[[Tensor], Tensor],
        after: Callable[[Tensor], Tensor],
        lanes: Lanes,
    ) -> Landing:
        """Queue an exchange of x, which the side stream can see, between two reorderings."""
        with lanes.aside():
            x = before(x).contiguous()
            num_bytes = int(exchange.elements_sent(x)) * x.element_size()
            Exchange.bytes_sent += num_bytes
            work, result = exchange.launch(x)
        departed(exchange.name, num_bytes, work)
        landing = cls(exchange, work, result, x, after, lanes)
        for started in _regions:
            started.append(landing)
        if lanes.at_once:
            landing.settle()
        return landing

    def settle(self) -> None:
        """Let the side stream wait for the result and put it in order. A second call does nothing."""
        if self.kept is None:
            return
        assert self.result is not None
        with self.lanes.aside():
            if self.work is not None:
                with nullcontext() if self.lanes.runs_ahead else crumb(self.exchange.name, among=self.exchange.group):
                    self.work.wait()
            self.result = self.move(self.result)
        self.work = self.kept = None

    def wait(self, stays_aside: bool = False) -> Tensor:
        """→ the result, once, for the caller's stream, or for the side stream alone."""
        self.settle()
        result, self.result = self.result, None
        assert result is not None, "the result of an exchange is handed out once"
        if not stays_aside:
            arrive(self.exchange.name, self.exchange.group, self.lanes, result)
        return result


_regions: list[list[Landing]] = []  # what has been launched inside each open `all_awaited`, outermost first


@contextmanager
def all_awaited() -> Iterator[None]:
    """When the block ends, however it ends, everything that was launched in it has been awaited."""
    started: list[Landing] = []
    _regions.append(started)
    try:
        yield
    finally:
        _regions.pop()
        for landing in started:
            if landing.kept is not None:
                landing.wait()


@dataclass
class Flight:
    """An exchange under way, forward and backward."""

    lanes: Lanes
    x: Tensor | None = None  # until it is sent
    edge: Tensor | None = None  # no elements: it ties `wait` to `start` in autograd's graph
    exchange: Exchange | None = None
    moves: tuple[Move, Move] | None = None  # before and after; until it is awaited
    there: Landing | None = None
    back: Landing | None = None


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        flight.lanes.fork(x)
        flight.x = x.detach()
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
    def forward(ctx: Any, edge: Tensor, flight: Flight, stays_aside: bool) -> Tensor:
        ctx.flight = flight
        assert flight.there is not None and flight.moves is not None, "an exchange is awaited once, after it was sent"
        before, after = flight.moves
        ctx.backs = after.back, before.back
        result, of_after = flight.there.wait(stays_aside), after.saved()
        ctx.num_after = len(of_after)
        ctx.save_for_backward(*of_after, *before.saved())
        flight.there = flight.moves = None
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        flight: Flight = ctx.flight
        assert flight.exchange is not None
        saved = ctx.saved_tensors  # first of all: a region that is computed again is computed here, on this stream
        of_after, of_before = saved[: ctx.num_after], saved[ctx.num_after :]
        undo_after, undo_before = ctx.backs
        flight.lanes.fork(grads[0])
        flight.back = Landing.launch(
            flight.exchange.reverse(),
            grads[0],
            lambda grad: undo_after(grad, *of_after),
            lambda grad: undo_before(grad, *of_before),
            flight.lanes,
        )
        return grads[0].new_empty(0), None, None


def hold(x: Tensor, lanes: Lanes = HERE) -> Flight:
    """Give x its place in autograd's graph and in the order of streams; `send` says later where it goes."""
    flight = Flight(lanes)
    flight.edge = _Start.apply(x, flight)
    return flight


def send(flight: Flight, exchange: Exchange, before: Move = STAY, after: Move = STAY) -> Flight:
    """Start the exchange of what is held and return at once.

    Every flight that is sent needs its `wait`, on all ranks in the same order.
    """
    assert flight.x is not None, "a flight is sent once"
    flight.exchange, flight.moves = exchange, (before, after)
    with torch.no_grad():
        flight.there = Landing.launch(exchange, flight.x, before.there, after.there, flight.lanes)
    flight.x = None
    return flight


def start(x: Tensor, exchange: Exchange, lanes: Lanes = HERE, before: Move = STAY, after: Move = STAY) -> Flight:
    """`hold` and `send`."""
    return send(hold(x, lanes), exchange, before, after)


def wait(flight: Flight, stays_aside: bool = False) -> Tensor:
    """→ what the exchange brought, for what the caller queues next, or (``stays_aside``) for what is queued aside."""
    edge, flight.edge = flight.edge, None
    return _Wait.apply(edge, flight, stays_aside)  # type: ignore[no-any-return]


def exchanged(x: Tensor, exchange: Exchange) -> Tensor:
    """An exchange that nothing covers."""
    return wait(start(x, exchange))
