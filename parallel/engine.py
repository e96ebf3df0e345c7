"""Engines run a step's micro-batches through this rank's parts of a model: the interface, and sequential execution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from longcat.documents import Documents
from longcat.model import LongCat, Losses
from parallel.config import Accumulate
from parallel.fsdp.collectives import wait_for_reductions
from parallel.fsdp.prefetch import prefetch_in_order
from parallel.fsdp.sharding import set_gradient_sync
from parallel.layout import BatchShape
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import work_span

Objective = Callable[[Losses], Tensor]  # one model part's share of one micro-batch's loss


class MicroBatch(Protocol):
    """Full sequences [B, S], the same on all ranks that share them."""

    @property
    def tokens(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...

    @property
    def valid(self) -> Tensor: ...

    @property
    def documents(self) -> Documents | None: ...


class Engine(Protocol):
    """Runs micro-batches through this rank's parts. Its methods are collectives of all ranks."""

    parts: list[LongCat]

    def run(self, micro_batches: Sequence[MicroBatch], objective: Objective, mtp: bool) -> list[list[Losses]]:
        """Forward and backward of a step, with complete gradients → for each part its micro-batches' losses."""

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> list[list[Losses]]:
        """Forward without gradients and MTP → the same."""

    def reshape(self, batch: BatchShape) -> None:
        """Expect steps of another number and shape of micro-batches from now on."""

    def close(self) -> None:
        """Release what outlives the object, so that another run can start in this process."""


class SequentialEngine:
    """Runs one micro-batch after the other through a model without pipeline stages."""

    def __init__(self, model: LongCat, accumulate: Accumulate = Accumulate.unsharded) -> None:
        self.parts, self.accumulate = [model], accumulate

    def run(self, micro_batches: Sequence[MicroBatch], objective: Objective, mtp: bool) -> list[list[Losses]]:
        return self.run_turn(micro_batches, objective, mtp)

    def run_turn(self, micro_batches: Sequence[MicroBatch], objective: Objective, mtp: bool) -> list[list[Losses]]:
        """As `run`; see `parallel.elastic.TurnEngine`."""
        model = self.parts[0]
        prefetch_in_order(model, mtp)
        per_micro_batch = []
        for number, batch in enumerate(micro_batches, start=1):
            set_gradient_sync(model, self.accumulate == Accumulate.sharded or number == len(micro_batches))
            with work_span(Event(SpanKind.FORWARD, micro_batch=number)):
                losses: Losses = model(batch.tokens, batch.labels, batch.valid, batch.documents, mtp=mtp)
            with work_span(Event(SpanKind.BACKWARD, micro_batch=number)):
                objective(losses).backward()
                wait_for_reductions(model)
            per_micro_batch.append(detached(losses))
            del losses  # else this graph stays in memory during the next forward
        return [per_micro_batch]

    def complete(self) -> None:
        """Nothing is left to sum."""

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> list[list[Losses]]:
        model = self.parts[0]
        prefetch_in_order(model, mtp=False)
        return [[model(one.tokens, one.labels, one.valid, one.documents, mtp=False) for one in micro_batches]]

    def reshape(self, batch: BatchShape) -> None:
        pass  # each micro-batch brings its shape

    def close(self) -> None:
        pass


def detached(losses: Losses) -> Losses:
    """The losses without graph and residual stream, which would keep a micro-batch's memory."""
    return Losses(*(tensor.detach() for tensor in losses))._replace(hidden=losses.lm.detach())
