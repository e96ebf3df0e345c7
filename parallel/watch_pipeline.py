"""Crumbs around what torch's pipeline schedules do on their own: their waits, their sends, the parts of a backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, schedules

from longcat.model import LongCat
from parallel.crumbs import crumb, departed, phase
from parallel.mesh import Axis

NEIGHBOURS = "hidden states and their gradients from other stages"


class WatchedStage(PipelineStage):
    """Torch's stage; each part of a backward is a phase. (`Stage.forward` makes the forward's.)"""

    def _phase(self, what: str, place: int) -> Any:
        model = self.submod.model
        assert isinstance(model, LongCat)
        return phase(f"{what} of micro-batch {place + 1} in layers {model.part.first} to {model.part.last - 1}")

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        with self._phase("backward" if full_backward else "input gradients", bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        with self._phase("weight gradients", bwd_chunk_id):
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)


@contextmanager
def watched_exchanges() -> Iterator[None]:
    """Leave crumbs at the waits of torch's schedules, which have no hook: two functions of theirs are wrapped."""
    wait, launch = schedules._wait_batch_p2p, schedules._batch_p2p

    def watched_wait(work: list[dist.Work]) -> None:
        if work:
            with crumb(NEIGHBOURS, Axis.PP):
                wait(work)

    def watched_launch(p2p_ops: list[dist.P2POp], desc: str | None = None) -> list[dist.Work]:
        work = launch(p2p_ops, desc)
        for one in p2p_ops:
            if one.op is dist.isend:
                departed(f"sent to rank {one.peer}", one.tensor.numel() * one.tensor.element_size(), None)
        return work

    schedules._wait_batch_p2p, schedules._batch_p2p = watched_wait, watched_launch
    try:
        yield
    finally:
        schedules._wait_batch_p2p, schedules._batch_p2p = wait, launch
