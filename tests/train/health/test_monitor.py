"""The monitor: decisions and their limit, dead experts, small gradients, growing hidden norms, and its state."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from longcat.errors import ConfigError
from train.compose import compose
from train.health.config import HealthConfig, OnSpike
from train.health.events import EventKind, Spike
from train.health.monitor import HealthMonitor
from train.health.state import HealthState, grown

EPS = 1e-8


def monitor(**settings: Any) -> HealthMonitor:
    config = HealthConfig(**{"window": 8, **settings})
    config.validate()
    return HealthMonitor(config, HealthState(), num_experts=3, eps=EPS)


def calm(watch: HealthMonitor, first: int, steps: int = 8) -> None:
    for step in range(first, first + steps):
        assert watch.judge(step, 4 * step, 3.0 + 0.01 * (step % 3), 1.0) is None


@pytest.mark.parametrize("values", [(9.0, 1.0), (3.0, 9.0)], ids=["loss", "norm"])
@pytest.mark.parametrize("policy", list(OnSpike))
def test_a_spike_is_answered_by_the_policy(policy: OnSpike, values: tuple[float, float]) -> None:
    watch = monitor(on_spike=policy)
    calm(watch, 1)
    spike = watch.judge(9, 36, *values)
    assert spike is not None and spike.action == policy and spike.first_sample == 36
    assert ("loss of 9" in spike.reason) == (values[0] == 9.0)
    assert ("norm of 9" in spike.reason) == (values[1] == 9.0)
    assert watch.state.strikes == ([9] if policy in (OnSpike.skip, OnSpike.rollback) else [])


def test_more_actions_than_allowed_stop_the_run() -> None:
    watch = monitor(on_spike=OnSpike.skip, max_actions=2)
    calm(watch, 1)
    found = []
    for step in (9, 15, 21):
        found.append(watch.judge(step, 0, 9.0, 1.0))
        calm(watch, step + 1, 5)
    assert [spike and spike.action for spike in found] == [OnSpike.skip, OnSpike.skip, OnSpike.stop]
    assert [spike and spike.num_actions for spike in found] == [1, 2, 2]


def test_old_actions_are_forgotten() -> None:
    watch = monitor(on_spike=OnSpike.skip, max_actions=1, forget_after=20)
    calm(watch, 1)
    assert watch.judge(9, 0, 9.0, 1.0) is not None
    calm(watch, 10, 19)
    spike = watch.judge(29, 0, 9.0, 1.0)
    assert spike is not None and spike.action == OnSpike.skip and watch.state.strikes == [29]


def test_numbers_that_are_not_finite_are_left_out() -> None:
    """Also before the detector knows the usual values; no window takes them in."""
    for policy in (OnSpike.skip, OnSpike.rollback):
        watch = monitor(on_spike=policy)
        spike = watch.judge(1, 0, math.nan, 1.0)
        assert spike is not None and spike.action == policy
        assert watch.state.losses == [] and len(watch.state.norms) == 1
    for policy in (OnSpike.report, OnSpike.stop):
        assert monitor(on_spike=policy).judge(1, 0, math.nan, math.inf) is None  # the step itself ends the run


def test_a_check_before_the_action_sees_each_spike() -> None:
    """It may end the run, and then no action is counted."""
    seen: list[Spike] = []

    def find_corruption(spike: Spike) -> None:
        seen.append(spike)
        raise RuntimeError("corruption")

    for policy in OnSpike:
        watch = monitor(on_spike=policy)
        watch.before_action = find_corruption
        calm(watch, 1)
        with pytest.raises(RuntimeError, match="corruption"):
            watch.judge(9, 36, 9.0, 1.0)
        assert watch.state.strikes == []
    assert [spike.action for spike in seen] == list(OnSpike)


def watch_experts(watch: HealthMonitor, step: int, rows: list[list[int]]) -> int:
    rms: dict[str, float | None] = {"layer_0": 1e-3, "layer_1": 1e-3}
    return int(watch.observe(step, torch.tensor(rows), 5.0, rms)["dead_experts"])


def test_dead_experts_are_named_with_their_first_step() -> None:
    """Columns beyond the three FFN experts are identity experts, which may be empty."""
    watch = monitor(dead_after=4)
    full, empty = [[1, 2, 3, 0], [3, 2, 1, 0]], [[1, 2, 3, 0], [3, 0, 1, 0]]
    dead = [watch_experts(watch, step, empty if 3 <= step <= 9 else full) for step in range(1, 13)]
    assert dead == [0] * 5 + [1] * 4 + [0] * 3
    died, revived = watch.take_events()
    assert died.text == "expert 1 of layer 1 has received no token since step 3"
    assert (died.step, died.kind, died.fields) == (6, EventKind.dead_expert, {"layer": 1, "expert": 1, "since": 3})
    assert (revived.step, revived.kind) == (10, EventKind.expert_revived)
    assert "after 7 steps without" in revived.text


def test_gradients_near_epsilon_are_reported_once() -> None:
    watch = monitor()
    counts = torch.ones(2, 4, dtype=torch.int64)
    ratios = []
    for step, small in enumerate([1e-4, 5e-7, 5e-7, 5e-9, 1.5e-6, 1e-4], start=1):
        rms: dict[str, float | None] = {"layer_0": 1e-3, "layer_1": small, "mtp": None}
        ratios.append(watch.observe(step, counts, 5.0, rms)["grad_rms_over_eps"])
    assert ratios == pytest.approx([1e4, 50, 50, 0.5, 150, 1e4])
    found = watch.take_events()
    assert [(event.step, event.kind) for event in found] == [
        (2, EventKind.small_gradient),
        (6, EventKind.gradient_recovered),
    ]
    assert "layer 1 is 5e-07, only 50 times Adam's ε of 1e-08" in found[0].text


def test_growing_hidden_norms_are_reported_once() -> None:
    watch = monitor(window=16)
    counts = torch.ones(2, 4, dtype=torch.int64)
    growth = [
        watch.observe(step, counts, 2.0 ** (0.5 * step), {"layer_0": 1e-3})["hidden_norm_growth"]
        for step in range(1, 41)
    ]
    assert growth[:15] == [None] * 15
    assert growth[15] == pytest.approx(2.0**7)
    (event,) = watch.take_events()
    assert (event.step, event.kind) == (33, EventKind.hidden_growth)  # at first it grows in any run


def test_state_comes_back_bit_by_bit() -> None:
    watch = monitor(on_spike=OnSpike.rollback, dead_after=2)
    calm(watch, 1)
    watch.judge(9, 36, 9.0, 1.1)
    watch_experts(watch, 9, [[0, 1, 1, 1], [1, 1, 0, 1]])
    watch.state.skipped.add(16, 40)
    stored = json.loads(json.dumps(watch.state.as_json()))
    copy = HealthState()
    copy.restore(stored)
    assert copy.as_json() == watch.state.as_json()
    for (_, one), (_, two) in zip(copy.tensors(), watch.state.tensors(), strict=True):
        assert torch.equal(one, two) and one.numel()
    copy.restore(None)
    assert copy.as_json() == HealthState().as_json()
    assert grown(stored) == {"skipped": [[16, 40]]}
    assert grown(None) == {"skipped": []}


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["health.on_spike=panic"], "health.on_spike"),
        (["health.window=3"], "too short"),
        (["health.window=-1"], "health.window=-1"),
        (["health.window=0", "health.on_spike=skip"], "health.window=0 finds none"),
        (["health.sigmas=0"], "health.sigmas=0"),
        (["health.max_actions=0"], "health.max_actions=0"),
        (["health.rollback_batches=0"], "health.rollback_batches=0"),
        (["health.on_spike=rollback", "checkpoint.every=0"], "checkpoint.every=0 writes none"),
    ],
)
def test_impossible_settings_are_refused(words: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        compose(words)
