"""Whole runs with a planted spike: rollback, its data, its resume, its limit, its files, and two ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.distributed import run_ranks
from tests.support.ports import free_ports
from tests.support.running import EXACT, NARROW, exact, exit_json, lines, train_here
from tests.train.health.planted import WATCHFUL, plant
from train.batches import BatchReader
from train.checkpoint.manifest import STATE
from train.compose import compose
from train.health.ranges import SampleRanges
from train.process.rank import main
from train.step import Stepper, StepResult

STEPS = 12
PLANTED = 28  # the first sample of step 8


@pytest.fixture
def short(overrides: list[str], tmp_path: Path) -> list[str]:
    """A run of 12 steps that goes back to step 5; the folder is the test's."""
    return [
        *(word for word in overrides if not word.startswith(("train.steps", "checkpoint."))),
        *NARROW,
        *WATCHFUL,
        f"train.steps={STEPS}",
        "checkpoint.every=5",
        "health.on_spike=rollback",
    ]


def events(folder: Path) -> list[dict[str, Any]]:
    """The lines of health.jsonl about spikes."""
    rows = [json.loads(line) for line in (folder / "health.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == "spike"]


def state_json(folder: Path, step: int) -> dict[str, Any]:
    return dict(json.loads((folder / "checkpoints" / f"step-{step:08d}" / STATE).read_text()))


def without_hash(rows: dict[int, dict[str, str]]) -> dict[int, dict[str, str]]:
    return {step: {key: row[key] for key in EXACT if key != "state_hash"} for step, row in rows.items()}


def test_rollback_leaves_the_stretch_out(
    short: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The run is bit by bit one whose data never had the samples 20 to 31; the counter of samples does not jump."""
    plant(monkeypatch, [PLANTED])
    assert train_here(short) == 0
    run = tmp_path / "run"
    rows = lines(run)
    assert [row["first_sample"] for row in rows] == [0, 4, 8, 12, 16, *range(32, 60, 4)]
    (event,) = events(run)
    assert (event["step"], event["action"], event["to_step"]) == (8, "rollback", 5)
    assert (event["first_sample"], event["last_sample"]) == (20, 31)
    stored = state_json(run, STEPS)
    assert stored["counters"]["samples"] == 4 * STEPS and stored["counters"]["tokens"] == 4 * 32 * STEPS
    assert stored["health"]["skipped"] == [[20, 32]] and stored["health"]["strikes"] == [8]
    assert [row["step"] for row in map(json.loads, (run / "superseded.jsonl").read_text().splitlines())] == [6, 7]
    said = [line for line in capfd.readouterr().out.splitlines() if "SPIKE" in line]
    assert len(said) == 1 and "back to step 5, without the samples 20 to 31 (action 1 of at most 10)" in said[0]

    init = BatchReader.__init__
    place = SampleRanges([(20, 32)]).place

    def without(self: BatchReader, samples: Any, *rest: Any, **options: Any) -> None:
        rest_of_them = type("Rest", (), {"__getitem__": lambda _, index: samples[place(index)]})()
        init(self, rest_of_them, *rest, **options)

    monkeypatch.undo()
    monkeypatch.setattr(BatchReader, "__init__", without)
    assert train_here([*short, "run.name=reference", "health.window=0", "health.on_spike=report"]) == 0
    assert without_hash(exact(run)) == without_hash(exact(tmp_path / "reference"))


def test_a_resumed_run_equals_an_uninterrupted_one(
    short: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the spike and behind it. It goes back to the scheduled step 5 all the same, not to step 7."""
    plant(monkeypatch, [PLANTED])
    assert train_here([*short, "run.name=whole"]) == 0
    expected = state_json(tmp_path / "whole", STEPS)["health"]
    assert expected["skipped"] == [[20, 32]]
    for stop in (7, 9):
        run = tmp_path / f"stopped-{stop}"
        words = [*short, f"run.name={run.name}"]
        assert train_here([*words, f"train.steps={stop}"]) == 0
        assert train_here(words) == 0
        assert exact(run) == exact(tmp_path / "whole")
        assert state_json(run, STEPS)["health"] == expected


def test_rollback_batches_limit_what_is_left_out(
    short: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, [PLANTED])
    assert train_here([*short, "health.rollback_batches=1"]) == 0
    assert [row["first_sample"] for row in lines(tmp_path / "run")] == [*range(0, 28, 4), *range(32, 52, 4)]


@pytest.mark.parametrize(("batches", "expected"), [("null", [0, 8]), ("7", [0, 8, 16])])
def test_rollback_over_a_stage_s_border_leaves_out_whole_steps(
    short: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: str, expected: list[int]
) -> None:
    """The spike is in step 10; steps have 8 samples up to sample 32, then 4. The checkpoint is of step 2."""
    stages = "data.stages=[{start_tokens: 1024, sequence_length: 64}]"
    words = [*short, "train.global_batch_size=8", "checkpoint.every=50", stages, f"health.rollback_batches={batches}"]
    plant(monkeypatch, [52])
    for steps in (2, STEPS):
        assert train_here([*words, f"train.steps={steps}"]) == 0
    later = [56 + 4 * step for step in range(STEPS - len(expected))]
    assert [row["first_sample"] for row in lines(tmp_path / "run")] == [*expected, *later]


def test_without_a_checkpoint_the_batch_is_skipped(
    short: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, [PLANTED])
    assert train_here([*short, "checkpoint.every=10"]) == 0
    (event,) = events(tmp_path / "run")
    assert event["action"] == "skip" and "no checkpoint to go back to" in event["text"]
    rows = lines(tmp_path / "run")
    assert [row["first_sample"] for row in rows] == list(range(0, 4 * STEPS, 4))
    assert rows[7]["spike_action"] == "skip"


@pytest.mark.parametrize("policy", ["skip", "rollback", "stop"])
def test_one_spike_too_many_ends_with_exit_code_4(
    short: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], policy: str
) -> None:
    plant(monkeypatch, [PLANTED, 40])
    assert train_here([*short, f"health.on_spike={policy}", "health.max_actions=1"]) == 4
    message = exit_json(tmp_path / "run")
    assert message["code"] == 4
    errors = capfd.readouterr().err
    assert errors == f"error: {message['message']}\n"
    reason = "health.on_spike=stop" if policy == "stop" else "of the last 10000 steps have reached health.max_actions=1"
    assert reason in errors and "nothing was updated and the last checkpoint is" in errors
    assert [event["action"] for event in events(tmp_path / "run")] == [policy, "stop"][policy == "stop" :]
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("forget_after", [1, 10_000])
def test_spike_that_comes_back_after_each_rollback_ends_the_run(
    short: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget_after: int
) -> None:
    """The model causes it, not the data. Each rollback leaves out the next batches, and none forgets those before."""
    plant(monkeypatch, steps=[8])
    words = [*short, "health.max_actions=3", f"health.forget_after={forget_after}"]
    assert train_here(words) == 4
    found = events(tmp_path / "run")
    assert [(one["step"], one["action"], one["actions"]) for one in found] == [
        (8, "rollback", 1), (8, "rollback", 2), (8, "rollback", 3), (8, "stop", 3),
    ]  # fmt: skip
    assert [(one["first_sample"], one["last_sample"]) for one in found[:3]] == [(20, 31), (32, 43), (44, 55)]
    assert train_here(words) == 4, "the last checkpoint is of before the first spike, so all of it comes again"
    assert [one["action"] for one in events(tmp_path / "run")] == 2 * ["rollback", "rollback", "rollback", "stop"]


def test_crash_behind_a_rollback_changes_nothing(
    short: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No checkpoint knows of the rollback yet: the resumed run meets the spike again, and does the same about it."""
    plant(monkeypatch, [PLANTED])
    assert train_here([*short, "run.name=whole"]) == 0
    expected = state_json(tmp_path / "whole", STEPS)["health"]
    step = Stepper.step

    def crash(self: Stepper, *requests: Any) -> StepResult:
        if self.state.counters.step == 6 and self.state.health.strikes:
            raise MemoryError("planted")
        return step(self, *requests)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Stepper, "step", crash)
        train_here(short)
    assert train_here(short) == 0
    assert exact(tmp_path / "run") == exact(tmp_path / "whole")
    assert expected["strikes"] == [8] and state_json(tmp_path / "run", STEPS)["health"] == expected


def test_checkpoints_without_health_state_load(
    short: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints of before this state existed: the windows start empty."""
    from train.checkpoint.files import file_hash

    assert train_here([*short, "train.steps=5"]) == 0
    folder = tmp_path / "run" / "checkpoints" / "step-00000005"
    stored = json.loads((folder / STATE).read_text())
    assert len(stored.pop("health")["losses"]) == 5
    (folder / STATE).write_text(json.dumps(stored))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][STATE] = file_hash(folder / STATE)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    plant(monkeypatch, [PLANTED])
    assert train_here(short) == 0
    assert events(tmp_path / "run") == []  # step 8 is the third that the new windows see
    assert len(state_json(tmp_path / "run", STEPS)["health"]["losses"]) == STEPS - 5


def _train_planted(runs: list[list[str]], ports: list[int]) -> list[int]:
    with pytest.MonkeyPatch.context() as patch:
        plant(patch, [PLANTED])
        codes = []
        for words, port in zip(runs, ports, strict=True):
            os.environ["MASTER_PORT"] = str(port)
            codes.append(main(compose(words)))
    return codes


def test_two_ranks_decide_alike(short: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts and data over two ranks, and a pipeline; a gradient that was left out has left nothing behind."""
    words = [*short, "model.num_layers=2", "train.dtype=float32"]
    back = [*words, "run.name=back", "parallel.fsdp=2", "parallel.ep=2"]
    skip = [*words, "health.on_spike=skip"]
    pipeline = [*skip, "run.name=pipeline", "parallel.pp=2", "parallel.fsdp=1", "parallel.schedule=1f1b"]
    assert run_ranks(_train_planted, 2, [back, pipeline], free_ports(2), timeout=240) == [[0, 0]] * 2
    assert [row["first_sample"] for row in lines(tmp_path / "back")] == [0, 4, 8, 12, 16, *range(32, 60, 4)]
    assert [event["to_step"] for event in events(tmp_path / "back")] == [5]
    plant(monkeypatch, [PLANTED])
    assert train_here([*skip, "run.name=alone"]) == 0
    for row, alone in zip(lines(tmp_path / "pipeline"), lines(tmp_path / "alone"), strict=True):
        assert row.get("spike_action") == alone.get("spike_action") == ("skip" if row["step"] == 8 else None)
        assert row["loss"] == pytest.approx(alone["loss"], rel=1e-4)
