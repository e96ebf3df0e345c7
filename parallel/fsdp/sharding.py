"""Fully sharded data parallelism (FSDP2, and HSDP where dp > 1), and values for the shards."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Shard

from longcat.config import ModelConfig
from longcat.init import fill
from longcat.model import LongCat
from longcat.names import Box, stored_state
from parallel.expert.sharding import shard_dim
from parallel.mesh import Axis, Topology
from parallel.torch_internals import (
    FSDPMeshInfo,
    HSDPMeshInfo,
    ShardPlacementResult,
    compute_local_shape_and_global_offset,
    concatenate_meshes,
    initialize_root,
    local_shard,
    shard_without_compiler,
)


def apply_fsdp(
    model: LongCat,
    topology: Topology,
    compute_dtype: torch.dtype,
    reshard_after_forward: bool,
    hybrid: bool = True,
) -> None:
    """Shard a model on the meta device, layer by layer, in place.

    Each parameter is sharded over all ranks that have the same part of it: experts over efsdp, what tensor parallelism
    has split over fsdp × cp, all else over fsdp × cp × tp. So the reduce-scatter of gradients also adds the partial
    sums of context and tensor parallelism, and only ``dp`` replicates values.

    Weights stay float32 and are cast to ``compute_dtype`` when gathered; the router is a separate unit that computes in
    float32. Gradients are SUMS over ranks in float32: the loss is divided by the valid tokens of the global batch, so
    FSDP2 must not divide again. With ``hybrid`` FSDP2 also sums them over ``dp``; without, the caller must.
    """
    shard_without_compiler()
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    exact = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    mesh = with_replicas(topology, topology.replicated) if hybrid else topology.replicated
    placement_of = placements(topology, hybrid)

    def unit(module: nn.Module, policy: MixedPrecisionPolicy, reshard: bool = reshard_after_forward) -> None:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, shard_placement_fn=placement_of)

    for layer in model.shortcut_layers():
        if compute_dtype is not torch.float32:
            unit(layer.mlp.router, exact)
        unit(layer, policy)
    if model.mtp is not None:
        for predictor in model.mtp.layers:
            unit(predictor, policy)
    unit(model, policy, reshard=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def with_replicas(topology: Topology, mesh: DeviceMesh) -> DeviceMesh:
    """A sharding mesh, with the axis dp in front if dp > 1."""
    if topology.sizes.dp == 1:
        return mesh
    return concatenate_meshes([topology.mesh[Axis.DP], mesh])


def placements(topology: Topology, hybrid: bool = True) -> Callable[[nn.Parameter], Shard | ShardPlacementResult]:
    """The mesh and dimension over which FSDP2 shards a parameter; the mesh depends on how it is already split."""
    known: dict[str, FSDPMeshInfo] = {}
    units = topology.replicated.get_group().group_name
    expert_shards = topology.experts["efsdp"]

    def on(mesh: DeviceMesh, dim: int) -> Shard | ShardPlacementResult:
        name = mesh.get_group().group_name
        if name == units:
            return Shard(dim)  # the unit's own mesh
        if name not in known:  # FSDP2 needs one object per group
            mesh = with_replicas(topology, mesh) if hybrid else mesh
            known[name] = FSDPMeshInfo(mesh, 0) if mesh.ndim == 1 else HSDPMeshInfo(mesh, 1, 0)
        return ShardPlacementResult(Shard(dim), known[name])

    def placement_of(parameter: nn.Parameter) -> Shard | ShardPlacementResult:
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if parameter.ndim == 3:  # a stack of experts
            dim = shard_dim(tuple(local.shape), topology.sizes.efsdp)
            assert dim is not None, "check_expert_shards refuses the layout"
            return on(expert_shards if local is not parameter else topology.replicated, dim)
        return on(topology.dense if local is not parameter else topology.replicated, 0)

    return placement_of


def set_gradient_sync(model: nn.Module, last: bool) -> None:
    """Reduce gradients only in the ``last`` micro-batch of a step; before it they accumulate locally, in float32.

    Or, with ``last`` for each one, in every micro-batch; reduced gradients add up in the shards.
    """
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(last)
    model.set_is_last_backward(last)


def local_part(tensor: Tensor) -> tuple[Tensor, Box | None]:
    """This rank's part of a tensor and its box in the full tensor, None if it is not sharded. Autograd sees neither."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), None
    return local_shard(tensor).detach(), _box(tensor.shape, tensor.device_mesh, tensor.placements)


@cache  # torch takes 0.1 ms, and every step needs it for every tensor
def _box(shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Box:
    local, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    return tuple((o, o + s) for o, s in zip(offset, local, strict=True))


def materialise(model: LongCat, config: ModelConfig, seed: int, device: torch.device) -> None:
    """Allocate what was built on the meta device and give every local shard its values from (seed, name)."""
    model.to_empty(device=device)
    for name, tensor in stored_state(model):
        local, box = local_part(tensor)
        fill(local, name, tuple(tensor.shape), box, config, seed)
    gather_late_units(model)


def gather_late_units(model: LongCat) -> None:
    """Gather the units that may join late, the MTP layers.

    With deferred reduction FSDP2 reads every unit's last gathered weights, even if the unit never ran.
    """
    if isinstance(model, FSDPModule) and model.mtp is not None:
        initialize_root(model)
        for layer in model.mtp.layers:
            assert isinstance(layer, FSDPModule)
            layer.unshard()
            layer.reshard()
