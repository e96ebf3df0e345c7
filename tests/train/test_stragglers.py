"""A rank that is slow for many steps is named, once, whatever other stages do; a restart saves first."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from longcat.errors import ConfigError, SlowRankError
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import begin_step, wait_span
from tests.support.distributed import run_ranks
from tests.support.fixtures import corpus, overrides  # noqa: F401  (fixtures)
from tests.support.ports import free_port
from tests.support.running import NARROW, lines
from train import rank_usage
from train.checkpoint.manifest import list_checkpoints, step_of
from train.compose import compose
from train.launch_config import LaunchConfig
from train.process.rank import main
from train.rank_usage import RankUsage, UsageMeter
from train.step import Stepper
from train.stragglers import Straggler, StragglerWatch, as_finding


def test_stages_are_compared_with_themselves() -> None:
    """Ranks 0 to 3 are a stage that takes three times as long as that of ranks 4 to 7."""
    watch = StragglerWatch(LaunchConfig(straggler_steps=3), num_stages=2)
    usual = np.array([3.0, 3.1, 2.9, 3.0, 1.0, 1.0, 1.1, 0.9])
    slow = usual.copy()
    slow[6] = 2.5
    assert [watch.see(usual) for _ in range(5)] == [[]] * 5
    named = [[rank for rank, _ in watch.see(slow)] for _ in range(7)]
    assert named == [[], [], [6], [], [], [], []]
    assert watch.see(usual) == []
    assert [[rank for rank, _ in watch.see(slow)] for _ in range(3)] == [[], [], [6]]
    assert watch.ratios(slow)[6] == pytest.approx(2.5)


def test_of_two_ranks_the_slower_one_is_named() -> None:
    watch = StragglerWatch(LaunchConfig(straggler_steps=1), num_stages=1)
    assert watch.see(np.array([1.0, 2.5])) == [(1, 2.5)]
    assert watch.see(np.array([1.0, 1.9])) == []


def test_no_factor_names_none() -> None:
    watch = StragglerWatch(LaunchConfig(straggler_factor=0.0, straggler_steps=1), num_stages=1)
    assert watch.see(np.array([1.0, 9.0])) == []


def test_a_restart_tells_the_supervisor_who() -> None:
    error = SlowRankError("slow", as_finding([Straggler(3, "node-2", 2.5, 20)]))
    assert error.exit_code == 3
    assert error.details["straggler"] == {"ranks": [{"rank": 3, "host": "node-2"}], "steps": 20}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launch.straggler_factor=0.5"], "must be above 1"),
        (["launch.straggler_steps=0"], "must be at least 1"),
        (["launch.on_straggler=restart"], "needs launch.restarts"),
    ],
)
def test_wrong_keys_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(["model=debug", *words]).validate()


def test_usage_counts_what_is_inside_steps() -> None:
    """From one sum to the next, with the update in between and without what is between two steps."""
    meter, rows = UsageMeter(torch.device("cpu")), []
    for _ in range(2):
        begin_step(1)
        meter.begin_step()
        with wait_span(Event(SpanKind.SUM)):
            time.sleep(0.01)
        rows.append(meter.take())
        time.sleep(0.02)  # the update
        meter.end_step()
        time.sleep(0.1)  # a validation
    usage = RankUsage.of(torch.stack(rows))
    assert np.all(usage.seconds >= [0.01, 0.03]) and usage.seconds[1] < 0.1
    assert np.all(usage.blocked_seconds >= 0.01) and usage.own_seconds[1] >= 0.02
    assert 0 < usage.blocked_share < 1 and usage.memory_gib[0] > 0


def test_one_process_waits_for_nobody() -> None:
    assert RankUsage.of(torch.tensor([[1.0, 0.5, 2.0]], dtype=torch.float64)).blocked_share == 0.0


def train_with_a_slow_rank(words: list[str], port: int) -> int:
    """Rank 1 takes long over each step from the third on, and more memory."""
    plain, peak = Stepper._backward, rank_usage.peak_memory_gib

    def slow(self: Stepper, *inputs: Any) -> Any:
        if dist.get_rank() == 1 and self.state.counters.step > 1:
            time.sleep(1.0)
        return plain(self, *inputs)

    Stepper._backward = slow  # type: ignore[method-assign]
    rank_usage.peak_memory_gib = lambda device: peak(device) + 100 * dist.get_rank()
    try:
        os.environ["MASTER_PORT"] = str(port)
        return main(compose(words))
    finally:
        Stepper._backward = plain  # type: ignore[method-assign]
        rank_usage.peak_memory_gib = peak


def test_a_slow_rank_ends_the_run_with_its_state_saved(overrides: list[str], tmp_path: Path) -> None:  # noqa: F811
    words = [*overrides, *NARROW, "train.steps=30", "parallel.fsdp=2", "launch.straggler_steps=3"]
    words += ["launch.restarts=1", "launch.on_straggler=restart", "checkpoint.every=0"]
    codes = run_ranks(train_with_a_slow_rank, 2, words, free_port(), timeout=240)
    assert codes == [3, 3]
    written = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert [one["rank"] for one in written["straggler"]["ranks"]] == [1]
    last = lines(tmp_path / "run")[-1]
    assert last["slowest_rank"] == 1 and last["slowest_rank_ratio"] > 2 and last["step"] < 30
    assert last["memory_rank"] == 1 and last["memory_gib"] > 100
    assert [step_of(path) for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == [last["step"]]
    events = [json.loads(line) for line in (tmp_path / "run" / "health.jsonl").read_text().splitlines()]
    found = [event for event in events if event["event"] == "straggler"]
    assert [event["rank"] for event in found] == [1] and "rank 1 on" in found[0]["text"]
