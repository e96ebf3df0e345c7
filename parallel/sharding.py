"""Fully sharded data parallelism (FSDP2, and HSDP where dp > 1), and values for the shards."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from longcat.config import ModelConfig
from longcat.init import fill
from longcat.model import LongCat
from longcat.names import Box, stored_state
from parallel.mesh import Axis, ParallelConfig, Topology


def shard(model: LongCat, topology: Topology, config: ParallelConfig, compute_dtype: torch.dtype) -> None:
    """Shard a model that lives on the meta device, layer by layer, in place.

    Weights stay float32 and are cast to ``compute_dtype`` where they are gathered; the router is a unit of its own
    that stays in float32. Gradients are SUMS over ranks in float32: the loss is divided by the valid tokens of
    the global batch, so nothing here may divide again.
    """
    mesh = topology.mesh[Axis.DP, Axis.FSDP] if topology.sizes.dp > 1 else topology.mesh[Axis.FSDP]
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    exact = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    reshard = config.reshard_after_forward
    for layer in model.shortcut_layers():
        if compute_dtype is not torch.float32:
            fully_shard(layer.mlp.router, mesh=mesh, mp_policy=exact, reshard_after_forward=reshard)
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    if model.mtp is not None:
        for predictor in model.mtp.layers:
            fully_shard(predictor, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def set_gradient_sync(model: LongCat, last: bool, mtp: bool) -> None:
    """Reduce gradients in the ``last`` micro-batch of a step only; before it they add up on this rank, in float32.

    MTP layers that are not in use keep reducing what they do not have: FSDP2 asks all others for gathered weights.
    """
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(last)
    model.set_is_last_backward(last)
    if model.mtp is not None and not mtp:
        for predictor in model.mtp.layers:
            assert isinstance(predictor, FSDPModule)
            predictor.set_requires_gradient_sync(True)


def local_part(tensor: Tensor) -> tuple[Tensor, Box | None]:
    """This rank's part of a tensor and its box in the whole; None for a tensor that is not sharded."""
    if not isinstance(tensor, DTensor):
        return tensor, None
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple((o, o + s) for o, s in zip(offset, shape, strict=True))


def materialise(model: LongCat, config: ModelConfig, seed: int, device: torch.device) -> None:
    """Allocate what was built on the meta device and give every local shard its values from (seed, name)."""
    model.to_empty(device=device)
    for name, tensor in stored_state(model):
        local, box = local_part(tensor.detach())
        fill(local, name, tuple(tensor.shape), box, config, seed)
