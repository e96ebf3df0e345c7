"""The ranks of the pipeline tests: one case after another in one process group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from longcat.config import ModelConfig
from longcat.documents import Documents
from longcat.init import initialise
from longcat.layer import ShortcutLayer
from longcat.model import LongCat, Losses
from longcat.names import pieces
from parallel.config import ParallelConfig
from parallel.fsdp.sharding import apply_fsdp, materialise, set_gradient_sync
from parallel.mesh import Axis, MeshSizes, Topology, connect, make_topology
from parallel.pipeline.engine import PipelineEngine
from parallel.pipeline.stages import is_replica, num_stages, split, stages_of

SEED, LENGTH, ROWS = 5, 12, 2
EVALUATED = 3  # micro-batches, not as many as in training
CONFIG = ModelConfig(
    name="test", vocab_size=61, num_layers=5, hidden_size=24, num_heads=2, q_lora_rank=16, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, ffn_hidden_size=32, num_experts=5, num_zero_experts=3,
    top_k=3, expected_ffn_experts=2.0, expert_hidden_size=12, num_mtp_layers=2,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One layout and one kind of step, with ``micro_batches`` per data rank."""

    schedule: str
    pp: int
    fsdp: int = 1
    dp: int = 1
    layers: int = 5
    mtp: bool = True
    documents: bool = False
    recompute: bool = False
    micro_batches: int = 4
    dtype: str = "float32"
    sharded: bool = True

    @property
    def total(self) -> int:
        """Micro-batches of the global batch."""
        return self.micro_batches * self.data_ranks

    @property
    def data_ranks(self) -> int:
        return self.dp * self.fsdp

    @property
    def config(self) -> ModelConfig:
        return replace(CONFIG, num_layers=self.layers)


@dataclass(frozen=True)
class MicroBatch:
    tokens: Tensor
    labels: Tensor
    valid: Tensor
    documents: Documents | None


def micro_batch(number: int, with_documents: bool) -> MicroBatch:
    generator = torch.Generator().manual_seed(number)
    sample = torch.randint(CONFIG.vocab_size, (ROWS, LENGTH + 1), generator=generator)
    valid = torch.rand(ROWS, LENGTH, generator=generator) > 0.1
    numbers = (torch.rand(ROWS, LENGTH, generator=generator) < 0.2).cumsum(1)
    documents = Documents.of(numbers) if with_documents else None
    return MicroBatch(sample[:, :-1].contiguous(), sample[:, 1:].contiguous(), valid, documents)


def objective(total: int, losses: Losses) -> Tensor:
    """A loss with every term, with weights at which all of them show in the gradients."""
    tokens = total * ROWS * LENGTH
    return (losses.lm + 0.3 * losses.mtp + 1e-3 * losses.hidden_z) / tokens + 0.1 * losses.balance / total


class Counter:
    """Counts the forwards of every layer, through recomputation."""

    def __init__(self, model: LongCat, recompute: bool) -> None:
        self.calls: dict[str, int] = {}
        for number, layer in model.layers.items():
            assert isinstance(layer, ShortcutLayer)
            self.calls[number] = 0
            forward = partial(self._run, number, layer.forward)
            layer.forward = partial(checkpoint, forward, use_reentrant=False) if recompute else forward  # type: ignore

    def _run(self, number: str, forward: Any, *arguments: Any) -> Any:
        self.calls[number] += 1
        return forward(*arguments)


def alone(case: Case) -> dict[str, Any]:
    """One process, the full model, plain autograd."""
    model = LongCat(case.config)
    initialise(model, case.config, SEED)
    found = []
    for number in range(case.total):
        batch = micro_batch(number, case.documents)
        losses = model(batch.tokens, batch.labels, batch.valid, batch.documents, mtp=case.mtp)
        objective(case.total, losses).backward()
        found.append(summary(losses))
    return {"grads": dict(whole_gradients(model)), "losses": found}


def summary(losses: Losses) -> dict[str, Tensor]:
    """The sums behind a step's metrics."""
    return {name: value.detach() for name, value in losses._asdict().items() if name != "hidden"}


def whole_gradients(model: LongCat) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        for piece in pieces(name, tuple(grad.shape)):
            yield piece.name, grad[piece.index].clone()


def alone_in_bfloat16(case: Case, topology: Topology) -> dict[str, Tensor]:
    """Gradients of the full model on this rank, accumulated as without a pipeline."""
    with torch.device("meta"):
        model = LongCat(case.config)
    apply_fsdp(model, topology, torch.bfloat16, reshard_after_forward=True)
    materialise(model, case.config, SEED, topology.device)
    for number in range(case.total):
        set_gradient_sync(model, last=number == case.total - 1)
        batch = micro_batch(number, case.documents)
        losses = model(batch.tokens, batch.labels, batch.valid, batch.documents, mtp=case.mtp)
        objective(case.total, losses).backward()
    return dict(whole_gradients(model))


def build(case: Case, topology: Topology) -> list[LongCat]:
    """This rank's model parts, sharded as in training, or plain."""
    parts = split(case.config, num_stages(case.schedule, case.pp), LENGTH)
    models = []
    for stage in stages_of(case.schedule, case.pp, topology.coordinate(Axis.PP)):
        with torch.device("meta"):
            model = LongCat(case.config, part=parts[stage])
        if case.sharded:
            apply_fsdp(model, topology, getattr(torch, case.dtype), reshard_after_forward=False)
        materialise(model, case.config, SEED, topology.device)
        models.append(model)
    return models


def run_case(case: Case) -> dict[str, Any]:
    """One rank's step, an evaluation, then the same step again."""
    topology = topology_of(case)
    models = build(case, topology)
    counters = [Counter(model, case.recompute) for model in models]
    shape = (ROWS, LENGTH, case.config.hidden_size)
    pipeline = PipelineEngine(models, topology, case.schedule, case.micro_batches, shape, getattr(torch, case.dtype))
    first = topology.data_rank * case.micro_batches
    batches = [micro_batch(first + n, case.documents) for n in range(case.micro_batches)]
    weigh = partial(objective, case.total)

    losses = pipeline.run(batches, weigh, case.mtp)
    calls = {number: count for counter in counters for number, count in counter.calls.items()}
    grads = [dict(whole_gradients(model)) for model in models]
    evaluated = pipeline.evaluate(batches[:EVALUATED])
    gathered = sum(isinstance(p, DTensor) != case.sharded for model in models for p in model.parameters())
    clear(models)
    pipeline.run(batches, weigh, case.mtp)
    again = [dict(whole_gradients(model)) for model in models]
    return {
        "layers": {number for model in models for number in model.layers},
        "replicas": [{n for n, _ in model.named_parameters() if is_replica(model.part, n)} for model in models],
        "losses": dict(zip(pipeline.stage_indices, [[summary(one) for one in stage] for stage in losses], strict=True)),
        "evaluated": dict(
            zip(pipeline.stage_indices, [[summary(one) for one in stage] for stage in evaluated], strict=True)
        ),
        "first": first,
        "calls": calls,
        "grads": grads,
        "again": again,
        "gathered": gathered,
        "reference": alone_in_bfloat16(case, topology) if case.dtype == "bfloat16" else None,
    }


@cache
def topology_of_sizes(pp: int, dp: int, fsdp: int) -> Topology:
    sizes = MeshSizes(pp=pp, dp=dp, fsdp=fsdp, cp=1, tp=1, ep=1)
    return make_topology(sizes, torch.distributed.get_rank(), pp * dp * fsdp, torch.device("cpu"))


def topology_of(case: Case) -> Topology:
    """One mesh for all cases of the same sizes, because groups are not freed."""
    return topology_of_sizes(case.pp, case.dp, case.fsdp)


def clear(models: list[LongCat]) -> None:
    for model in models:
        model.zero_grad(set_to_none=True)


def run_cases(cases: list[Case]) -> list[dict[str, Any]]:
    """All cases of one number of ranks, in one process group."""
    connect(ParallelConfig(timeout_seconds=60))
    found = [run_case(case) for case in cases]
    torch.distributed.destroy_process_group()
    return found
