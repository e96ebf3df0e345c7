"""Runs that end before their last step: signals, time limit, non-finite losses, crashes; with their exit codes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.__main__ import main as longcat
from launch.this_machine import run_here
from tests.support.running import (
    NARROW,
    exact,
    exit_json,
    lines,
    ranks_below,
    run_cleanly,
    train_here,
    uninterrupted,
    wait_for_step,
)
from train.checkpoint.manifest import list_checkpoints, verify
from train.compose import compose
from train.loggers.jsonl import JsonLines
from train.process.search_path import found_by_children
from train.process.stop import SAVE_SIGNAL, STOP_SIGNALS
from train.step import StepResult

ENDLESS = "train.steps=100000"
BLOWS_UP = ["optim.lr=1e30", "optim.grad_clip=0", "schedule.warmup_steps=0"]


def stopped_at(folder: Path, errors: str, reason: str) -> int:
    """Check that a run stopped cleanly and saved its last step; returns that step."""
    step = len(lines(folder))
    assert errors.strip() == (
        f"stopped on {reason} after step {step}; state saved, the same command resumes from there"
    )
    assert exit_json(folder)["code"] == 3
    newest = list_checkpoints(folder / "checkpoints")[-1]
    assert newest.name == f"step-{step:08d}" and verify(newest).problem is None
    return step


def in_step(step: int, action: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Run an action in this process as soon as ``step`` is logged."""
    write = JsonLines.write

    def then_act(self: JsonLines, metrics: dict[str, Any], *rest: Any) -> None:
        write(self, metrics, *rest)
        if metrics["step"] == step:
            action()

    patch.setattr(JsonLines, "write", then_act)


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_signal_saves_and_the_same_command_resumes(
    number: signal.Signals,
    corpus: Path,
    overrides: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [*overrides, *NARROW, "train.steps=10"]
    with monkeypatch.context() as patch:
        in_step(5, lambda: os.kill(os.getpid(), number), patch)
        assert run_cleanly(lambda: longcat(["train", *words])) == 3
    assert stopped_at(tmp_path / "run", capfd.readouterr().err, number.name) == 6, "the next step stops"
    assert run_cleanly(lambda: longcat(["train", *words])) == 0
    assert exact(tmp_path / "run") == uninterrupted(corpus, words)


def through_the_launcher(
    overrides: list[str], capfd: pytest.CaptureFixture[str], meanwhile: Callable[[], None] | None = None
) -> tuple[int, str]:
    """`longcat train` with two ranks, started by this process; the exit code and standard error."""
    other = threading.Thread(target=meanwhile or (lambda: None))
    other.start()
    code = run_cleanly(lambda: longcat(["train", *overrides, "run.num_processes=2"]))
    other.join()
    return code, capfd.readouterr().err


@pytest.mark.parametrize(
    "number,to_launcher,to_ranks",
    [
        (signal.SIGTERM, True, []),
        (signal.SIGINT, True, [0, 1]),
        (signal.SIGTERM, False, [1]),
        (signal.SIGUSR1, True, [0, 1]),
        (signal.SIGHUP, True, []),
    ],
    ids=["sigterm_to_the_launcher", "ctrl_c_to_all", "sigterm_to_one_rank", "usr1_to_all", "hup_to_the_launcher"],
)
def test_signal_saves_with_two_processes(
    number: signal.Signals,
    to_launcher: bool,
    to_ranks: list[int],
    overrides: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The step's all-reduce carries the stop request: all ranks stop after the same step, whichever got the signal."""
    folder = tmp_path / "run"

    def send() -> None:
        wait_for_step(folder, 2)
        for pid in [ranks_below(os.getpid())[rank] for rank in to_ranks] + [os.getpid()] * to_launcher:
            os.kill(pid, number)

    code, errors = through_the_launcher([*overrides, *NARROW, ENDLESS], capfd, send)
    assert code == 3, errors
    step = stopped_at(folder, errors, "request" if "request" in errors else number.name)
    assert exact(folder).keys() == set(range(1, step + 1))


def test_save_signal_saves_and_the_run_goes_on(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*overrides, *NARROW, "train.steps=6", "checkpoint.keep=0"]
    in_step(2, lambda: os.kill(os.getpid(), SAVE_SIGNAL), monkeypatch)
    assert train_here(words) == 0
    names = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["step-00000003", "step-00000006"]


def test_launcher_passes_the_save_signal_on(
    overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """While the ranks start it ends nothing; later they save, and the run goes on until it is stopped."""
    checkpoints = tmp_path / "run" / "checkpoints"
    saved: list[str] = []

    def send() -> None:
        while not ranks_below(os.getpid()):
            time.sleep(0.01)
        os.kill(os.getpid(), SAVE_SIGNAL)
        wait_for_step(tmp_path / "run", 2)
        os.kill(os.getpid(), SAVE_SIGNAL)
        end = time.monotonic() + 60
        while not list_checkpoints(checkpoints) and time.monotonic() < end:
            time.sleep(0.01)
        saved.extend(path.name for path in list_checkpoints(checkpoints))
        os.kill(os.getpid(), signal.SIGTERM)

    code, errors = through_the_launcher([*overrides, *NARROW, ENDLESS], capfd, send)
    assert code == 3, errors
    assert len(saved) == 1
    assert stopped_at(tmp_path / "run", errors, "request" if "request" in errors else "SIGTERM") > int(saved[0][5:])


@pytest.mark.parametrize("processes", [1, 2])
def test_hup_stays_ignored_under_nohup(
    processes: int, overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:

        def send() -> None:
            wait_for_step(tmp_path / "run", 2)
            for pid in [os.getpid(), *ranks_below(os.getpid())]:
                os.kill(pid, signal.SIGHUP)

        other = threading.Thread(target=send)
        other.start()
        words = [*overrides, *NARROW, "train.steps=12", f"run.num_processes={processes}"]
        assert run_cleanly(lambda: longcat(["train", *words])) == 0
        other.join()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(lines(tmp_path / "run")) == 12


def test_launcher_waits_for_the_save_despite_more_signals(
    overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Three signals while a rank is suspended: the launcher waits for it and ends with the code of a clean stop."""

    def send() -> None:
        wait_for_step(tmp_path / "run", 2)
        slow = ranks_below(os.getpid())[1]
        os.kill(slow, signal.SIGSTOP)
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
            time.sleep(0.5)
        os.kill(slow, signal.SIGCONT)

    code, errors = through_the_launcher([*overrides, *NARROW, ENDLESS], capfd, send)
    assert code == 3, errors
    stopped_at(tmp_path / "run", errors, "SIGTERM")


@pytest.mark.parametrize("to_ranks", [False, True], ids=["to_the_launcher", "to_the_ranks"])
def test_a_signal_before_ranks_have_handlers_is_not_lost(
    to_ranks: bool, overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As Slurm sends it to every process of a job that has just started: one step is trained and saved."""

    def send() -> None:
        while len(ranks_below(os.getpid())) < 2:
            time.sleep(0.001)
        for pid in ranks_below(os.getpid()) if to_ranks else [os.getpid()]:
            os.kill(pid, signal.SIGTERM)

    code, errors = through_the_launcher([*overrides, *NARROW, ENDLESS], capfd, send)
    assert code == 3, errors
    assert stopped_at(tmp_path / "run", errors, "request" if "request" in errors else "SIGTERM") == 1


def test_a_killed_rank_is_a_crash(overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As the kernel kills a process out of memory. The other rank ends too and names it once."""
    folder = tmp_path / "run"

    def kill() -> None:
        wait_for_step(folder, 2)
        os.kill(ranks_below(os.getpid())[1], signal.SIGKILL)

    code, errors = through_the_launcher([*overrides, *NARROW, ENDLESS], capfd, kill)
    assert code == 1, errors
    assert exit_json(folder)["code"] == 1
    assert errors.count("rank 1 (process") == 1 and "has died" in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    "script,code",
    [
        ("import sys; sys.exit(2)", 2),
        ("import sys; sys.exit(3)", 3),
        ("import os, sys, time; os.environ['RANK'] == '1' and sys.exit(2) or time.sleep(60)", 2),
        ("import os, time; os.environ['RANK'] == '1' and os.abort() or time.sleep(60)", 1),
        ("raise ValueError", 1),
        ("", 0),
    ],
    ids=["2", "3", "2_by_one_rank", "abort_of_one_rank", "exception", "done"],
)
def test_first_failing_rank_decides_the_code(
    script: str, code: int, overrides: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The others, which have not met yet, are ended."""
    (tmp_path / "train.py").write_text(script)
    config = compose([*overrides, "run.num_processes=2"])
    monkeypatch.setattr("train.process.search_path.ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with found_by_children():
        assert run_cleanly(lambda: run_here([], config, 2)) == code


def test_a_crash_leaves_its_reason(overrides: list[str], tmp_path: Path) -> None:
    """An unexpected error prints a traceback, ends with code 1 and unlocks the folder."""
    import train.run

    def fail(*arguments: object) -> None:
        raise ZeroDivisionError("a bug")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train.run, "build_data", fail)
        train_here([*overrides, *NARROW])
    assert exit_json(tmp_path / "run") == {"code": 1, "message": "ZeroDivisionError: a bug"}
    assert train_here([*overrides, *NARROW, "train.steps=1"]) == 0


def test_signal_during_start_up_is_not_lost(overrides: list[str], tmp_path: Path) -> None:
    """From the rendezvous on, a signal counts: one step is trained and saved."""
    import train.run

    build = train.run.build_data

    def interrupted(*arguments: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return build(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.run, "build_data", interrupted)
        assert train_here([*overrides, *NARROW]) == 3
    assert len(lines(tmp_path / "run")) == 1
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000001"]


def test_signal_before_rendezvous_ends_the_ranks(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that took it as a stop request would wait minutes for a rank that is gone."""
    import train.run

    usual = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    connect, seen = train.run.connect, []

    def watched(*arguments: Any) -> Any:
        seen.append([signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)])
        return connect(*arguments)

    monkeypatch.setattr(train.run, "connect", watched)
    assert train_here([*overrides, *NARROW, "train.steps=1"]) == 0
    assert seen == [usual]


def test_a_second_ctrl_c_does_not_wait_for_the_step(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    in_step(2, twice, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train_here([*overrides, *NARROW])
    assert exit_json(tmp_path / "run")["code"] == 1
    assert [row["step"] for row in lines(tmp_path / "run")] == [1, 2]


def test_time_limit_saves_and_the_same_command_resumes(
    corpus: Path, overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*overrides, *NARROW, "train.steps=10"]
    assert train_here([*words, "train.stop_after_seconds=0.01"]) == 3
    assert stopped_at(tmp_path / "run", capfd.readouterr().err, "train.stop_after_seconds") == 1
    assert train_here(words) == 0
    assert exact(tmp_path / "run") == uninterrupted(corpus, words)


def test_a_signal_in_the_last_step_is_no_stop(overrides: list[str], tmp_path: Path) -> None:
    """The run is complete and says so."""
    assert train_here([*overrides, *NARROW, "train.steps=1", "train.stop_after_seconds=0.01"]) == 0
    assert exit_json(tmp_path / "run")["code"] == 0


def test_non_finite_loss_ends_with_4_and_names_a_checkpoint(
    overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The last checkpoint is named."""
    folder = tmp_path / "run"
    assert train_here([*overrides, *NARROW, *BLOWS_UP, "checkpoint.every=1"]) == 4
    errors = capfd.readouterr().err
    good = list_checkpoints(folder / "checkpoints")
    step = len(lines(folder)) + 1
    assert errors.startswith(f"error: step {step}: loss ") and errors.count("\n") == 1
    assert f"the last checkpoint is {good[-1]};" in errors and "lower optim.lr" in errors
    assert good[-1].name == f"step-{step - 1:08d}" and verify(good[-1]).problem is None
    assert exit_json(folder) == {"code": 4, "message": errors.strip().removeprefix("error: ")}
    assert (folder / "report.html").is_file()


def test_non_finite_first_step_leaves_no_checkpoint(
    overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train_here([*overrides, *NARROW, "model.hidden_std=1e30"]) == 4
    errors = capfd.readouterr().err
    assert errors.startswith("error: step 1: loss ") and "there is no checkpoint yet" in errors
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
    assert exit_json(tmp_path / "run")["code"] == 4


@pytest.mark.parametrize(
    "words",
    [["balance.ki=1e40"], ["balance.ki=0", "balance.kp=1e300"], ["balance.method=sign", "balance.ki=1e39"]],
    ids=["integral", "proportional", "sign"],
)
def test_non_finite_biases_end_with_4_and_save_nothing(
    words: list[str], overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert train_here([*overrides, *NARROW, *words, "checkpoint.every=1", "logging.routing_every=1"]) == 4
    errors = capfd.readouterr().err
    assert "a selection bias or the bias controller's state is not finite" in errors and "lower balance.ki" in errors
    assert errors.count("\n") == 1 and list_checkpoints(folder / "checkpoints") == []
    assert (folder / "metrics.jsonl").read_text() == "" == (folder / "routing.jsonl").read_text()


def test_a_checkpoint_that_was_invalid_at_the_start_is_not_named(
    overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*overrides, *NARROW, "checkpoint.every=1", "train.steps=3"]
    assert train_here(words) == 0
    kept = list_checkpoints(tmp_path / "run" / "checkpoints")
    (kept[-1] / "manifest.json").unlink()
    monkeypatch.setattr(StepResult, "healthy", False)
    assert train_here(words) == 4
    assert f"the last checkpoint is {kept[0]};" in capfd.readouterr().err
