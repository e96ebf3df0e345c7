"""Asynchronous collectives as two autograd nodes: `start` returns at once, `wait` returns the result.

The backward of a wait starts the reverse collective; the backward of a start waits for it. Autograd runs later nodes
first, so computation between the two calls overlaps with the collective in both directions.

The nodes are created on the caller's stream and switch to the side stream (`parallel/collectives/streams.py`) inside,
forward and backward: for a node of another stream, autograd would make the caller's stream wait as soon as the node is
queued. Rows are reordered on the side stream too, by one `Reorder` before the collective and one after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives.collective import Collective
from parallel.collectives.streams import CURRENT_STREAM, StreamContext
from parallel.sdc.ledger import LEDGER
from parallel.watchdog.events import Event
from parallel.watchdog.spans import launching, record_launch, wait_span


class Reorder(NamedTuple):
    """A reordering of rows before or after a collective, and the one of their gradients.

    ``backward`` gets the gradients and ``saved()``. Autograd saves these tensors, so that a recomputed region does not
    keep them until its backward.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[..., Tensor]
    saved: Callable[[], tuple[Tensor, ...]] = tuple  # called when the collective is waited for


NO_REORDER = Reorder(lambda x: x, lambda grad: grad)


def wait_on_stream(event: Event, group: dist.ProcessGroup, streams: StreamContext, *given: Tensor) -> None:
    """Let the caller's stream wait for the side stream, on which a collective ends, and use ``given`` from there.

    The time of this wait is the exposed communication. Without a side stream, the wait for the collective is.
    """
    if streams.is_async_host:
        with wait_span(event, group):
            streams.join(*given)


@dataclass
class InFlight:
    """One direction of a collective under way, and the tensors that must stay alive until it is done."""

    collective: Collective
    work: dist.Work | None
    result: Tensor | None
    input: Tensor | None
    reorder: Callable[[Tensor], Tensor]
    streams: StreamContext
    number: int  # of the transfer in its group, for the ledger

    @classmethod
    def launch(
        cls,
        collective: Collective,
        x: Tensor,
        before: Callable[[Tensor], Tensor],
        after: Callable[[Tensor], Tensor],
        streams: StreamContext,
    ) -> InFlight:
        """Queue a collective of x, which the side stream can read, between two reorderings."""
        with streams.on_side_stream():
            x = before(x).contiguous()
            num_bytes = int(collective.elements_sent(x)) * x.element_size()
            Collective.bytes_sent += num_bytes
            with launching(collective.event, collective.group):
                work, result = collective.launch(x)
            number = _record_sent(collective, x)
        record_launch(collective.event, num_bytes, work)
        in_flight = cls(collective, work, result, x, after, streams, number)
        for started in _regions:
            started.append(in_flight)
        if streams.blocking:
            in_flight.complete()
        return in_flight

    def complete(self) -> None:
        """Let the side stream wait for the result and put it in order. A second call does nothing."""
        if self.input is None:
            return
        assert self.result is not None
        with self.streams.on_side_stream():
            if self.work is not None:
                with (
                    nullcontext()
                    if self.streams.is_async_host
                    else wait_span(self.collective.event, self.collective.group)
                ):
                    self.work.wait()
            _record_received(self.collective, self.result, self.number)
            self.result = self.reorder(self.result)
        self.work = self.input = None

    def wait(self, on_side: bool = False) -> Tensor:
        """→ the result, once, for the caller's stream, or for the side stream alone."""
        self.complete()
        result, self.result = self.result, None
        assert result is not None, "the result of a collective is returned once"
        if not on_side:
            wait_on_stream(self.collective.event, self.collective.group, self.streams, result)
        return result


def _record_sent(collective: Collective, x: Tensor) -> int:
    """Record what a collective takes to other ranks; returns its number in its group."""
    if not LEDGER.watches_sends or (parts := collective.outgoing(x)) is None:
        return 0
    return LEDGER.send_parts(collective.event.text, collective.group, *parts)


def _record_received(collective: Collective, result: Tensor, number: int) -> None:
    if LEDGER.is_watching and (parts := collective.incoming(result)) is not None:
        LEDGER.receive_parts(collective.event.text, collective.group, number, *parts)


@dataclass
class Unsent:
    """Stands in for a forward collective whose result this rank knows: only its backward communicates."""

    result: Tensor

    def wait(self, on_side: bool = False) -> Tensor:
        return self.result


_regions: list[list[InFlight]] = []  # what has been launched inside each open `wait_for_all`, outermost first


@contextmanager
def wait_for_all() -> Iterator[None]:
    """Wait at the end of the block, also after an error, for every collective that was launched in it."""
    started: list[InFlight] = []
    _regions.append(started)
    try:
        yield
    finally:
        _regions.pop()
        for in_flight in started:
            if in_flight.input is not None:
                in_flight.wait()


@dataclass
class AsyncCollective:
    """A collective under way, forward and backward."""

    streams: StreamContext
    x: Tensor | None = None  # until it is sent
    autograd_token: Tensor | None = None  # no elements: it ties `wait` to `start` in autograd's graph
    collective: Collective | None = None
    reorders: tuple[Reorder, Reorder] | None = None  # before and after; until `wait`
    forward: InFlight | Unsent | None = None
    backward: InFlight | None = None


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pending: AsyncCollective) -> Tensor:
        ctx.pending = pending
        pending.streams.fork(x)
        pending.x = x.detach()
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        pending: AsyncCollective = ctx.pending
        assert pending.backward is not None, "a collective was started and its result never used"
        grad = pending.backward.wait()
        pending.backward = None
        return grad, None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, autograd_token: Tensor, pending: AsyncCollective, on_side: bool) -> Tensor:
        ctx.pending = pending
        assert pending.forward is not None and pending.reorders is not None, (
            "a collective is waited for once, after its launch"
        )
        before, after = pending.reorders
        ctx.reorder_backwards = after.backward, before.backward
        result, after_saved = pending.forward.wait(on_side), after.saved()
        ctx.num_after = len(after_saved)
        ctx.save_for_backward(*after_saved, *before.saved())
        pending.forward = pending.reorders = None
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        pending: AsyncCollective = ctx.pending
        assert pending.collective is not None
        saved = ctx.saved_tensors  # first: reading them runs a recomputation, which belongs on this stream
        after_saved, before_saved = saved[: ctx.num_after], saved[ctx.num_after :]
        after_backward, before_backward = ctx.reorder_backwards
        pending.streams.fork(grads[0])
        pending.backward = InFlight.launch(
            pending.collective.reverse(),
            grads[0],
            lambda grad: after_backward(grad, *after_saved),
            lambda grad: before_backward(grad, *before_saved),
            pending.streams,
        )
        return grads[0].new_empty(0), None, None


def stage_input(x: Tensor, streams: StreamContext = CURRENT_STREAM) -> AsyncCollective:
    """Fix x's position in autograd's graph and in the order of streams; `launch_staged` gives the collective."""
    pending = AsyncCollective(streams)
    pending.autograd_token = _Start.apply(x, pending)
    return pending


def launch_staged(
    pending: AsyncCollective, collective: Collective, before: Reorder = NO_REORDER, after: Reorder = NO_REORDER
) -> AsyncCollective:
    """Start the collective of the staged input and return at once.

    Every one needs its `wait`, in the same order on all ranks.
    """
    assert pending.x is not None, "a staged input is launched once"
    pending.collective, pending.reorders = collective, (before, after)
    with torch.no_grad():
        pending.forward = InFlight.launch(collective, pending.x, before.forward, after.forward, pending.streams)
    pending.x = None
    return pending


def send_gradient_alone(
    pending: AsyncCollective, collective: Collective, result: Tensor, before: Reorder, after: Reorder
) -> AsyncCollective:
    """`launch_staged` of a collective with a known ``result``: nothing is sent forward, only its gradient back."""
    pending.collective, pending.reorders, pending.forward, pending.x = collective, (before, after), Unsent(result), None
    return pending


def start(
    x: Tensor,
    collective: Collective,
    streams: StreamContext = CURRENT_STREAM,
    before: Reorder = NO_REORDER,
    after: Reorder = NO_REORDER,
) -> AsyncCollective:
    """`stage_input` and `launch_staged`."""
    return launch_staged(stage_input(x, streams), collective, before, after)


def wait(pending: AsyncCollective, on_side: bool = False) -> Tensor:
    """→ the result, for what the caller queues next, or (``on_side``) for the side stream alone."""
    autograd_token, pending.autograd_token = pending.autograd_token, None
    return _Wait.apply(autograd_token, pending, on_side)  # type: ignore[no-any-return]


def run_blocking(x: Tensor, collective: Collective) -> Tensor:
    """A collective without overlap."""
    return wait(start(x, collective))
