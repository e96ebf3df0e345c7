"""The collectives that autograd nodes start: all-to-all, all-gather, reduce-scatter, each with its reverse."""

# n ranks of the group; rank r holds shard r

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch.distributed as dist
from torch import Tensor

from parallel.collectives.point_to_point import all_gather, reduce_scatter
from parallel.watchdog.events import Event


class Collective(ABC):
    """A collective over one group: how to launch it, and which collective carries the gradients."""

    bytes_sent: ClassVar[int] = 0  # by this process to others, in all collectives; for measurements

    def __init__(self, event: Event, group: dist.ProcessGroup) -> None:
        self.event, self.group = event, group  # the event is what a message names where a collective hangs

    @abstractmethod
    def launch(self, x: Tensor) -> tuple[dist.Work | None, Tensor]:
        """Start sending ``x``, which must not change until the work is done → (work, the output tensor)."""

    @abstractmethod
    def elements_sent(self, x: Tensor) -> float:
        """Elements of ``x`` that must leave this rank, whatever the algorithm."""

    @abstractmethod
    def reverse(self) -> Collective:
        """The collective of the gradients."""

    def outgoing(self, x: Tensor) -> tuple[Tensor, list[int] | None] | None:
        """What each rank of the group must receive from here, as in `Ledger.send_parts`; None for sums."""
        return None

    def incoming(self, out: Tensor) -> tuple[Tensor, list[int] | None] | None:
        """What arrived from each rank of the group, likewise."""
        return None


class AllToAll(Collective):
    """Rows [P, D] in n chunks, one for each rank → the chunks that all ranks have for this one, in rank order."""

    def __init__(self, event: Event, group: dist.ProcessGroup, sent: list[int], received: list[int]) -> None:
        super().__init__(event, group)
        self.sent, self.received = sent, received

    def launch(self, x: Tensor) -> tuple[dist.Work | None, Tensor]:
        out = x.new_empty(sum(self.received), *x.shape[1:])
        return dist.all_to_all_single(out, x, self.received, self.sent, self.group, async_op=True), out

    def elements_sent(self, x: Tensor) -> float:
        return (x.shape[0] - self.sent[dist.get_rank(self.group)]) * x[:1].numel()

    def reverse(self) -> Collective:
        return AllToAll(self.event, self.group, self.received, self.sent)

    def outgoing(self, x: Tensor) -> tuple[Tensor, list[int]]:
        return x, self.sent

    def incoming(self, out: Tensor) -> tuple[Tensor, list[int]]:
        return out, self.received


class AllGather(Collective):
    """x [...] → the tensors of all ranks [n, ...]; gradients are summed over ranks."""

    def launch(self, x: Tensor) -> tuple[dist.Work | None, Tensor]:
        out = x.new_empty(dist.get_world_size(self.group), *x.shape)
        return all_gather(out, x, self.group), out

    def elements_sent(self, x: Tensor) -> float:
        return x.numel() * (dist.get_world_size(self.group) - 1)

    def reverse(self) -> Collective:
        return ReduceScatter(self.event, self.group)

    def outgoing(self, x: Tensor) -> tuple[Tensor, None]:
        return x.expand(self.group.size(), *x.shape), None

    def incoming(self, out: Tensor) -> tuple[Tensor, None]:
        return out, None


class ReduceScatter(Collective):
    """x [n, ...] → the sum over ranks of their part for this rank, [...]."""

    def launch(self, x: Tensor) -> tuple[dist.Work | None, Tensor]:
        out = x.new_empty(x.shape[1:])
        return reduce_scatter(out, x, self.group, self.event.text), out

    def elements_sent(self, x: Tensor) -> float:
        return x.numel() * (1 - 1 / dist.get_world_size(self.group))

    def reverse(self) -> Collective:
        return AllGather(self.event, self.group)
