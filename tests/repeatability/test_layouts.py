"""Every layout repeats a training bit by bit, and a sum without an order in any collective is noticed.

In float32 and with at least three terms per sum where the layout has as many ranks: two terms commute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import parallel.collectives.point_to_point as messages
from parallel.mesh import make_topology, resolve_sizes, world_from_environment
from tests.support.pool import pool
from tests.support.running import RandomSamples
from tests.support.three_steps import MODEL
from train import step
from train.batches import BatchReader
from train.checkpoint.state_hash import state_hash
from train.compose import compose
from train.run import build_state
from train.step import Stepper

Bits = list[tuple[float, float, str]]
STEPS = 3
LAYOUTS = {  # name → ranks, overrides
    "fsdp4": (4, "parallel.fsdp=4"),
    "dp4": (4, "parallel.dp=4 parallel.fsdp=1"),
    "dp2_fsdp2_ep2_chunks3": (4, "parallel.dp=2 parallel.fsdp=2 parallel.ep=2 overlap.num_chunks=3"),
    "ep4_all_gather": (4, "parallel.ep=4 parallel.transport=all_gather model.num_experts=8"),
    "fsdp4_compile": (4, "parallel.fsdp=4 parallel.ep=2 parallel.compile=true"),
    "fsdp4_recompute_full": (4, "parallel.fsdp=4 parallel.ep=2 parallel.recompute=full"),
    "tp4": (4, "parallel.tp=4"),
    "cp4_ep2_documents": (4, "parallel.cp=4 parallel.ep=2 data.mask_documents=true"),
    "pp2_1f1b_fsdp2": (4, "parallel.pp=2 parallel.schedule=1f1b parallel.fsdp=2"),
    "pp2_interleaved": (2, "parallel.pp=2 parallel.schedule=interleaved model.num_layers=4"),
    "pp2_zbv_ep2_selective": (4, "parallel.pp=2 parallel.schedule=zbv parallel.ep=2 parallel.recompute=selective"),
    "pp2_dualpipev_tp2": (4, "parallel.pp=2 parallel.schedule=dualpipev parallel.tp=2"),
    "pp4_zbv": (4, "parallel.pp=4 parallel.schedule=zbv model.num_layers=8"),
    "zero1": (4, "parallel.sharding=zero1"),
    "zero2_offload": (4, "parallel.sharding=zero2 parallel.offload=cpu"),
    "zero3_selective": (4, "parallel.sharding=zero3 parallel.recompute=selective"),
}
IN_EVERY_RUN = ("fsdp4", "cp4_ep2_documents", "pp2_zbv_ep2_selective", "zero1")


def train(words: list[str], plant: str = "", seed: int = 0) -> Bits:
    """(loss, norm, state hash) after each step; with a ``plant``, the sums of a collective have a drawn order."""
    undo = PLANTS[plant](torch.Generator().manual_seed(seed)) if plant else None
    try:
        config = compose([*MODEL, "train.sequence_length=32", "train.global_batch_size=8", *words])
        rank, _, world_size = world_from_environment()
        sizes = resolve_sizes(config.parallel, world_size)
        topology = make_topology(sizes, rank, world_size, torch.device("cpu"))
        state = build_state(config, topology)
        samples: Any = RandomSamples(config.train.sequence_length)
        stepper = Stepper(state, BatchReader(samples, config, topology), config, topology)
        found = []
        for _ in range(STEPS):
            metrics = stepper.step().metrics
            found.append((metrics["loss"], metrics["grad_norm"], state_hash(state, topology)))
        state.engine.close()
        return found
    finally:
        if undo is not None:
            undo()


def shuffle_messages(generator: torch.Generator) -> Callable[[], None]:
    """Our reduce-scatter adds the parts in a drawn order, not in that of ranks."""
    plain = messages.Sum.wait

    def wait(self: Any, timeout: Any = None) -> bool:
        if len(self.parts) > 1:
            messages.Messages.wait(self, timeout)
            terms = [self.parts[number].clone() for number in torch.randperm(len(self.parts), generator=generator)]
            self.out.copy_(sum(terms[1:], terms[0]))
            self.parts = []
        return plain(self, timeout)

    messages.Sum.wait = wait  # type: ignore[method-assign]
    return lambda: setattr(messages.Sum, "wait", plain)


def shuffle_all_reduce(generator: torch.Generator) -> Callable[[], None]:
    """Every all-reduce of floats adds the ranks' parts in a drawn order."""
    plain = dist.all_reduce

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        if op != dist.ReduceOp.SUM or not tensor.is_floating_point():
            return plain(tensor, op, group, async_op)
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        drawn = [parts[number] for number in torch.randperm(len(parts), generator=generator)]
        tensor.copy_(sum(drawn[1:], drawn[0].clone()))
        return plain(torch.zeros(1), group=group, async_op=async_op)

    dist.all_reduce = all_reduce
    return lambda: setattr(dist, "all_reduce", plain)


def shuffle_rank_rows(generator: torch.Generator) -> Callable[[], None]:
    """What enters the norm and the losses is added in a drawn order of ranks."""
    plain = step.sum_in_one_collective

    def sum_in_one_collective(numbers: Tensor, *parts: Tensor) -> list[Tensor]:
        of_ranks = [torch.empty_like(numbers) for _ in range(dist.get_world_size())]
        dist.all_gather(of_ranks, numbers)
        drawn = [of_ranks[number] for number in torch.randperm(len(of_ranks), generator=generator)]
        return [sum(drawn[1:], drawn[0]), *plain(numbers, *parts)[1:]]

    step.sum_in_one_collective = sum_in_one_collective
    return lambda: setattr(step, "sum_in_one_collective", plain)


def shuffle_micro_batches(generator: torch.Generator) -> Callable[[], None]:
    """Gradients of micro-batches are accumulated in a drawn order."""
    plain = BatchReader.read

    def read(self: BatchReader, first_sample: int) -> Any:
        batches = list(plain(self, first_sample))
        return iter([batches[number] for number in torch.randperm(len(batches), generator=generator)])

    BatchReader.read = read  # type: ignore[method-assign]
    return lambda: setattr(BatchReader, "read", plain)


PLANTS = {
    "messages": shuffle_messages,
    "all_reduce": shuffle_all_reduce,
    "rank_rows": shuffle_rank_rows,
    "micro_batches": shuffle_micro_batches,
}


def runs(name: str, plant: str = "") -> list[list[Bits]]:
    """Two trainings in a layout, each the results of all ranks."""
    ranks, words = LAYOUTS[name]
    return [pool(ranks).run(train, words.split(), plant, seed) for seed in (1, 2)]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in IN_EVERY_RUN else pytest.mark.long) for name in LAYOUTS]
)
def test_layout_repeats_bit_by_bit(name: str) -> None:
    first, second = runs(name)
    assert first == second
    assert all(one == first[0] for one in first), "every rank reports the same numbers"


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        ("fsdp4", "messages"),
        ("cp4_ep2_documents", "messages"),
        ("fsdp4", "rank_rows"),
        ("pp2_zbv_ep2_selective", "micro_batches"),
        pytest.param("dp4", "all_reduce", marks=pytest.mark.long),
        pytest.param("tp4", "all_reduce", marks=pytest.mark.long),
        pytest.param("zero1", "all_reduce", marks=pytest.mark.long),
        pytest.param("ep4_all_gather", "messages", marks=pytest.mark.long),
    ],
)
def test_planted_unordered_collective_is_noticed(name: str, plant: str) -> None:
    first, second = runs(name, plant)
    assert first != second
