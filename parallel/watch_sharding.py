"""Crumbs around FSDP2's own exchanges: gathering weights and summing gradients, with the layer's name."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from parallel.crumbs import crumb
from parallel.mesh import Axis


class WatchedAllGather(DefaultAllGather):
    """Torch's all-gather in a crumb. On gloo it blocks here; on NCCL the host goes on and the crumb ends at once."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        with crumb(self.what, Axis.FSDP, group):
            return super().__call__(output_tensor, input_tensor, group, async_op)


class WatchedReduceScatter(DefaultReduceScatter):
    """Torch's reduce-scatter in a crumb."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work:
        with crumb(self.what, Axis.FSDP, group):
            return super().__call__(output_tensor, input_tensor, group, op, async_op)


def watch_sharding(model: nn.Module) -> None:
    """Give each unit that FSDP2 shards its crumbs: `gathered weights, layers.3`, `summed gradients, layers.3`."""
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            unit = name or "embedding, head and norm"
            # A unit with experts has a group of parameters for each mesh; the public setters know one group only
            for group in module._get_fsdp_state()._fsdp_param_groups:
                group._all_gather_comm = WatchedAllGather(f"gathered weights, {unit}")
                group._reduce_scatter_comm = WatchedReduceScatter(f"summed gradients, {unit}")
