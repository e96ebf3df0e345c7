"""Crumbs around the sends and receives of torch's pipeline schedules, with micro-batch, layers and the peer's rank."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import wraps
from typing import Any

import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

from parallel.mesh import Axis
from parallel.torch_internals import wrap_batch_p2p
from parallel.watchdog.spans import record_launch, wait_span, work_span


class TracedStage(PipelineStage):
    """Torch's stage; its transfers and its backward say what they are."""

    def __init__(self, *args: Any, layers: str, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.layers = layers

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._named(super().get_fwd_recv_ops(fwd_chunk_id), "hidden states", fwd_chunk_id, "into")

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._named(super().get_bwd_recv_ops(bwd_chunk_id), "gradients", bwd_chunk_id, "into")

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._named(super().get_fwd_send_ops(fwd_chunk_id), "hidden states", fwd_chunk_id, "out of")

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._named(super().get_bwd_send_ops(bwd_chunk_id), "gradients", bwd_chunk_id, "out of")

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        what = "backward" if full_backward else "input gradients"
        with work_span(f"{what} of micro-batch {bwd_chunk_id + 1} in {self.layers}"):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **keywords: Any) -> None:
        with work_span(f"weight gradients of micro-batch {bwd_chunk_id + 1} in {self.layers}"):
            super().backward_weight_one_chunk(bwd_chunk_id, *args, **keywords)

    def _named(self, operations: list[dist.P2POp], what: str, place: int, way: str) -> list[dist.P2POp]:
        for operation in operations:
            operation.what = f"{what} of micro-batch {place + 1} {way} {self.layers}"  # type: ignore[attr-defined]
        return operations


class TracedWork:
    """A transfer's work, whose wait leaves a crumb."""

    def __init__(self, work: dist.Work, what: str, peers: list[int]) -> None:
        self.work, self.what, self.peers = work, what, peers

    def wait(self, *timeout: timedelta) -> bool:
        with wait_span(self.what, Axis.PP, self.peers):
            return self.work.wait(*timeout)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.work, name)


def watched(batch: Callable[..., list[dist.Work]]) -> Callable[..., list[Any]]:
    """Torch's launch of sends and receives, giving works that leave crumbs."""

    @wraps(batch)
    def launch(operations: list[dist.P2POp], *args: Any, **keywords: Any) -> list[Any]:
        works = batch(operations, *args, **keywords)
        for one in operations:
            if one.op is dist.isend:
                record_launch(f"sent to rank {one.peer}", one.tensor.numel() * one.tensor.element_size(), None)
        single = len(works) == len(operations)  # NCCL gives one work for several
        groups = [[one] for one in operations] if single else [operations] * len(works)
        return [_watch(work, group) for work, group in zip(works, groups, strict=True)]

    return launch


def _watch(work: dist.Work, operations: list[dist.P2POp]) -> TracedWork:
    names = dict.fromkeys(getattr(one, "what", "a transfer between stages") for one in operations)
    return TracedWork(work, " and ".join(names), [one.peer for one in operations])


wrap_batch_p2p(watched)
