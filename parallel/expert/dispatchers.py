"""Dispatchers of expert parallelism: tokens travel to the ranks of their FFN experts and back.

All-to-all sends each token to each expert that it chose: few bytes when few of the chosen experts are FFN experts of
other ranks. All-gather and reduce-scatter send every token to every rank once, however many of its experts are there,
and need no split sizes. Both serve identity experts where the token is.

The host must know how many rows arrive, because they determine the shapes of tensors. The counts of all chunks travel
in one message ahead of the rows. The host waits for it once per layer; where it only queues work, it first queues
computation that overlaps with the wait.
"""

# T tokens here, K chosen, N FFN experts, D width, C chunks, n ranks of the group, E = N/n experts here, P rows for them

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longcat.dispatch import Routing
from longcat.ops.grouped import padded_capacity
from longcat.ops.permute import (
    Combine,
    Permutation,
    combine,
    gate_gradients,
    gather_rows_padded,
    log_gates,
    padded_positions,
    permute,
    plan_permutation,
    unpermute,
)
from longcat.ops.rows import combine_rows_backward, gather_rows
from parallel.collectives.async_collective import (
    AsyncCollective,
    Reorder,
    launch_staged,
    send_gradient_alone,
    stage_input,
    start,
    wait,
    wait_on_stream,
)
from parallel.collectives.collective import AllGather, AllToAll, Collective, ReduceScatter
from parallel.collectives.point_to_point import all_gather
from parallel.collectives.streams import CURRENT_STREAM, StreamContext
from parallel.expert.split_sizes import SplitSizes
from parallel.sdc.ledger import LEDGER
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import launching, wait_span


class ReceiveOrder:
    """The order in which a chunk's rows arrive, and the order of the experts that compute them.

    Args:
        received: [n, E] rows from each rank for each expert here.
        num_rows: their sum.
        capacity: rows of each expert after padding; None for no padding.
    """

    def __init__(self, received: Tensor, num_rows: int, capacity: int | None) -> None:
        self.received, self.num_rows, self.capacity = received, num_rows, capacity

    @cached_property
    def counts(self) -> Tensor:
        """[E] rows of each expert."""
        counts = self.received.sum(0)
        return counts if self.capacity is None else torch.full_like(counts, self.capacity)

    @cached_property
    def order(self) -> tuple[Tensor, Tensor]:
        """From (rank, expert) to (expert, rank): [P], or [E · C] with -1 for a padding row; and back, [P]."""
        by_rank, by_expert = self.received, self.received.t()
        theirs, ours = _firsts(by_rank), _firsts(by_expert)  # [n, E], [E, n] the first row of each pair, either way
        order, inverse = self._moved(theirs.t() - ours, by_expert), self._moved(ours.t() - theirs, by_rank)
        if self.capacity is not None:
            position = padded_positions(self.received.sum(0), self.capacity)
            order = order.new_full((by_expert.shape[0] * self.capacity,), -1).index_copy_(0, position, order)
            inverse = position[inverse]
        return order, inverse

    def _moved(self, by: Tensor, counts: Tensor) -> Tensor:
        """For each row its own number plus the shift ``by`` of its block; ``counts`` are the blocks' rows."""
        shift = by.flatten().repeat_interleave(counts.flatten(), output_size=self.num_rows)
        return shift.add_(torch.arange(self.num_rows, device=shift.device))

    def reorder_gradients(self) -> Reorder:
        """Gradients of one number a row, from the order of the experts back to the order of arrival."""
        return Reorder(lambda x: x, lambda grad, order: grad.index_select(0, order), lambda: (self.order[1],))

    def reorder(self, to_experts: bool) -> Reorder:
        """Received rows to the order of the experts, or the experts' results back to the order of arrival."""
        to_theirs = in_order if self.capacity is None else in_order_with_zeros
        forward, backward = (to_theirs, in_order) if to_experts else (in_order, to_theirs)
        first, second = (0, 1) if to_experts else (1, 0)
        return Reorder(lambda rows: forward(rows, self.order[first]), backward, lambda: (self.order[second],))


def _firsts(counts: Tensor) -> Tensor:
    """Sizes of blocks that follow each other, row by row → the first element of each."""
    flat = counts.flatten()
    return (flat.cumsum(0) - flat).view(counts.shape)


def in_order(rows: Tensor, order: Tensor) -> Tensor:
    return gather_rows(rows.contiguous(), order)  # type: ignore[no-any-return]


def in_order_with_zeros(rows: Tensor, order: Tensor) -> Tensor:
    return gather_rows_padded(rows.contiguous(), order)


@dataclass
class PendingAllToAll:
    """One chunk between the calls of `AllToAllDispatcher`. Its own tensors are made on the side stream."""

    x: Tensor
    routing: Routing
    sizes: SplitSizes
    number: int
    collective: AsyncCollective
    gates: AsyncCollective
    plan: Permutation | None = None
    receive_order: ReceiveOrder | None = None
    counts: Tensor | None = None  # [E]


class ExpertParallelDispatcher:
    """What the dispatchers over an expert-parallel group have in common. ``layer`` names the layer in messages."""

    def __init__(self, group: dist.ProcessGroup, layer: int, streams: StreamContext = CURRENT_STREAM) -> None:
        self.group, self.layer, self.streams = group, layer, streams


class AllToAllDispatcher(ExpertParallelDispatcher):
    """A row for each FFN selection goes to the rank of its expert."""

    def start_dispatch(self, chunks: list[tuple[Tensor, Routing]]) -> list[PendingAllToAll]:
        staged = [(stage_input(x, self.streams), stage_input(routing.gates, self.streams)) for x, routing in chunks]
        sizes = SplitSizes([routing for _, routing in chunks], self.group, self.streams, self.layer)
        pending = [
            PendingAllToAll(x, routing, sizes, number, *collectives)
            for number, ((x, routing), collectives) in enumerate(zip(chunks, staged, strict=True))
        ]
        if not self.streams.is_async_host:
            for chunk in pending:
                self.send_rows(chunk)
        return pending

    def send_rows(self, pending: PendingAllToAll) -> None:
        if pending.plan is not None:
            return
        routing, sizes, number = pending.routing, pending.sizes, pending.number
        sent = [row[number] for row in sizes.sent]
        with self.streams.on_side_stream():
            plan = sizes.plan(number, routing)
        received = [row[number] for row in sizes.received]
        there = AllToAll(Event(SpanKind.EXPERT_DISPATCH, self.layer), self.group, sent, received)
        incoming = sizes.incoming[:, number]
        capacity = None if self.streams.is_async_host else padded_capacity(incoming.sum(0), pending.x)
        receive_order = ReceiveOrder(incoming, sum(received), capacity)
        before = Reorder(lambda x: permute(x, plan), unpermute, lambda: (plan.row_index,))
        launch_staged(pending.collective, there, before, receive_order.reorder(to_experts=True))
        with self.streams.on_side_stream():  # while the rows travel
            _ = receive_order.order
            pending.counts = receive_order.counts
        pending.plan, pending.receive_order = plan, receive_order

    def wait_dispatch(self, pending: PendingAllToAll) -> tuple[Tensor, Tensor, Tensor]:
        self.send_rows(pending)
        gates = self._log_gates(pending)  # first, so that the backward sends the rows' gradients before the gates'
        rows = wait(pending.collective)
        assert pending.counts is not None
        return rows, pending.counts, gates  # also kept in `pending` until the combine starts

    def _log_gates(self, pending: PendingAllToAll) -> Tensor:
        """`log_gates` of the rows here: zeros, so nothing is sent, but their gradients go back to the tokens' ranks."""
        there, plan, receive_order = pending.collective.collective, pending.plan, pending.receive_order
        assert isinstance(there, AllToAll) and plan is not None and receive_order is not None
        gates, dtype = pending.routing.gates, pending.x.dtype
        back = AllToAll(Event(SpanKind.EXPERT_GATES, self.layer), self.group, there.sent, there.received)

        def to_gates(grad: Tensor, gates: Tensor, row_index: Tensor) -> Tensor:
            return gate_gradients(grad, gates, row_index, dtype)

        before = Reorder(lambda x: x, to_gates, lambda: (gates, plan.row_index))
        zeros = torch.zeros(receive_order.order[0].shape[0], dtype=gates.dtype, device=gates.device)
        send_gradient_alone(pending.gates, back, zeros, before, receive_order.reorder_gradients())
        return wait(pending.gates)

    def start_combine(self, rows: Tensor, pending: PendingAllToAll) -> PendingAllToAll:
        dispatch, receive_order = pending.collective.collective, pending.receive_order
        assert isinstance(dispatch, AllToAll) and receive_order is not None
        reverse = AllToAll(Event(SpanKind.EXPERT_COMBINE, self.layer), self.group, dispatch.received, dispatch.sent)
        pending.collective = start(rows, reverse, self.streams, receive_order.reorder(to_experts=False))
        return pending

    def wait_combine(self, pending: PendingAllToAll) -> Tensor:
        rows, collective = wait(pending.collective, on_side=True), pending.collective.collective
        return _CombineOnSideStream.apply(
            rows, pending.routing.gates, pending.plan, pending.x, collective, self.streams
        )  # type: ignore[no-any-return]


class _CombineOnSideStream(torch.autograd.Function):
    """`combine` on the side stream: where the host only queues, it runs as soon as the rows are back.

    The backward ends without a join. Autograd uses what it gives, the gradients of tokens and gates, after that of
    `_Start` for the same tokens, which has one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        gates: Tensor,
        plan: Permutation,
        x: Tensor,
        collective: Collective,
        streams: StreamContext,
    ) -> Tensor:
        ctx.streams = streams
        with streams.on_side_stream():
            out = Combine.forward(ctx, rows, gates, plan, x)
        wait_on_stream(collective.event, collective.group, streams, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, Tensor, None, None]:
        streams: StreamContext = ctx.streams
        saved = ctx.saved_tensors  # first: reading them runs a recomputation, which belongs on this stream
        streams.fork(grads[0])
        with streams.on_side_stream():
            grad_rows, grad_gates, grad_x = combine_rows_backward(grads[0].contiguous(), *saved)
        streams.record_use_here(grad_gates, grad_x)
        return grad_rows, grad_gates, None, grad_x, None, None


class GatheredRouting:
    """The experts that all ranks' tokens chose, in all chunks of a layer; their all-gather is under way."""

    def __init__(self, routings: list[Routing], group: dist.ProcessGroup, streams: StreamContext, layer: int) -> None:
        self.group, self.streams, self.event = group, streams, Event(SpanKind.EXPERT_ROUTING, layer)
        self.size = routings[0].num_experts // dist.get_world_size(group)  # experts here
        self.first = dist.get_rank(group) * self.size
        streams.fork()
        with streams.on_side_stream():
            self.chosen = torch.cat([routing.indices for routing in routings])
            self.indices = self.chosen.new_empty(dist.get_world_size(group), *self.chosen.shape)  # [n, T, K]
            with launching(self.event, group):
                self.work = all_gather(self.indices, self.chosen, group)
            self.number = LEDGER.send_parts(self.event.text, group, self.chosen.expand_as(self.indices))
            self.chunks = self.indices.split([len(routing.indices) for routing in routings], 1)
            if streams.is_async_host:
                self.work.wait()
                LEDGER.receive_parts(self.event.text, group, self.number, self.indices)
                numbers = [(self.numbered(chunk) < self.size).sum() for chunk in self.chunks]
                self._num_rows = streams.to_host(torch.stack(numbers))

    def numbered(self, indices: Tensor) -> Tensor:
        """Expert indices relative to this rank's first; experts of other ranks get the index after the last."""
        here = indices - self.first
        return torch.where((here >= 0) & (here < self.size), here, self.size)

    @cached_property
    def num_rows(self) -> list[int] | None:
        """Rows for this rank's experts in each chunk. None on a synchronous host, where counting needs no wait."""
        with wait_span(self.event, self.group):
            if self.streams.is_async_host:
                return self._num_rows()
            self.work.wait()
        LEDGER.receive_parts(self.event.text, self.group, self.number, self.indices)
        return None


@dataclass
class PendingAllGather:
    """One chunk between the calls of `AllGatherDispatcher`."""

    x: Tensor
    routing: Routing
    choices: GatheredRouting
    number: int
    tokens: AsyncCollective
    gates: AsyncCollective
    all_gates: Tensor | None = None
    plan: Permutation | None = None


class AllGatherDispatcher(ExpertParallelDispatcher):
    """Every token goes to every rank; each rank sums its own experts' results, and a reduce-scatter adds these up.

    Its collectives need no reordering, so they are launched from the caller's stream; only the numbers of rows are
    computed on the side stream.
    """

    def start_dispatch(self, chunks: list[tuple[Tensor, Routing]]) -> list[PendingAllGather]:
        choices = GatheredRouting([routing for _, routing in chunks], self.group, self.streams, self.layer)
        gather, direct = (
            AllGather(Event(SpanKind.EXPERT_DISPATCH, self.layer), self.group),
            StreamContext(self.streams.blocking),
        )
        return [
            PendingAllGather(
                x, routing, choices, number, start(x, gather, direct), start(routing.gates, gather, direct)
            )
            for number, (x, routing) in enumerate(chunks)
        ]

    def send_rows(self, pending: PendingAllGather) -> None:
        pass

    def wait_dispatch(self, pending: PendingAllGather) -> tuple[Tensor, Tensor, Tensor]:
        choices, number = pending.choices, pending.number
        num_rows = None if choices.num_rows is None else choices.num_rows[number]
        wait_on_stream(choices.event, self.group, self.streams, choices.indices)
        here, size = choices.numbered(choices.chunks[number].flatten(0, 1)), choices.size
        plan = plan_permutation(here, size, size + 1, num_rows)
        capacity = None if self.streams.is_async_host else padded_capacity(plan.counts[:size], pending.x)
        pending.plan = plan if capacity is None else plan.pad_to_capacity(capacity, size)
        pending.all_gates = wait(pending.gates).flatten(0, 1)
        rows = permute(wait(pending.tokens).flatten(0, 1), pending.plan)
        return rows, pending.plan.counts[:size], log_gates(pending.all_gates, pending.plan, pending.x.dtype)

    def start_combine(self, rows: Tensor, pending: PendingAllGather) -> PendingAllGather:
        assert pending.all_gates is not None and pending.plan is not None
        partial = combine(rows, pending.all_gates.detach(), pending.plan, None)
        scatter = ReduceScatter(Event(SpanKind.EXPERT_COMBINE, self.layer), self.group)
        whole = partial.view(dist.get_world_size(self.group), *pending.x.shape)
        pending.tokens = start(whole, scatter, StreamContext(self.streams.blocking))
        return pending

    def wait_combine(self, pending: PendingAllGather) -> Tensor:
        is_ffn = pending.routing.indices < pending.routing.num_experts
        identity_gate = pending.routing.gates.masked_fill(is_ffn, 0.0).sum(1, keepdim=True)
        return wait(pending.tokens) + (pending.x * identity_gate).to(pending.x.dtype)
