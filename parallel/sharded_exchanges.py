"""FSDP2's own exchanges, gathering weights and summing gradients: covered by compute, and in crumbs with their names.

On a GPU they run on streams of FSDP2's. Gloo has none, and FSDP2 stands still there until an exchange is over, so on
a CPU the exchanges here return at once: the weights of a layer travel while the one before it computes, and a sum
of gradients is awaited `IN_FLIGHT` sums later, the last ones by `finish_sums`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_common import HSDPMeshInfo

from longcat.model import LongCat
from parallel.collectives import all_gather, reduce_scatter
from parallel.crumbs import crumb, departed
from parallel.mesh import Axis

IN_FLIGHT = 3  # sums of gradients: one layer's router, experts and the rest of it


class Awaited(dist.Work):
    """An exchange under way, whose wait leaves a crumb."""

    def __init__(self, what: str, group: dist.ProcessGroup, num_bytes: int, work: dist.Work) -> None:
        super().__init__()
        self.what, self.group, self.work = what, group, work
        departed(what, num_bytes, work)

    def wait(self, timeout: timedelta | None = None) -> bool:
        with crumb(self.what, Axis.FSDP, self.group):
            return self.work.wait() if timeout is None else self.work.wait(timeout)


class GatheredWeights(DefaultAllGather):
    """Torch's all-gather in a crumb, which on NCCL ends at once; where it may go on beside compute, one of ours."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        if async_op:
            gathering = all_gather(output_tensor.view(group.size(), -1), input_tensor, group)
            return Awaited(self.what, group, input_tensor.nbytes * (group.size() - 1), gathering)
        with crumb(self.what, Axis.FSDP, group):
            return super().__call__(output_tensor, input_tensor, group)


class SummedGradients(DefaultReduceScatter):
    """Torch's reduce-scatter in a crumb."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work:
        with crumb(self.what, Axis.FSDP, group):
            return super().__call__(output_tensor, input_tensor, group, op, async_op)


class LateSummedGradients(DefaultReduceScatter):
    """A sum over ranks of a CPU, of one group of parameters.

    FSDP2 takes the output for the gradients of the shards right away. It reads them only to add to gradients that are
    there already, or to those of replicas; such sums are awaited here.
    """

    def __init__(self, what: str, parameters: Any, under_way: deque[Awaited]) -> None:
        self.what, self.parameters, self.under_way = what, parameters, under_way

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> Awaited:
        assert op == dist.ReduceOp.SUM
        summing = reduce_scatter(output_tensor, input_tensor.view(group.size(), -1), group)
        under_way = Awaited(self.what, group, input_tensor.nbytes - output_tensor.nbytes, summing)
        self.under_way.append(under_way)
        _finish(self.under_way, 0 if self._read_at_once() else IN_FLIGHT)
        return under_way

    def _read_at_once(self) -> bool:
        replicated = isinstance(self.parameters.mesh_info, HSDPMeshInfo)
        return replicated or any(one.sharded_param.grad is not None for one in self.parameters.fsdp_params)


def _finish(under_way: deque[Awaited], but: int = 0) -> None:
    while len(under_way) > but:
        under_way.popleft().wait()


def set_exchanges(model: LongCat, device: torch.device) -> None:
    """Give each unit that FSDP2 shards its exchanges: `gathered weights, layers.3`, `summed gradients, layers.3`."""
    under_way: deque[Awaited] = deque()
    for name, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        unit = name or "embedding, head and norm"
        # A unit with experts has a group of parameters for each mesh; the public setters know one group only
        for group in module._get_fsdp_state()._fsdp_param_groups:
            group._all_gather_comm = GatheredWeights(f"gathered weights, {unit}")
            summed = f"summed gradients, {unit}"
            if device.type == "cpu":
                group.unshard_async_op = True
                group._reduce_scatter_comm = LateSummedGradients(summed, group, under_way)
            else:
                group._reduce_scatter_comm = SummedGradients(summed)
    if device.type == "cpu":
        _gather_ahead(model)


def _gather_ahead(model: LongCat) -> None:
    """Let the model gather its first layer's weights, and each layer the next one's, before they compute."""
    chain: list[nn.Module] = [model, *model.shortcut_layers()]
    for module, following in pairwise(chain):
        assert isinstance(module, FSDPModule)
        ahead: list[FSDPModule] = [inner for inner in following.modules() if isinstance(inner, FSDPModule)]
        module.set_modules_to_forward_prefetch(ahead)


def finish_sums(model: LongCat) -> None:
    """Await the sums of gradients that are still under way after a backward."""
    for group in parameter_groups(model):
        if isinstance(group._reduce_scatter_comm, LateSummedGradients):
            _finish(group._reduce_scatter_comm.under_way)


def parameter_groups(model: LongCat) -> Iterator[Any]:
    """FSDP2's groups of parameters: what is gathered, and whose gradients are summed, together."""
    if isinstance(model, FSDPModule):
        for state in fully_shard.state(model)._state_ctx.all_states:  # type: ignore[attr-defined]
            yield from state._fsdp_param_groups
