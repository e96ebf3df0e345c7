"""Expert parallelism: the tokens of FFN experts travel to the ranks of their experts and back.

Two transports behind one interface (`longcat.dispatch.Dispatcher`). All-to-all moves each token to each expert that
it chose: few bytes when few of the chosen experts are FFN experts of other ranks. All-gather / reduce-scatter moves
every token to every rank once, however many of its experts are there: no split sizes, no wait for the host.
Identity experts are served where the token is, whatever the transport.
"""

# T tokens here, K chosen, N FFN experts, D width, n ranks of the group, E = N/n experts here, P rows for them

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from longcat.config import ModelConfig
from longcat.dispatch import Routing
from longcat.errors import ConfigError
from longcat.layer import ShortcutLayer
from longcat.model import LongCat
from longcat.ops.permute import Permutation, combine, permute, plan_permutation, reorder
from parallel.crumbs import crumb
from parallel.exchange import AllGather, AllToAll, Flight, ReduceScatter, start, wait
from parallel.mesh import Topology


def check_experts(config: ModelConfig, ep: int) -> None:
    """Raise ConfigError where the experts cannot be shared equally."""
    if config.num_experts % ep:
        divisors = [str(size) for size in range(1, config.num_experts + 1) if config.num_experts % size == 0]
        raise ConfigError(
            f"parallel.ep={ep} does not divide model.num_experts={config.num_experts}; use one of {', '.join(divisors)}"
        )


def spread_experts(model: LongCat, topology: Topology, transport: str) -> None:
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
    send_to_experts(model, topology, transport)


def send_to_experts(model: LongCat, topology: Topology, transport: str) -> None:
    """Let every layer send tokens to the ranks of their experts, in place."""
    if topology.sizes.ep > 1:
        group = topology.experts["ep"].get_group()
        for number, layer in model.layers.items():
            place, moe = f"layer {number}", cast(ShortcutLayer, layer).mlp
            moe.dispatcher = (
                AllToAllDispatcher(group, place) if transport == "all_to_all" else AllGatherDispatcher(group, place)
            )


@dataclass
class _Sent:
    """Between the calls of `AllToAllDispatcher`."""

    x: Tensor
    gates: Tensor
    plan: Permutation
    received: Tensor  # [n, E] rows from each rank for each expert here
    flight: Flight
    order: Tensor  # [P] from (rank, expert) to (expert, rank)
    inverse: Tensor


class AllToAllDispatcher:
    """A row for each FFN selection goes to the rank of its expert."""

    def __init__(self, group: dist.ProcessGroup, place: str) -> None:
        self.group, self.place = group, place
        self.num_ranks = dist.get_world_size(group)

    def start(self, x: Tensor, routing: Routing) -> _Sent:
        plan = plan_permutation(routing.indices, routing.num_experts, routing.num_routed)
        counts = plan.counts[: routing.num_experts].view(self.num_ranks, -1)
        received = torch.empty_like(counts)
        with crumb(f"expert counts, {self.place}"):
            dist.all_to_all_single(received, counts, group=self.group)
            splits = torch.stack((counts.sum(1), received.sum(1))).tolist()  # the one wait for the host
        exchange = AllToAll(f"expert dispatch, {self.place}", self.group, splits[0], splits[1])
        flight = start(permute(x, plan), exchange)
        expert = torch.arange(counts.shape[1], device=x.device).repeat(self.num_ranks)
        expert = expert.repeat_interleave(received.flatten(), output_size=sum(splits[1]))
        order = torch.sort(expert, stable=True).indices
        inverse = torch.empty_like(order)
        inverse.scatter_(0, order, torch.arange(order.shape[0], device=x.device))
        return _Sent(x, routing.gates, plan, received, flight, order, inverse)

    def wait(self, pending: _Sent) -> tuple[Tensor, Tensor]:
        return reorder(wait(pending.flight), pending.order, pending.inverse), pending.received.sum(0)

    def start_back(self, rows: Tensor, pending: _Sent) -> _Sent:
        there = pending.flight.exchange
        assert isinstance(there, AllToAll)
        back = AllToAll(f"expert combine, {self.place}", self.group, there.received, there.sent)
        pending.flight = start(reorder(rows, pending.inverse, pending.order), back)
        return pending

    def wait_back(self, pending: _Sent) -> Tensor:
        return combine(wait(pending.flight), pending.gates, pending.plan, pending.x)


@dataclass
class _Gathered:
    """Between the calls of `AllGatherDispatcher`."""

    x: Tensor
    routing: Routing
    tokens: Flight
    gates: Flight
    indices: Tensor  # [n·T, K] of all ranks' tokens
    all_gates: Tensor | None = None
    plan: Permutation | None = None


class AllGatherDispatcher:
    """Every token goes to every rank; each sums what its own experts give, and the sums come back added up."""

    def __init__(self, group: dist.ProcessGroup, place: str) -> None:
        self.group, self.place = group, place

    def start(self, x: Tensor, routing: Routing) -> _Gathered:
        indices = routing.indices.new_empty(dist.get_world_size(self.group), *routing.indices.shape)
        with crumb(f"expert choices, {self.place}"):
            dist.all_gather_single(indices.flatten(0, 1), routing.indices.contiguous(), self.group)
        gather = AllGather(f"expert dispatch, {self.place}", self.group)
        return _Gathered(x, routing, start(x, gather), start(routing.gates, gather), indices.flatten(0, 1))

    def wait(self, pending: _Gathered) -> tuple[Tensor, Tensor]:
        size = pending.routing.num_experts // dist.get_world_size(self.group)
        here = pending.indices - dist.get_rank(self.group) * size
        here = torch.where((here >= 0) & (here < size), here, size)  # others' experts stand where identity experts do
        pending.plan = plan_permutation(here, size, size + 1)
        pending.all_gates = wait(pending.gates).flatten(0, 1)
        return permute(wait(pending.tokens).flatten(0, 1), pending.plan), pending.plan.counts[:size]

    def start_back(self, rows: Tensor, pending: _Gathered) -> _Gathered:
        assert pending.all_gates is not None and pending.plan is not None
        partial = combine(rows, pending.all_gates, pending.plan, None)
        scatter = ReduceScatter(f"expert combine, {self.place}", self.group)
        pending.tokens = start(partial.view(dist.get_world_size(self.group), *pending.x.shape), scatter)
        return pending

    def wait_back(self, pending: _Gathered) -> Tensor:
        is_ffn = pending.routing.indices < pending.routing.num_experts
        identity_gate = pending.routing.gates.masked_fill(is_ffn, 0.0).sum(1, keepdim=True)
        return wait(pending.tokens) + (pending.x * identity_gate).to(pending.x.dtype)
