"""A layout repeats a training bit by bit, and a sum without an order in its collectives is noticed.

In float32 and on four ranks: two terms commute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import parallel.collectives.point_to_point as messages
from parallel.mesh import make_topology, resolve_sizes, world_from_environment
from tests.support.pool import pool
from tests.support.running import RandomSamples
from tests.support.three_steps import MODEL
from train.batches import BatchReader
from train.checkpoint.state_hash import state_hash
from train.compose import compose
from train.run import build_state
from train.step import Stepper

Bits = list[tuple[float, float, str]]
STEPS = 3
EP4 = "parallel.ep=4 model.num_experts=8"
LAYOUTS = {  # name → ranks, overrides
    "fsdp4": (4, "parallel.fsdp=4"),
    "zero1": (4, "parallel.sharding=zero1"),
    "cp4-documents": (4, "parallel.cp=4 data.mask_documents=true"),
    "pp2-zbv-fsdp2": (4, "parallel.pp=2 parallel.schedule=zbv model.num_layers=4"),
}
MORE = {
    "tp4-ep4": (4, f"parallel.tp=4 {EP4} model.vocab_size=96 model.num_heads=4"),
    "ep4-chunks2": (4, f"{EP4} overlap.num_chunks=2"),
    "dp4": (4, "parallel.dp=4"),
    "dp2-fsdp2-ep2": (4, "parallel.dp=2 parallel.fsdp=2 parallel.ep=2 model.num_experts=8"),
    "ep4-all_gather": (4, f"{EP4} parallel.transport=all_gather"),
    "cp2-tp2-ep4": (4, f"parallel.cp=2 parallel.tp=2 {EP4} model.vocab_size=96"),
    "fsdp4-recompute": (4, "parallel.fsdp=4 parallel.recompute=full"),
    "fsdp4-selective": (4, "parallel.fsdp=4 parallel.recompute=selective"),
    "ep4-blocking": (4, f"{EP4} overlap.num_chunks=2 overlap.enabled=false"),
    "pp4-1f1b": (4, "parallel.pp=4 parallel.schedule=1f1b model.num_layers=4"),
    "pp2-interleaved": (4, "parallel.pp=2 parallel.schedule=interleaved model.num_layers=4"),
    "pp2-dualpipev-cp2": (4, "parallel.pp=2 parallel.schedule=dualpipev parallel.cp=2 model.num_layers=4"),
    "zero2": (4, "parallel.sharding=zero2"),
    "zero3": (4, "parallel.sharding=zero3"),
    "fsdp4-compile": (4, "parallel.fsdp=4 parallel.compile=true"),
}


def train(words: list[str], plant: str = "", seed: int = 0) -> Bits:
    """(loss, norm, state hash) after each step; with a ``plant``, the sums of a collective have a drawn order."""
    undo = PLANTS[plant](torch.Generator().manual_seed(seed)) if plant else None
    try:
        checks = ["sdc.every=0"] if plant else []  # which would miss the messages that a plant receives itself
        config = compose([*MODEL, "train.sequence_length=32", "train.global_batch_size=8", *checks, *words])
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


PLANTS = {"messages": shuffle_messages}


def runs(name: str, plant: str = "") -> list[list[Bits]]:
    """Two trainings in a layout, each the results of all ranks."""
    ranks, words = (LAYOUTS | MORE)[name]
    return [pool(ranks).run(train, words.split(), plant, seed) for seed in (1, 2)]


@pytest.mark.parametrize("name", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.long) for name in MORE)])
def test_layout_repeats_bit_by_bit(name: str) -> None:
    first, second = runs(name)
    assert first == second
    assert all(one == first[0] for one in first), "every rank reports the same numbers"


@pytest.mark.parametrize(("name", "plant"), [("fsdp4", "messages"), ("cp4-documents", "messages")])
def test_planted_unordered_collective_is_noticed(name: str, plant: str) -> None:
    first, second = runs(name, plant)
    assert first != second
