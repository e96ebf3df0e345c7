"""Pipeline parallelism: a step of this rank's stages under one of torch's schedules, and forward-only evaluation.

Each stage is a `LongCat` with a `ModelPart`. Stages exchange only hidden states [B, s, D]; every rank has ids, labels
and masks. The auxiliary losses of inner stages enter the backward where they arise (`AddLoss`), since torch's schedules
have a loss only at the last stage.
"""

# B sequences of a micro-batch, s positions on this rank, D width

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from longcat.errors import LongCatError
from longcat.model import LongCat, Losses
from parallel.config import Schedule
from parallel.engine import MicroBatch, Objective, detached
from parallel.fsdp import accumulation
from parallel.fsdp.prefetch import prefetch_in_order
from parallel.fsdp.sharding import local_part
from parallel.layout import BatchShape
from parallel.mesh import Axis, Topology
from parallel.pipeline.spans import TracedStage
from parallel.pipeline.stages import SPLIT_BACKWARD, check_micro_batches, num_stages, rank_of, stages_of
from parallel.pipeline.weight_grad_store import WeightGradQueue, defer_weight_gradients
from parallel.sdc.ledger import LEDGER
from parallel.watchdog.errors import causes
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import launching, wait_span, work_span


class AddLoss(torch.autograd.Function):
    """Returns ``hidden``; the backward gives the scalar ``total`` the gradient 1, as if it were part of the loss."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, total: Tensor) -> Tensor:
        ctx.one = torch.ones_like(total)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], ctx.one


class StageModule(nn.Module):
    """A part of the model as torch's schedules call it: a micro-batch's number in, hidden states or the loss out.

    The number selects the micro-batch, since every stage needs more of it than the tokens.
    """

    def __init__(self, model: LongCat) -> None:
        super().__init__()
        self.model = model
        self.micro_batches: Sequence[MicroBatch] = ()
        self.objective: Objective | None = None
        self.mtp = False
        self.found: dict[int, Losses] = {}

    def forward(self, x: Tensor, number: Tensor | None = None) -> Tensor:
        """x: the number [1] at the first stage, hidden [B, s, D] at others → hidden [B, s, D], or the loss at the last.

        ``number`` [1] int64 stays on the CPU, so that reading it does not wait for a GPU.
        """
        first = self.model.part.embedding
        micro_batch = self.number_of(x if number is None else number)
        batch = self.micro_batches[micro_batch]
        hidden = None if first else x
        with work_span(Event(SpanKind.FORWARD, micro_batch=micro_batch + 1, layers=layers_of(self.model))):
            losses: Losses = self.model(batch.tokens, batch.labels, batch.valid, batch.documents, self.mtp, hidden)
        self.found[micro_batch] = detached(losses)
        if self.objective is None:
            return losses.hidden
        total = self.objective(losses)
        return total if self.model.part.head else AddLoss.apply(losses.hidden, total)  # type: ignore[no-any-return]

    def number_of(self, micro_batch: Tensor) -> int:
        """The micro-batch's number that came as a tensor [1]."""
        return int(micro_batch)

    def take(self) -> list[Losses]:
        """The losses since the last call, in the order of the micro-batches."""
        found, self.found = self.found, {}
        self.micro_batches, self.objective = (), None
        return [found[micro_batch] for micro_batch in sorted(found)]


class PipelineEngine:
    """This rank's stages and their schedule.

    ``models`` are this rank's parts by `stages_of`, with values, unsharded or sharded by `apply_fsdp` with
    ``reshard_after_forward=False``. ``hidden_shape`` is [B, s, D] of a micro-batch's hidden states on this rank, which
    are sent in ``compute_dtype``.

    Raises:
        ConfigError: the schedule cannot run ``num_micro_batches``.
    """

    def __init__(
        self,
        models: Sequence[LongCat],
        topology: Topology,
        schedule: Schedule,
        num_micro_batches: int,
        hidden_shape: tuple[int, int, int],
        compute_dtype: torch.dtype,
    ) -> None:
        pp, rank = topology.sizes.pp, topology.coordinate(Axis.PP)
        check_micro_batches(schedule, pp, num_micro_batches)
        self.parts = list(models)
        self.schedule_name, self.num_micro_batches, self.pp = schedule, num_micro_batches, pp
        self.stage_indices, self._num_stages = stages_of(schedule, pp, rank), num_stages(schedule, pp)
        if len(self.stage_indices) != len(self.parts):
            raise ValueError(
                f"{len(models)} models for the stages {self.stage_indices} of parallel.schedule={schedule}"
            )
        self.device, self.group = topology.device, topology.group(Axis.PP)
        self.shape, self.dtype = hidden_shape, compute_dtype
        self.num_shards = topology.sizes.cp * topology.sizes.tp  # of a sequence
        self.modules = [StageModule(model) for model in self.parts]
        self.queues = [WeightGradQueue() for _ in self.parts] if schedule in SPLIT_BACKWARD else []
        for model, queue in zip(self.parts, self.queues, strict=False):
            defer_weight_gradients(model, queue)
        self._build()

    def _build(self) -> None:
        """Torch's stages and schedule, which have a fixed number and shape of micro-batches."""
        self.stages = [self._stage(index) for index in range(len(self.parts))]
        self.schedule = self._schedule()

    def reshape(self, batch: BatchShape) -> None:
        check_micro_batches(self.schedule_name, self.pp, batch.num_micro_batches)
        shape = batch.sequences, batch.length // self.num_shards, self.shape[2]
        if (batch.num_micro_batches, shape) != (self.num_micro_batches, self.shape):
            self.num_micro_batches, self.shape = batch.num_micro_batches, shape
            self._build()

    def run(self, micro_batches: Sequence[MicroBatch], objective: Objective, mtp: bool) -> list[list[Losses]]:
        """Forward and backward of the micro-batches; the parameters then have reduced gradients.

        ``objective`` returns this part's share of a micro-batch's loss [], divided by what it counts over the global
        batch; every stage calls it. Returns for each local stage the losses of each micro-batch, without graph and
        hidden states. A collective of the pipeline.
        """
        losses = self.run_turn(micro_batches, objective, mtp)
        self.complete()
        return losses

    def run_turn(self, micro_batches: Sequence[MicroBatch], objective: Objective, mtp: bool) -> list[list[Losses]]:
        """As `run`, without the sum over the embedding's copies."""
        if len(micro_batches) != self.num_micro_batches:
            raise ValueError(f"{len(micro_batches)} micro-batches for a pipeline of {self.num_micro_batches}")
        for module in self.modules:
            module.micro_batches, module.objective, module.mtp = micro_batches, objective, mtp
            prefetch_in_order(module.model, mtp)
            accumulation.begin_accumulation(module.model)
        numbers = torch.arange(self.num_micro_batches)
        first, last = (any(getattr(stage, name) for stage in self.stages) for name in ("is_first", "is_last"))
        given = (numbers,) if first else ()
        with work_span(Event(SpanKind.PIPELINE)), unwrapped_errors():
            self.schedule.step(*given, number=numbers, target=numbers if last else None, return_outputs=False)
        assert not any(len(queue) for queue in self.queues), "weight gradients were left behind"
        for model in self.parts:
            accumulation.reduce_accumulated(model)
        return [module.take() for module in self.modules]

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> list[list[Losses]]:
        """Forward of any number of micro-batches without gradients and MTP; losses as `run` returns them.

        Each local stage runs all micro-batches before the next one does. All receives of a stage are posted at its
        start: two ranks that exchange in both directions then use the same order. A collective of the pipeline.
        """
        local_outputs: list[Tensor] = []  # of the previous stage, if it is local too
        sends: list[tuple[dist.Work, Tensor, Event, list[int]]] = []  # with tensors, kept alive until sent
        for module, number in zip(self.modules, self.stage_indices, strict=True):
            module.micro_batches, module.objective, module.mtp = micro_batches, None, False
            prefetch_in_order(module.model, mtp=False)
            arrivals, layers = self._post_receives(number, len(micro_batches)), layers_of(module.model)
            outputs = []
            for micro_batch in range(len(micro_batches)):
                x = local_outputs[micro_batch] if local_outputs else torch.tensor([micro_batch])
                if arrivals:
                    work, x = arrivals[micro_batch]
                    received = Event(SpanKind.RECEIVE_HIDDEN_STATES, micro_batch=micro_batch + 1, layers=layers)
                    with wait_span(received, self._peers_of(number - 1)):
                        work.wait()
                hidden = module(x, torch.tensor([micro_batch]))
                if number + 1 in self.stage_indices:
                    outputs.append(hidden)
                elif number + 1 < self._num_stages:
                    sent = Event(SpanKind.SEND_HIDDEN_STATES, micro_batch=micro_batch + 1, layers=layers)
                    with launching(sent, self._peers_of(number + 1)):
                        sends.append((*self._send(hidden, number + 1), sent, self._peers_of(number + 1)))
            local_outputs = outputs
        for work, _, sent, peers in sends:
            with wait_span(sent, peers):
                work.wait()
        for model in self.parts:
            accumulation.reshard_all(model)
        return [module.take() for module in self.modules]

    def close(self) -> None:
        pass

    def _stage(self, index: int) -> TracedStage:
        """Torch's stage with given shapes: else torch runs a forward and backward to learn them."""
        module, number, stages = self.modules[index], self.stage_indices[index], self._num_stages
        hidden = torch.empty(self.shape, dtype=self.dtype, device="meta", requires_grad=True)
        loss = torch.empty((), device="meta", requires_grad=True)
        return TracedStage(
            module,
            number,
            stages,
            self.device,
            input_args=torch.empty(1, dtype=torch.int64, device="meta") if number == 0 else hidden,
            output_args=loss if number == stages - 1 else hidden,
            group=self.group,
            dw_builder=self._deferred_gradients(index) if self.queues else None,
            layers=layers_of(self.parts[index]),
        )

    def _deferred_gradients(self, index: int) -> Callable[[], Callable[[], None]]:
        queue, model = self.queues[index], self.parts[index]

        def build() -> Callable[[], None]:
            compute = queue.take()

            def run() -> None:
                compute()
                accumulation.accumulate_deferred(model)

            return run

        return build

    def _schedule(self) -> Any:
        def pass_through(output: Tensor, target: Tensor) -> Tensor:
            return output

        settings: dict[str, Any] = {"loss_fn": pass_through, "scale_grads": False}
        if self.schedule_name == "1f1b":
            return Schedule1F1B(self.stages[0], self.num_micro_batches, **settings)
        kinds: dict[str, Any] = {
            "interleaved": ScheduleInterleaved1F1B,
            "zbv": ScheduleZBVZeroBubble,
            "dualpipev": ScheduleDualPipeV,
        }
        return kinds[self.schedule_name](self.stages, self.num_micro_batches, **settings)

    @torch.no_grad()
    def complete(self) -> None:
        """Sum the gradients of both copies of the embedding: the first stage's, and the last's, which MTP reads.

        Both copies then get the same update and stay bitwise identical.
        """
        copies = [model for model in self.parts if is_copied(model)]
        grads = [_gradient(model.embed_tokens.weight) for model in copies]  # type: ignore[union-attr]
        if len(grads) == 2:
            grads[0].add_(grads[1])
            grads[1].copy_(grads[0])
        elif grads:
            end_ranks = [rank_of(self.schedule_name, self.pp, stage) for stage in (0, self._num_stages - 1)]
            grads[0].add_(self._exchange(grads[0], end_ranks))

    def _exchange(self, mine: Tensor, end_ranks: list[int]) -> Tensor:
        """The other rank's tensor. One rank sends first: both at once would deadlock on a GPU's stream."""
        theirs = torch.empty_like(mine)
        sends_first = self.group.rank() == end_ranks[0]
        peer = dist.get_global_rank(self.group, end_ranks[1] if sends_first else end_ranks[0])
        with wait_span(Event(SpanKind.EMBEDDING_GRADIENTS), [peer]):
            for sending in (sends_first, not sends_first):
                if sending:
                    dist.send(mine, peer, group=self.group)
                else:
                    dist.recv(theirs, peer, group=self.group)
        label = Event(SpanKind.EMBEDDING_GRADIENTS).text
        number = LEDGER.number(label)  # a replay exchanges them too
        LEDGER.send(label, label, number, peer, mine)
        LEDGER.receive(label, label, number, peer, theirs)
        return theirs

    def _post_receives(self, stage: int, count: int) -> list[tuple[dist.Work, Tensor]]:
        if stage == 0 or stage - 1 in self.stage_indices:
            return []
        (peer,) = self._peers_of(stage - 1)
        arrivals = []
        for _ in range(count):
            buffer = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            with launching(Event(SpanKind.RECEIVE_HIDDEN_STATES), [peer]):
                work = dist.irecv(buffer, peer, group=self.group)
            assert work is not None
            arrivals.append((work, buffer))
        return arrivals

    def _peers_of(self, stage: int) -> list[int]:
        """The rank of a stage, as the list that spans take."""
        return [dist.get_global_rank(self.group, rank_of(self.schedule_name, self.pp, stage))]

    def _send(self, hidden: Tensor, stage: int) -> tuple[dist.Work, Tensor]:
        (peer,) = self._peers_of(stage)
        hidden = hidden.contiguous()
        work = dist.isend(hidden, peer, group=self.group)
        assert work is not None
        return work, hidden


@contextmanager
def unwrapped_errors() -> Iterator[None]:
    """Raise a project's error as it was: torch's schedules wrap what a stage raises in a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        for cause in causes(error):
            if isinstance(cause, LongCatError):
                raise cause from error
        raise


def layers_of(model: LongCat) -> tuple[int, int]:
    """First and last layer of a part of the model."""
    return model.part.first, model.part.last - 1


def is_copied(model: LongCat) -> bool:
    """Whether this part has one of two copies of the embedding."""
    return model.config.num_mtp_layers > 0 and model.part.embedding != model.part.head


def _gradient(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a parameter's gradient; zeros if there was none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return local_part(parameter.grad)[0]
