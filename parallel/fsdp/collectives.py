"""FSDP2's all-gathers of weights and reduce-scatters of gradients: overlapped with compute, each in a span.

On a GPU they run on FSDP2's streams. Gloo has no streams, and FSDP2 would block until each collective ends, so on a CPU
these collectives return at once. The weights of a layer are gathered while the one before computes. A unit's
reduce-scatter is waited for when the second unit after it starts its own, the last ones by `wait_for_reductions`.
With replicas (dp > 1) FSDP2 needs each sum at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from longcat.model import LongCat
from parallel.collectives.point_to_point import all_gather, reduce_scatter, tree_sum
from parallel.fsdp.prefetch import keep_gradients_in_flight, prefetch_in_order
from parallel.torch_internals import (
    DefaultAllGather,
    DefaultReduceScatter,
    HSDPMeshInfo,
    all_parameter_groups,
    keeps_reduced_gradients_as_views,
    parameter_groups_of,
    reduce_scatter_of,
    set_all_gather,
    set_reduce_scatter,
    set_reduced_gradient_hook,
)
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import launching, record_launch, stream_wait, wait_span

ROOT_UNIT = "embedding, head and norm"  # what FSDP2 shards outside layers, in events


class TracedCollective(dist.Work):
    """A collective in progress, whose wait is a span."""

    def __init__(self, event: Event, group: dist.ProcessGroup, num_bytes: int, work: dist.Work) -> None:
        super().__init__()
        self.event, self.group, self.work = event, group, work
        record_launch(event, num_bytes, work)

    def wait(self, timeout: timedelta | None = None) -> bool:
        with wait_span(self.event, self.group):
            return self.work.wait() if timeout is None else self.work.wait(timeout)


class TracedAllGather(DefaultAllGather):
    """Torch's all-gather in a span (on NCCL the call returns at once); our own if asynchronous."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        if async_op:
            with launching(self.event, group):
                gathering = all_gather(output_tensor.view(group.size(), -1), input_tensor, group)
            return TracedCollective(self.event, group, input_tensor.nbytes * (group.size() - 1), gathering)
        with wait_span(self.event, group):
            return super().__call__(output_tensor, input_tensor, group)


class TracedReduceScatter(DefaultReduceScatter):
    """Torch's reduce-scatter in a span."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work:
        with wait_span(self.event, group):
            return super().__call__(output_tensor, input_tensor, group, op, async_op)


class TreeReduceScatter(DefaultReduceScatter):
    """A GPU's reduce-scatter with a fixed order: an all-to-all, then a local `tree_sum`. It has run over gloo only."""

    def __init__(self, event: Event, branches: int) -> None:
        self.event, self.branches = event, branches

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work:
        parts = torch.empty_like(input_tensor)
        with wait_span(self.event, group):
            work = dist.all_to_all_single(parts, input_tensor, group=group, async_op=True)
            assert work is not None
            work.wait()
        output_tensor.copy_(tree_sum(list(parts.view(group.size(), -1)), self.branches))
        return work


class ReplicaSum:
    """FSDP2's hook on reduced gradients: adds those of all replicas as a binary tree, in place."""

    def __init__(self, event: Event, group: dist.ProcessGroup) -> None:
        self.event, self.group = event, group

    def __call__(self, reduced: Tensor) -> None:
        parts = reduced.new_empty((self.group.size(), *reduced.shape))
        with wait_span(self.event, self.group):
            all_gather(parts, reduced, self.group).wait()
        reduced.copy_(tree_sum(list(parts), self.group.size()))


class PendingReductions:
    """A model's reduce-scatters in progress, of two units at most."""

    def __init__(self) -> None:
        self._units: deque[tuple[Event, list[TracedCollective]]] = deque()

    def unit_works(self, unit: Event) -> list[TracedCollective]:
        """The list of a unit that starts one; first waits for all but the previous unit's."""
        if not self._units or self._units[-1][0] != unit:
            self.wait(keep=1)
            self._units.append((unit, []))
        return self._units[-1][1]

    def wait(self, keep: int = 0) -> None:
        """Wait for all, except for the last ``keep`` units'."""
        while len(self._units) > keep:
            for one in self._units.popleft()[1]:
                one.wait()


class DeferredReduceScatter(DefaultReduceScatter):
    """The reduce-scatter of one group of parameters on a CPU.

    FSDP2 makes the gradients of the shards from the output at once. Where they are views of it (`_only_viewed`), the
    wait is deferred; otherwise the call blocks.
    """

    def __init__(self, event: Event, parameters: Any, pending: PendingReductions, branches: int) -> None:
        self.event, self.parameters, self.pending, self.branches = event, parameters, pending, branches

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> TracedCollective:
        assert op == dist.ReduceOp.SUM
        works = self.pending.unit_works(self.event)
        parts = input_tensor.view(group.size(), -1)
        with launching(self.event, group):
            summing = reduce_scatter(output_tensor, parts, group, self.event.text, self.branches)
        num_bytes = input_tensor.nbytes - output_tensor.nbytes
        works.append(TracedCollective(self.event, group, num_bytes, summing))
        if not self._only_viewed(output_tensor):
            self.pending.wait()
        return works[-1]

    def _only_viewed(self, output: Tensor) -> bool:
        """Whether there are no replicas, division, cast, hook, or gradient to add to."""
        group = self.parameters
        return (
            not isinstance(group.mesh_info, HSDPMeshInfo)
            and group.gradient_divide_factor == 1.0
            and keeps_reduced_gradients_as_views(group, output)
            and all(one.sharded_param.grad is None for one in group.fsdp_params)
        )


def install_collectives(
    model: LongCat, device: torch.device, branches: int = 0, replicas: dist.ProcessGroup | None = None
) -> None:
    """Give each unit that FSDP2 shards its collectives: `weight all-gather, layers.3`, `gradient reduce-scatter, …`.

    ``branches``: add gradients by `tree_sum`; 0 = in rank order on a CPU, in the backend's order on a GPU.
    ``replicas``: the ranks with the same shards of a model, where FSDP2 does not know of them.
    """
    pending = PendingReductions()
    for name, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        unit = name or ROOT_UNIT
        reduction = Event(SpanKind.GRADIENT_REDUCE_SCATTER, module=unit)
        # A unit with experts has a group of parameters per mesh; the public setters handle only one group
        for group in parameter_groups_of(module):
            set_all_gather(group, TracedAllGather(Event(SpanKind.WEIGHT_ALL_GATHER, module=unit)))
            if device.type == "cpu":
                group.unshard_async_op = True
                collective = DeferredReduceScatter(reduction, group, pending, max(branches, 1))
                set_reduce_scatter(group, collective)
            elif branches:
                set_reduce_scatter(group, TreeReduceScatter(reduction, branches))
            else:
                set_reduce_scatter(group, TracedReduceScatter(reduction))
            if replicas is not None and replicas.size() > 1:
                set_reduced_gradient_hook(group, ReplicaSum(reduction, replicas))
    prefetch_in_order(model, mtp=False)
    if device.type != "cpu":
        keep_gradients_in_flight(model)
        count_stream_waits(model)


def count_stream_waits(model: LongCat) -> None:
    """Count where FSDP2 makes the compute stream wait: for gathered weights, and for sums at the end of a backward.

    The counted time includes the copies out of the gathered buffers.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in parameter_groups_of(module):
                group.wait_for_unshard = _counted(group.wait_for_unshard)
                group.finalize_backward = _counted(group.finalize_backward)


def _counted(wait: Callable[[], None]) -> Callable[[], None]:
    def counted() -> None:
        with stream_wait():
            wait()

    return counted


def wait_for_reductions(model: LongCat) -> None:
    """Wait for the reduce-scatters in progress after a backward. A failed one raises."""
    for group in parameter_groups(model):
        collective = reduce_scatter_of(group)
        if isinstance(collective, DeferredReduceScatter):
            collective.pending.wait()


def parameter_groups(model: LongCat) -> Iterator[Any]:
    """FSDP2's groups of parameters, each gathered and reduced in one collective."""
    if isinstance(model, FSDPModule):
        yield from all_parameter_groups(model)
