"""Spans around the sends and receives of torch's pipeline schedules, with micro-batch, layers and the peer's rank."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import wraps
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage

from parallel.sdc.ledger import LEDGER
from parallel.torch_internals import wrap_batch_p2p
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import SPANS, launching, record_send, wait_span, work_span

CHANNEL = "pipeline"  # of messages between stages, in the ledger


class TracedStage(PipelineStage):
    """Torch's stage, with spans around its backward and an event on each transfer.

    Args:
        layers: the first and the last layer of the stage.
    """

    def __init__(self, *args: Any, layers: tuple[int, int], **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.layers = layers

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._label(super().get_fwd_recv_ops(fwd_chunk_id), SpanKind.RECEIVE_HIDDEN_STATES, fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._label(super().get_bwd_recv_ops(bwd_chunk_id), SpanKind.RECEIVE_GRADIENTS, bwd_chunk_id)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._label(super().get_fwd_send_ops(fwd_chunk_id), SpanKind.SEND_HIDDEN_STATES, fwd_chunk_id)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._label(super().get_bwd_send_ops(bwd_chunk_id), SpanKind.SEND_GRADIENTS, bwd_chunk_id)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        kind = SpanKind.BACKWARD if full_backward else SpanKind.INPUT_GRADIENTS
        with work_span(self._event(kind, bwd_chunk_id)):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **keywords: Any) -> None:
        with work_span(self._event(SpanKind.WEIGHT_GRADIENTS, bwd_chunk_id)):
            super().backward_weight_one_chunk(bwd_chunk_id, *args, **keywords)

    def _event(self, kind: SpanKind, chunk: int) -> Event:
        return Event(kind, micro_batch=chunk + 1, layers=self.layers)

    def _label(self, operations: list[dist.P2POp], kind: SpanKind, chunk: int) -> list[dist.P2POp]:
        for operation in operations:
            operation.event = self._event(kind, chunk)  # type: ignore[attr-defined]
        return operations


class Received(NamedTuple):
    """A message on its way here: what the ledger needs once it has arrived."""

    label: str
    number: int  # of this peer's messages to this rank in the step
    peer: int
    tensor: Tensor


class TracedWork:
    """A transfer's work, with a span around its wait."""

    def __init__(
        self, work: dist.Work, event: Event, directions: list[tuple[int, int]], received: list[Received]
    ) -> None:
        self.work, self.event, self.received = work, event, received
        self.directions = directions  # (sender, receiver) of each message
        self.awaited = False

    def wait(self, *timeout: timedelta) -> bool:
        me = dist.get_rank()
        with wait_span(self.event, [one for pair in self.directions for one in pair if one != me]):
            done = self.work.wait(*timeout)
        if SPANS.progress is not None and not self.awaited:
            for pair in self.directions:
                SPANS.progress.message_awaited(*pair)
        self.awaited = True
        received, self.received = self.received, []
        for one in received:
            LEDGER.receive(one.label, CHANNEL, one.number, one.peer, one.tensor)
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self.work, name)


def traced(batch: Callable[..., list[dist.Work]]) -> Callable[..., list[Any]]:
    """Torch's launch of sends and receives, returning works with spans."""

    @wraps(batch)
    def launch(operations: list[dist.P2POp], *args: Any, **keywords: Any) -> list[Any]:
        if not operations:
            return []
        with launching(_joint_event(operations), [one.peer for one in operations]):
            works = batch(operations, *args, **keywords)
        for one in operations:
            if SPANS.progress is not None:
                SPANS.progress.message_issued(*_direction(one))
            if one.op is dist.isend:
                record_send(_event(one), one.tensor.numel() * one.tensor.element_size(), one.peer)
                if LEDGER.watches_sends:
                    number = LEDGER.number(f"to {one.peer}")
                    LEDGER.send(_event(one).text, CHANNEL, number, one.peer, one.tensor)
        single = len(works) == len(operations)  # NCCL makes one work of several operations
        groups = [[one] for one in operations] if single else [operations] * len(works)
        return [_trace(work, group) for work, group in zip(works, groups, strict=True)]

    return launch


def _event(operation: dist.P2POp) -> Event:
    return getattr(operation, "event", Event(SpanKind.STAGE_TRANSFER))


def _joint_event(operations: list[dist.P2POp]) -> Event:
    first, *others = dict.fromkeys(map(_event, operations))
    return first._replace(others=tuple(others))


def _direction(operation: dist.P2POp) -> tuple[int, int]:
    """(sender, receiver), global ranks."""
    me = dist.get_rank()
    return (me, operation.peer) if operation.op is dist.isend else (operation.peer, me)


def _trace(work: dist.Work, operations: list[dist.P2POp]) -> TracedWork:
    received = [
        Received(_event(one).text, LEDGER.number(f"from {one.peer}"), one.peer, one.tensor)
        for one in operations
        if one.op is dist.irecv and LEDGER.is_watching
    ]
    return TracedWork(work, _joint_event(operations), list(map(_direction, operations)), received)


wrap_batch_p2p(traced)
