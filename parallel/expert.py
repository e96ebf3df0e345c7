"""Expert parallelism: the tokens of FFN experts travel to the ranks of their experts and back.

Two transports behind one interface (`longcat.dispatch.Dispatcher`). All-to-all moves each token to each expert that
it chose: few bytes when few of the chosen experts are FFN experts of other ranks. All-gather / reduce-scatter moves
every token to every rank once, however many of its experts are there: no split sizes.
Identity experts are served where the token is, whatever the transport.

How many rows come and go decides the shapes of tensors, so the host must know. The numbers of all chunks travel in one
message, ahead of the rows; the host waits for them once a layer, where it only queues work after it has queued what
covers the wait.
"""

# T tokens here, K chosen, N FFN experts, D width, C chunks, n ranks of the group, E = N/n experts here, P rows for them

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from longcat.config import ModelConfig
from longcat.dispatch import Routing
from longcat.errors import ConfigError
from longcat.interfaces import install
from longcat.model import LongCat
from longcat.ops.grouped import padded_capacity
from longcat.ops.permute import (
    Permutation,
    _Combine,
    combine,
    gather_rows_padded,
    padded_positions,
    permute,
    plan_permutation,
    unpermute,
)
from longcat.ops.rows import combine_rows_backward, gather_rows
from parallel.collectives.async_collective import (
    AllGather,
    AllToAll,
    AsyncCollective,
    Collective,
    ReduceScatter,
    Reorder,
    launch_staged,
    stage_input,
    start,
    wait,
    wait_on_stream,
)
from parallel.collectives.point_to_point import all_gather
from parallel.collectives.streams import CURRENT_STREAM, StreamContext
from parallel.config import DispatcherKind
from parallel.mesh import Topology
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import wait_span


def check_experts(config: ModelConfig, ep: int) -> None:
    """Raise ConfigError where the experts cannot be shared equally."""
    if config.num_experts % ep:
        divisors = [str(size) for size in range(1, config.num_experts + 1) if config.num_experts % size == 0]
        raise ConfigError(
            f"parallel.ep={ep} does not divide model.num_experts={config.num_experts}; use one of {', '.join(divisors)}"
        )


def apply_expert_parallel(model: LongCat, topology: Topology, kind: DispatcherKind) -> None:
    """Give every layer's experts to the ranks of the expert-parallel group, in place, on the meta device."""
    size, num_experts = topology.sizes.ep, model.config.num_experts
    if size == 1:
        return
    mesh = topology.experts["ep"]
    for layer in model.shortcut_layers():
        experts = layer.mlp.experts
        for name, weight in list(experts.named_parameters(recurse=False)):
            part = torch.empty(num_experts // size, *weight.shape[1:], device=weight.device)
            spread = DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
            experts.register_parameter(name, nn.Parameter(spread))
    install_dispatchers(model, topology, kind)


def install_dispatchers(model: LongCat, topology: Topology, kind: DispatcherKind) -> None:
    """Let every layer send tokens to the ranks of their experts, in place."""
    if topology.sizes.ep > 1:
        dispatcher = AllToAllDispatcher if kind == DispatcherKind.all_to_all else AllGatherDispatcher
        group = topology.expert_exchange
        install(model, dispatcher=lambda name: dispatcher(group, int(name.split(".")[1])))  # layers.3.mlp


class SplitSizes:
    """The numbers of rows that ranks send each other in all chunks of a layer, on their way."""

    def __init__(self, routings: list[Routing], group: dist.ProcessGroup, streams: StreamContext, layer: int) -> None:
        self.group, self.streams, self.event = group, streams, Event(SpanKind.EXPERT_COUNTS, layer)
        with streams.on_side_stream():
            counts = torch.stack([_count(routing) for routing in routings])
            by_rank = counts.view(len(routings), dist.get_world_size(group), -1)  # [C, n, E]
            self.outgoing = by_rank.transpose(0, 1).contiguous()
            self.incoming = torch.empty_like(self.outgoing)  # [n, C, E] from each rank, for each expert here
            self.work = dist.all_to_all_single(self.incoming, self.outgoing, group=group, async_op=True)
            if streams.is_async_host:
                self.work.wait()
                self._numbers = streams.to_host(torch.stack((self.outgoing.sum(2), self.incoming.sum(2))))

    @cached_property
    def _arrived(self) -> list[list[list[int]]]:
        with wait_span(self.event, self.group):
            return self._numbers()

    @cached_property
    def sent(self) -> list[list[int]]:
        """[n, C] rows for each rank in each chunk. They are here before `received`, unless the host only queues."""
        return self._arrived[0] if self.streams.is_async_host else self.outgoing.sum(2).tolist()

    @cached_property
    def received(self) -> list[list[int]]:
        """[n, C] rows from each rank in each chunk."""
        if self.streams.is_async_host:
            return self._arrived[1]
        with wait_span(self.event, self.group):
            self.work.wait()
        return self.incoming.sum(2).tolist()


def _count(routing: Routing) -> Tensor:
    """Selections of each FFN expert, [N] int64."""
    flat = routing.indices.reshape(-1)
    counts = torch.zeros(routing.num_routed, dtype=torch.int64, device=flat.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))[: routing.num_experts]


class ReceiveOrder:
    """The order in which a chunk's rows arrive, and that in which the experts want them.

    Args:
        received: [n, E] rows from each rank for each expert here.
        num_rows: their sum.
        room: rows that each expert shall have, those of nobody among them; None for as many as come.
    """

    def __init__(self, received: Tensor, num_rows: int, room: int | None) -> None:
        self.received, self.num_rows, self.room = received, num_rows, room

    @cached_property
    def counts(self) -> Tensor:
        """[E] rows of each expert."""
        counts = self.received.sum(0)
        return counts if self.room is None else torch.full_like(counts, self.room)

    @cached_property
    def order(self) -> tuple[Tensor, Tensor]:
        """From (rank, expert) to (expert, rank): [P], or [E · C] with -1 for a row of nobody; and back, [P]."""
        num_ranks, num_experts = self.received.shape
        expert = torch.arange(num_experts, device=self.received.device).repeat(num_ranks)
        expert = expert.repeat_interleave(self.received.flatten(), output_size=self.num_rows)
        order = torch.sort(expert, stable=True).indices
        place = torch.arange(self.num_rows, device=order.device)
        if self.room is not None:
            place = padded_positions(self.received.sum(0), self.room)
        inverse = torch.empty_like(order).scatter_(0, order, place)
        if self.room is not None:
            order = order.new_full((num_experts * self.room,), -1).index_copy_(0, place, order)
        return order, inverse

    def move(self, to_experts: bool) -> Reorder:
        """Of rows that have come to the order of experts, or of experts' results to that in which they go back."""
        to_theirs = in_order if self.room is None else in_order_with_zeros
        there, back = (to_theirs, in_order) if to_experts else (in_order, to_theirs)
        first, second = (0, 1) if to_experts else (1, 0)
        return Reorder(lambda rows: there(rows, self.order[first]), back, lambda: (self.order[second],))


def in_order(rows: Tensor, order: Tensor) -> Tensor:
    return gather_rows(rows.contiguous(), order)  # type: ignore[no-any-return]


def in_order_with_zeros(rows: Tensor, order: Tensor) -> Tensor:
    return gather_rows_padded(rows.contiguous(), order)


@dataclass
class _Sent:
    """One chunk between the calls of `AllToAllDispatcher`. What it makes itself is made on the side stream."""

    x: Tensor
    routing: Routing
    sizes: SplitSizes
    number: int
    pending_collective: AsyncCollective
    plan: Permutation | None = None
    arrival: ReceiveOrder | None = None
    counts: Tensor | None = None  # [E]


class ExpertParallelDispatcher:
    """What the dispatchers over an expert-parallel group have in common. ``layer`` names the layer in messages."""

    def __init__(self, group: dist.ProcessGroup, layer: int, streams: StreamContext = CURRENT_STREAM) -> None:
        self.group, self.layer, self.streams = group, layer, streams


class AllToAllDispatcher(ExpertParallelDispatcher):
    """A row for each FFN selection goes to the rank of its expert."""

    def start_dispatch(self, chunks: list[tuple[Tensor, Routing]]) -> list[_Sent]:
        pending_collectives = [stage_input(x, self.streams) for x, _ in chunks]
        sizes = SplitSizes([routing for _, routing in chunks], self.group, self.streams, self.layer)
        pending = [
            _Sent(x, routing, sizes, number, pending_collective)
            for number, ((x, routing), pending_collective) in enumerate(zip(chunks, pending_collectives, strict=True))
        ]
        if not self.streams.is_async_host:
            for chunk in pending:
                self.send_rows(chunk)
        return pending

    def send_rows(self, pending: _Sent) -> None:
        if pending.plan is not None:
            return
        routing, sizes, number = pending.routing, pending.sizes, pending.number
        sent = [row[number] for row in sizes.sent]
        with self.streams.on_side_stream():
            plan = plan_permutation(routing.indices, routing.num_experts, routing.num_routed, sum(sent))
        received = [row[number] for row in sizes.received]
        there = AllToAll(Event(SpanKind.EXPERT_DISPATCH, self.layer), self.group, sent, received)
        incoming = sizes.incoming[:, number]
        room = None if self.streams.is_async_host else padded_capacity(incoming.sum(0), pending.x)
        arrival = ReceiveOrder(incoming, sum(received), room)
        before = Reorder(lambda x: permute(x, plan), unpermute, lambda: (plan.row_index,))
        launch_staged(pending.pending_collective, there, before, arrival.move(to_experts=True))
        with self.streams.on_side_stream():  # while the rows travel
            _ = arrival.order
            pending.counts = arrival.counts
        pending.plan, pending.arrival = plan, arrival

    def wait_dispatch(self, pending: _Sent) -> tuple[Tensor, Tensor]:
        self.send_rows(pending)
        rows = wait(pending.pending_collective)
        assert pending.counts is not None
        return rows, pending.counts  # which stay in `pending` until the way back has started

    def start_combine(self, rows: Tensor, pending: _Sent) -> _Sent:
        there, arrival = pending.pending_collective.exchange, pending.arrival
        assert isinstance(there, AllToAll) and arrival is not None
        back = AllToAll(Event(SpanKind.EXPERT_COMBINE, self.layer), self.group, there.received, there.sent)
        pending.pending_collective = start(rows, back, self.streams, arrival.move(to_experts=False))
        return pending

    def wait_combine(self, pending: _Sent) -> Tensor:
        rows, exchange = wait(pending.pending_collective, on_side=True), pending.pending_collective.exchange
        return _CombineAside.apply(rows, pending.routing.gates, pending.plan, pending.x, exchange, self.streams)  # type: ignore[no-any-return]


class _CombineAside(torch.autograd.Function):
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
        exchange: Collective,
        streams: StreamContext,
    ) -> Tensor:
        ctx.streams = streams
        streams.record_use_on_side(gates)  # x has been lent where it was sent
        with streams.on_side_stream():
            out = _Combine.forward(ctx, rows, gates, plan, x)
        wait_on_stream(exchange.event, exchange.group, streams, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, Tensor, None, None]:
        streams: StreamContext = ctx.streams
        saved = ctx.saved_tensors  # first of all: a region that is computed again is computed here, on this stream
        streams.fork(grads[0])
        with streams.on_side_stream():
            grad_rows, grad_gates, grad_x = combine_rows_backward(grads[0].contiguous(), *saved)
        streams.record_use_here(grad_gates, grad_x)
        return grad_rows, grad_gates, None, grad_x, None, None


class GatheredRouting:
    """The experts that all ranks' tokens have chosen, on their way, in all chunks of a layer."""

    def __init__(self, routings: list[Routing], group: dist.ProcessGroup, streams: StreamContext, layer: int) -> None:
        self.group, self.streams, self.event = group, streams, Event(SpanKind.EXPERT_ROUTING, layer)
        self.size = routings[0].num_experts // dist.get_world_size(group)  # experts here
        self.first = dist.get_rank(group) * self.size
        streams.fork()
        with streams.on_side_stream():
            self.chosen = torch.cat([routing.indices for routing in routings])
            self.indices = self.chosen.new_empty(dist.get_world_size(group), *self.chosen.shape)  # [n, T, K]
            self.work = all_gather(self.indices, self.chosen, group)
            self.chunks = self.indices.split([len(routing.indices) for routing in routings], 1)
            if streams.is_async_host:
                self.work.wait()
                numbers = [(self.numbered(chunk) < self.size).sum() for chunk in self.chunks]
                self._num_rows = streams.to_host(torch.stack(numbers))

    def numbered(self, indices: Tensor) -> Tensor:
        """Experts as numbers among those here; others' stand where identity experts do, behind the last."""
        here = indices - self.first
        return torch.where((here >= 0) & (here < self.size), here, self.size)

    @cached_property
    def num_rows(self) -> list[int] | None:
        """Rows for the experts here in each chunk. None where nothing is queued and to count is no wait."""
        with wait_span(self.event, self.group):
            if self.streams.is_async_host:
                return self._num_rows()
            self.work.wait()
        return None


@dataclass
class _Gathered:
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
    """Every token goes to every rank; each sums what its own experts give, and the sums come back added up.

    Its exchanges need no reordering, so they are launched from the caller's stream; only the numbers of rows are made
    aside.
    """

    def start_dispatch(self, chunks: list[tuple[Tensor, Routing]]) -> list[_Gathered]:
        choices = GatheredRouting([routing for _, routing in chunks], self.group, self.streams, self.layer)
        gather, direct = (
            AllGather(Event(SpanKind.EXPERT_DISPATCH, self.layer), self.group),
            StreamContext(self.streams.blocking),
        )
        return [
            _Gathered(x, routing, choices, number, start(x, gather, direct), start(routing.gates, gather, direct))
            for number, (x, routing) in enumerate(chunks)
        ]

    def send_rows(self, pending: _Gathered) -> None:
        pass

    def wait_dispatch(self, pending: _Gathered) -> tuple[Tensor, Tensor]:
        choices, number = pending.choices, pending.number
        num_rows = None if choices.num_rows is None else choices.num_rows[number]
        wait_on_stream(choices.event, self.group, self.streams, choices.indices)
        here, size = choices.numbered(choices.chunks[number].flatten(0, 1)), choices.size
        plan = plan_permutation(here, size, size + 1, num_rows)
        room = None if self.streams.is_async_host else padded_capacity(plan.counts[:size], pending.x)
        pending.plan = plan if room is None else plan.pad_to_capacity(room, size)
        pending.all_gates = wait(pending.gates).flatten(0, 1)
        return permute(wait(pending.tokens).flatten(0, 1), pending.plan), pending.plan.counts[:size]

    def start_combine(self, rows: Tensor, pending: _Gathered) -> _Gathered:
        assert pending.all_gates is not None and pending.plan is not None
        partial = combine(rows, pending.all_gates, pending.plan, None)
        scatter = ReduceScatter(Event(SpanKind.EXPERT_COMBINE, self.layer), self.group)
        whole = partial.view(dist.get_world_size(self.group), *pending.x.shape)
        pending.tokens = start(whole, scatter, StreamContext(self.streams.blocking))
        return pending

    def wait_combine(self, pending: _Gathered) -> Tensor:
        is_ffn = pending.routing.indices < pending.routing.num_experts
        identity_gate = pending.routing.gates.masked_fill(is_ffn, 0.0).sum(1, keepdim=True)
        return wait(pending.tokens) + (pending.x * identity_gate).to(pending.x.dtype)
