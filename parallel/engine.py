"""How a step's micro-batches run through the parts of a model on this rank: the interface, and one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from longcat.model import LongCat, Losses
from parallel.fsdp.collectives import wait_for_reductions
from parallel.fsdp.sharding import set_gradient_sync
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import work_span

Objective = Callable[[Losses], Tensor]  # one micro-batch's part of the step's loss, as far as it arises in one part


class MicroBatch(Protocol):
    """Whole sequences, on every rank that shares them: [B, S] each."""

    @property
    def tokens(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...

    @property
    def valid(self) -> Tensor: ...

    @property
    def documents(self) -> Tensor | None: ...


class Engine(Protocol):
    """Runs micro-batches through the parts here. A collective of all ranks."""

    parts: list[LongCat]

    def run(self, micro_batches: Sequence[MicroBatch], objective: Objective, mtp: bool) -> list[list[Losses]]:
        """Forward and backward of a step; gradients are complete then → for each part its micro-batches' losses."""

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> list[list[Losses]]:
        """Forward without gradients and MTP → the same."""

    def close(self) -> None:
        """Let go of what outlives the object, so that another run can start in this process."""


class SequentialEngine:
    """One micro-batch after the other through a model that is all here."""

    def __init__(self, model: LongCat) -> None:
        self.parts = [model]

    def run(self, micro_batches: Sequence[MicroBatch], objective: Objective, mtp: bool) -> list[list[Losses]]:
        model = self.parts[0]
        found = []
        for number, batch in enumerate(micro_batches, start=1):
            set_gradient_sync(model, last=number == len(micro_batches))
            with work_span(Event(SpanKind.FORWARD, micro_batch=number)):
                losses: Losses = model(batch.tokens, batch.labels, batch.valid, batch.documents, mtp=mtp)
            with work_span(Event(SpanKind.BACKWARD, micro_batch=number)):
                objective(losses).backward()
                wait_for_reductions(model)
            found.append(detached(losses))
            del losses  # the next forward would find this one's graph in memory
        return [found]

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> list[list[Losses]]:
        model = self.parts[0]
        return [[model(one.tokens, one.labels, one.valid, one.documents, mtp=False) for one in micro_batches]]

    def close(self) -> None:
        pass


def detached(losses: Losses) -> Losses:
    """Without their graph and without the residual stream, which would keep a micro-batch's memory."""
    return Losses(*(tensor.detach() for tensor in losses))._replace(hidden=losses.lm.detach())
