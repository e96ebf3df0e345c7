"""Exchanges between ranks as two calls: `start` returns at once, `wait` gives the tensor; both are autograd nodes.

The backward of a wait starts the reverse exchange, the backward of a start waits for it. Autograd runs nodes that
were made later first, so what stands between the two calls covers the exchange in both directions.

The nodes are made on the caller's stream and switch to the side stream (`parallel/collectives/streams.py`) inside,
forward and backward: autograd would make the caller's stream wait for a node of another stream as soon as the node is
queued. Rows are reordered beside an exchange, on the side stream too: a `Reorder` before it leaves, a `Reorder` after
it has come.
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

from parallel.collectives.point_to_point import all_gather, reduce_scatter
from parallel.collectives.streams import CURRENT_STREAM, StreamContext
from parallel.watchdog.events import Event
from parallel.watchdog.spans import record_launch, wait_span


class Collective(ABC):
    """One kind of exchange over one group: how to launch it, and which exchange brings gradients back."""

    bytes_sent: ClassVar[int] = 0  # by this process to others, in all exchanges; for measurements

    def __init__(self, event: Event, group: dist.ProcessGroup) -> None:
        self.event, self.group = event, group  # the event is what a message names where a collective hangs

    @abstractmethod
    def launch(self, x: Tensor) -> tuple[dist.Work | None, Tensor]:
        """Start moving ``x``, which stays as it is until the work is done → (work, where the result will be)."""

    @abstractmethod
    def elements_sent(self, x: Tensor) -> float:
        """Elements of ``x`` that must leave this rank, whatever algorithm moves them."""

    @abstractmethod
    def reverse(self) -> Collective:
        """The exchange of the gradients."""


class AllToAll(Collective):
    """Rows [P, D] in n stretches, one for each rank → the stretches of this place from all ranks, in their order."""

    def __init__(self, event: Event, group: dist.ProcessGroup, sent: list[int], received: list[int]) -> None:
        super().__init__(event, group)
        self.sent, self.received = sent, received

    def launch(self, x: Tensor) -> tuple[dist.Work | None, Tensor]:
        out = x.new_empty(sum(self.received), *x.shape[1:])
        return dist.all_to_all_single(out, x, self.received, self.sent, self.group, async_op=True), out

    def elements_sent(self, x: Tensor) -> float:
        return (x.shape[0] - self.sent[dist.get_rank(self.group)]) * x[:1].numel()

    def reverse(self) -> Collective:
        return AllToAll(self.event, self.group, self.received, self.sent)


class AllGather(Collective):
    """x [...] → the tensors of all ranks, [n, ...]; gradients come back as the sum over ranks."""

    def launch(self, x: Tensor) -> tuple[dist.Work | None, Tensor]:
        out = x.new_empty(dist.get_world_size(self.group), *x.shape)
        return all_gather(out, x, self.group), out

    def elements_sent(self, x: Tensor) -> float:
        return x.numel() * (dist.get_world_size(self.group) - 1)

    def reverse(self) -> Collective:
        return ReduceScatter(self.event, self.group)


class ReduceScatter(Collective):
    """x [n, ...] → the sum over ranks of what they hold for this place, [...]."""

    def launch(self, x: Tensor) -> tuple[dist.Work | None, Tensor]:
        out = x.new_empty(x.shape[1:])
        return reduce_scatter(out, x, self.group), out

    def elements_sent(self, x: Tensor) -> float:
        return x.numel() * (1 - 1 / dist.get_world_size(self.group))

    def reverse(self) -> Collective:
        return AllGather(self.event, self.group)


class Reorder(NamedTuple):
    """A reordering of rows beside an exchange, and that of their gradients on the way back.

    ``back`` gets ``saved()`` behind the gradients. Autograd keeps these tensors, as it keeps what any node saves, so
    that a region that is computed again does without them in between.
    """

    there: Callable[[Tensor], Tensor]
    back: Callable[..., Tensor]
    saved: Callable[[], tuple[Tensor, ...]] = tuple  # asked when the exchange is awaited


NO_REORDER = Reorder(lambda x: x, lambda grad: grad)


def wait_on_stream(event: Event, group: dist.ProcessGroup, streams: StreamContext, *given: Tensor) -> None:
    """Let the caller's stream wait for the side stream and use ``given`` from there: for an exchange is what it waits.

    How long it stands here is what nothing has covered. With one lane the wait has been behind the exchange itself.
    """
    if streams.is_async_host:
        with wait_span(event, group):
            streams.join(*given)


@dataclass
class InFlight:
    """One direction of a flight: what is awaited, and what must stay alive until then."""

    exchange: Collective
    work: dist.Work | None
    result: Tensor | None
    kept: Tensor | None
    move: Callable[[Tensor], Tensor]
    streams: StreamContext

    @classmethod
    def launch(
        cls,
        exchange: Collective,
        x: Tensor,
        before: Callable[[Tensor], Tensor],
        after: Callable[[Tensor], Tensor],
        streams: StreamContext,
    ) -> InFlight:
        """Queue an exchange of x, which the side stream can see, between two reorderings."""
        with streams.on_side_stream():
            x = before(x).contiguous()
            num_bytes = int(exchange.elements_sent(x)) * x.element_size()
            Collective.bytes_sent += num_bytes
            work, result = exchange.launch(x)
        record_launch(exchange.event, num_bytes, work)
        in_flight = cls(exchange, work, result, x, after, streams)
        for started in _regions:
            started.append(in_flight)
        if streams.blocking:
            in_flight.complete()
        return in_flight

    def complete(self) -> None:
        """Let the side stream wait for the result and put it in order. A second call does nothing."""
        if self.kept is None:
            return
        assert self.result is not None
        with self.streams.on_side_stream():
            if self.work is not None:
                with (
                    nullcontext() if self.streams.is_async_host else wait_span(self.exchange.event, self.exchange.group)
                ):
                    self.work.wait()
            self.result = self.move(self.result)
        self.work = self.kept = None

    def wait(self, on_side: bool = False) -> Tensor:
        """→ the result, once, for the caller's stream, or for the side stream alone."""
        self.complete()
        result, self.result = self.result, None
        assert result is not None, "the result of an exchange is handed out once"
        if not on_side:
            wait_on_stream(self.exchange.event, self.exchange.group, self.streams, result)
        return result


_regions: list[list[InFlight]] = []  # what has been launched inside each open `wait_for_all`, outermost first


@contextmanager
def wait_for_all() -> Iterator[None]:
    """When the block ends, however it ends, everything that was launched in it has been awaited."""
    started: list[InFlight] = []
    _regions.append(started)
    try:
        yield
    finally:
        _regions.pop()
        for in_flight in started:
            if in_flight.kept is not None:
                in_flight.wait()


@dataclass
class AsyncCollective:
    """An exchange under way, forward and backward."""

    streams: StreamContext
    x: Tensor | None = None  # until it is sent
    autograd_token: Tensor | None = None  # no elements: it ties `wait` to `start` in autograd's graph
    exchange: Collective | None = None
    reorders: tuple[Reorder, Reorder] | None = None  # before and after; until it is awaited
    there: InFlight | None = None
    back: InFlight | None = None


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pending_collective: AsyncCollective) -> Tensor:
        ctx.pending_collective = pending_collective
        pending_collective.streams.fork(x)
        pending_collective.x = x.detach()
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        pending_collective: AsyncCollective = ctx.pending_collective
        assert pending_collective.back is not None, "an exchange was started and its result never used"
        grad = pending_collective.back.wait()
        pending_collective.back = None
        return grad, None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, autograd_token: Tensor, pending_collective: AsyncCollective, on_side: bool) -> Tensor:
        ctx.pending_collective = pending_collective
        assert pending_collective.there is not None and pending_collective.reorders is not None, (
            "an exchange is awaited once, after it was sent"
        )
        before, after = pending_collective.reorders
        ctx.backs = after.back, before.back
        result, of_after = pending_collective.there.wait(on_side), after.saved()
        ctx.num_after = len(of_after)
        ctx.save_for_backward(*of_after, *before.saved())
        pending_collective.there = pending_collective.reorders = None
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        pending_collective: AsyncCollective = ctx.pending_collective
        assert pending_collective.exchange is not None
        saved = ctx.saved_tensors  # first of all: a region that is computed again is computed here, on this stream
        of_after, of_before = saved[: ctx.num_after], saved[ctx.num_after :]
        undo_after, undo_before = ctx.backs
        pending_collective.streams.fork(grads[0])
        pending_collective.back = InFlight.launch(
            pending_collective.exchange.reverse(),
            grads[0],
            lambda grad: undo_after(grad, *of_after),
            lambda grad: undo_before(grad, *of_before),
            pending_collective.streams,
        )
        return grads[0].new_empty(0), None, None


def stage_input(x: Tensor, streams: StreamContext = CURRENT_STREAM) -> AsyncCollective:
    """Give x its place in autograd's graph and in the order of streams; `launch_staged` says later where it goes."""
    pending_collective = AsyncCollective(streams)
    pending_collective.autograd_token = _Start.apply(x, pending_collective)
    return pending_collective


def launch_staged(
    pending_collective: AsyncCollective, exchange: Collective, before: Reorder = NO_REORDER, after: Reorder = NO_REORDER
) -> AsyncCollective:
    """Start the exchange of what is held and return at once.

    Every flight that is sent needs its `wait`, on all ranks in the same order.
    """
    assert pending_collective.x is not None, "a flight is sent once"
    pending_collective.exchange, pending_collective.reorders = exchange, (before, after)
    with torch.no_grad():
        pending_collective.there = InFlight.launch(
            exchange, pending_collective.x, before.there, after.there, pending_collective.streams
        )
    pending_collective.x = None
    return pending_collective


def start(
    x: Tensor,
    exchange: Collective,
    streams: StreamContext = CURRENT_STREAM,
    before: Reorder = NO_REORDER,
    after: Reorder = NO_REORDER,
) -> AsyncCollective:
    """`stage_input` and `launch_staged`."""
    return launch_staged(stage_input(x, streams), exchange, before, after)


def wait(pending_collective: AsyncCollective, on_side: bool = False) -> Tensor:
    """→ what the exchange brought, for what the caller queues next, or (``stays_aside``) for what is queued aside."""
    autograd_token, pending_collective.autograd_token = pending_collective.autograd_token, None
    return _Wait.apply(autograd_token, pending_collective, on_side)  # type: ignore[no-any-return]


def run_blocking(x: Tensor, exchange: Collective) -> Tensor:
    """An exchange that nothing covers."""
    return wait(start(x, exchange))
