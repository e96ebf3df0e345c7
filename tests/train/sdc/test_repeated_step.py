"""A step that spikes is repeated before a policy acts, so that a wrong computation is not taken for a spike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from longcat.errors import CorruptionError
from longcat.faults import install_hook
from longcat.ops.calls import set_observer
from parallel.mesh import make_topology, resolve_sizes, world_from_environment
from tests.support.measure import MODEL, samples
from tests.support.pool import close_pools, pool
from train.batches import BatchReader
from train.checkpoint.state_hash import state_hash
from train.compose import compose
from train.run import build_state
from train.step import Stepper

STEPS = 3


@pytest.fixture(scope="module", autouse=True)
def _pools() -> Iterator[None]:
    yield
    close_pools()


def train(words: list[str], spikes: bool) -> tuple[str, dict[str, Any]]:
    """The state hash after some steps, each of which is taken for a spike, and the finding. A collective."""
    config = compose([*MODEL, "model.num_layers=2", "train.global_batch_size=2", *words])
    rank, _, world_size = world_from_environment()
    topology = make_topology(resolve_sizes(config.parallel, world_size), rank, world_size, torch.device("cpu"))
    state = build_state(config, topology)
    stepper = Stepper(state, BatchReader(samples(config), config, topology), config, topology)  # type: ignore[arg-type]

    def judge(*_: Any) -> None:
        if spikes:
            assert stepper.monitor.before_action is not None
            stepper.monitor.before_action(None)  # type: ignore[arg-type]

    stepper.monitor.judge = judge  # type: ignore[assignment, method-assign]
    try:
        for _ in range(STEPS):
            stepper.step()
        return state_hash(state, topology), {}
    except CorruptionError as error:
        return "", error.details["finding"]
    finally:
        install_hook(None)
        set_observer(None)
        state.engine.close()


@pytest.mark.parametrize("words", [[], ["parallel.fsdp=2"], ["parallel.pp=2", "parallel.schedule=1f1b"]], ids=str)
def test_repeating_a_sound_step_changes_no_bit(words: list[str]) -> None:
    ranks = 2 if words else 1
    once, repeated = (pool(ranks).run(train, words, spikes) for spikes in (False, True))
    assert once == repeated and once[0][0]


def test_wrong_computation_is_told_from_a_spike() -> None:
    fault = "sdc.inject=product/scale/step:2/call:40/rank:1/factor:1000"
    ends = pool(2).run(train, ["parallel.ep=2", fault], True)
    assert ends[0] == ends[1]
    finding = ends[0][1]
    assert (finding["kind"], finding["step"]) == ("step", 2)
    assert 1 in [one["rank"] for one in finding["suspects"]]


def test_defective_device_is_told_from_a_spike() -> None:
    """What it computes each time alike, its neighbour does not."""
    fault = "sdc.inject=elementwise/scale/step:2/rank:1/factor:2/persistent"
    ends = pool(2).run(train, ["parallel.fsdp=2", "sdc.every=100", fault], True)
    assert ends[0] == ends[1]
    finding = ends[0][1]
    assert (finding["kind"], finding["step"]) == ("replay", 2)
    assert [one["rank"] for one in finding["suspects"]] == [0, 1], "two that always disagree"
