"""Expert parallelism: each rank of a group holds a part of every layer's FFN experts (dispatchers.py sends tokens)."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from longcat.interfaces import install
from longcat.model import LongCat
from parallel.config import DispatcherKind
from parallel.expert.dispatchers import AllGatherDispatcher, AllToAllDispatcher
from parallel.mesh import Topology


def apply_expert_parallel(model: LongCat, topology: Topology, kind: DispatcherKind) -> None:
    """Shard every layer's experts over the ranks of the expert-parallel group, in place, on the meta device."""
    size, num_experts = topology.sizes.ep, model.config.num_experts
    if size == 1:
        return
    mesh = topology.experts["ep"]
    for layer in model.shortcut_layers():
        experts = layer.mlp.experts
        for name, weight in list(experts.named_parameters(recurse=False)):
            part = torch.empty(num_experts // size, *weight.shape[1:], device=weight.device)
            sharded = DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
            experts.register_parameter(name, nn.Parameter(sharded))
    install_dispatchers(model, topology, kind)


def install_dispatchers(model: LongCat, topology: Topology, kind: DispatcherKind) -> None:
    """Let every layer send tokens to the ranks of their experts, in place."""
    if topology.sizes.ep > 1:
        dispatcher = AllToAllDispatcher if kind == DispatcherKind.all_to_all else AllGatherDispatcher
        group = topology.expert_exchange
        install(model, dispatcher=lambda name: dispatcher(group, int(name.split(".")[1])))  # layers.3.mlp
