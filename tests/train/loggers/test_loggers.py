"""wandb and TensorBoard: what they get, how a restart continues, and what happens when they fail."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.fixtures import error_line
from tests.support.running import NARROW, exit_json, lines, train_here
from train.compose import compose
from train.loggers import wandb_logger
from train.loggers.interface import Guarded, SinkGroup
from train.loggers.tensorboard_logger import TensorBoardLogger
from train.loggers.wandb_logger import RUN_ID


class FakeRun:
    """A wandb run that remembers what it got; like wandb's it drops a row whose number is not above the last one's."""

    def __init__(self, fails_at: int = 0, starting_step: int = 0) -> None:
        self.fails_at, self.starting_step = fails_at, starting_step
        self.rows: dict[int, dict[str, Any]] = {}
        self.axes: dict[str, str] = {}
        self.finished = False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes[name] = step_metric

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if metrics["step"] == self.fails_at:
            raise ConnectionResetError("Connection lost")
        if step >= max(self.starting_step, *self.rows, 0):
            self.rows[step] = metrics

    def steps(self) -> list[int]:
        return [row["step"] for row in self.rows.values()]

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A module `wandb` whose `init` keeps its arguments; `runs` has a run for each start."""
    fake = types.SimpleNamespace(calls=[], runs=[], is_logged_in=True, fails_at=0, starting_step=0)

    def init(**keywords: Any) -> FakeRun:
        fake.calls.append(keywords)
        fake.runs.append(FakeRun(fake.fails_at, fake.starting_step))
        return fake.runs[-1]

    fake.init, fake.teardown = init, lambda: None
    fake.login = lambda prompt: fake.is_logged_in
    fake.Settings = dict
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    for name in ("WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return fake


def test_restart_continues_the_same_wandb_run(
    fake_wandb: types.SimpleNamespace, overrides: list[str], tmp_path: Path
) -> None:
    words = [*overrides, *NARROW, "logging.wandb=online", "logging.wandb_group=g", "logging.wandb_tags=[a,b]"]
    words += ["logging.wandb_entity=team", "logging.wandb_project=mine"]
    assert train_here([*words, "train.steps=2"]) == 0
    assert train_here([*words, "train.steps=4"]) == 0
    first, second = fake_wandb.calls
    assert first["id"] == second["id"] == (tmp_path / "run" / RUN_ID).read_text().strip()
    for call in (first, second):
        assert call["resume"] == "allow" and call["group"] == "g" and call["tags"] == ["a", "b"]
        assert call["entity"] == "team" and call["project"] == "mine"
    assert [run.steps() for run in fake_wandb.runs] == [[1, 2], [3, 4]]
    assert all(run.finished for run in fake_wandb.runs)
    assert fake_wandb.runs[0].rows[2]["loss"] == lines(tmp_path / "run")[1]["loss"]


def test_wandb_gets_steps_that_are_trained_again(
    fake_wandb: types.SimpleNamespace, overrides: list[str], tmp_path: Path
) -> None:
    """After a rollback, and where a run that had reached step 60 resumes from the checkpoint of step 50."""
    (tmp_path / "run").mkdir()
    fake_wandb.starting_step, none = 61, torch.zeros(0)
    logger = wandb_logger.WandbLogger(compose([*overrides, "logging.wandb=offline"]), print)
    for step in (51, 52, 53):
        logger.write({"step": step, "loss": 1.0}, none, none)
    logger.rewind(51)
    for step in (52, 53):
        logger.write({"step": step, "loss": 2.0}, none, none)
    logger.close()
    (run,) = fake_wandb.runs
    assert [(row["step"], row["loss"]) for row in run.rows.values()] == [
        (51, 1.0),
        (52, 1.0),
        (53, 1.0),
        (52, 2.0),
        (53, 2.0),
    ]
    assert run.axes == {"*": "step"}


@pytest.mark.parametrize("key,variable,project", [("", "", "longcat"), ("", "env", "env"), ("key", "env", "key")])
def test_project_is_the_key_s_or_the_environment_s(
    key: str,
    variable: str,
    project: str,
    fake_wandb: types.SimpleNamespace,
    overrides: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if variable:
        monkeypatch.setenv("WANDB_PROJECT", variable)
    config = compose([*overrides, *([f"logging.wandb_project={key}"] if key else []), "logging.wandb=offline"])
    wandb_logger.start_wandb(config, "abc")
    assert fake_wandb.calls[0]["project"] == project


def test_wandb_without_a_key_is_said_at_the_first_step(
    fake_wandb: types.SimpleNamespace, overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_wandb.is_logged_in = False
    assert train_here([*overrides, *NARROW, "train.steps=3", "logging.wandb=online"]) == 0
    check_said_before_step(capfd.readouterr().out, "no API key", 1)
    assert (tmp_path / "run" / "report.html").is_file() and exit_json(tmp_path / "run")["code"] == 0


@pytest.mark.parametrize("stored", ["my-run_1", "2026-11-28.a", "abc123"])
def test_a_stored_id_is_used_again(stored: str, fake_wandb: types.SimpleNamespace, tmp_path: Path) -> None:
    """As WANDB_RUN_ID may have set it for the first start."""
    (tmp_path / RUN_ID).write_text(f"{stored}\n")
    assert wandb_logger.run_id_of(tmp_path, print) == stored
    (tmp_path / RUN_ID).write_text("a/b\x00")
    assert wandb_logger.run_id_of(tmp_path, print).isalnum()


def test_report_does_not_wait_for_an_upload(
    fake_wandb: types.SimpleNamespace, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When wandb gets its last chance, the report and all lines that it shows are there."""
    seen = []

    def finish(self: FakeRun) -> None:
        seen.append(((tmp_path / "run" / "report.html").is_file(), len(lines(tmp_path / "run"))))

    monkeypatch.setattr(FakeRun, "finish", finish)
    assert train_here([*overrides, *NARROW, "train.steps=2", "logging.wandb=offline"]) == 0
    assert seen == [(True, 2)]


@pytest.mark.alone
def test_wandb_that_never_started_is_not_waited_for(
    fake_wandb: types.SimpleNamespace, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = threading.Event()
    fake_wandb.init = lambda **keywords: end.wait(20)
    monkeypatch.setattr(wandb_logger, "CLOSE_SECONDS", 5.0)
    monkeypatch.setattr(wandb_logger, "UNSTARTED_SECONDS", 0.1, raising=False)
    (tmp_path / "run").mkdir()
    logger = wandb_logger.WandbLogger(compose([*overrides, "logging.wandb=offline"]), print)
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        logger.close()
    assert time.monotonic() - started < 3
    end.set()


def check_said_before_step(printed: str, text: str, step: int) -> None:
    """One note with ``text`` and that training continues, before the line of ``step``."""
    said = [number for number, line in enumerate(printed.splitlines()) if text in line]
    steps = [number for number, line in enumerate(printed.splitlines()) if line.strip().startswith(f"{step}/")]
    assert len(said) == 1 and said[0] < steps[0], printed
    assert "training continues without wandb" in printed.splitlines()[said[0]]


def test_wandb_that_cannot_start_is_said_at_the_first_step(
    overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The real package, whose folder is a file."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").write_text("")
    assert train_here([*overrides, *NARROW, "train.steps=3", "logging.wandb=offline"]) == 0
    check_said_before_step(capfd.readouterr().out, "wandb: ", 1)
    assert (tmp_path / "run" / "report.html").is_file()


def test_wandb_that_dies_costs_no_step(
    overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real package, whose service is killed in the middle."""
    import psutil

    from train.loggers.jsonl import JsonLines

    plain = JsonLines.write

    def write(self: JsonLines, metrics: dict[str, Any], *rest: Any) -> None:
        plain(self, metrics, *rest)
        if metrics["step"] == 3:
            running = [one for one in psutil.Process().children() if one.status() != psutil.STATUS_ZOMBIE]
            services = [child for child in running if "wandb" in " ".join(child.cmdline())]
            assert services
            for child in services:
                os.kill(child.pid, signal.SIGKILL)
                child.wait(10)

    monkeypatch.setattr(JsonLines, "write", write)
    assert train_here([*overrides, *NARROW, "train.steps=30", "logging.wandb=offline"]) == 0
    printed = capfd.readouterr()
    assert printed.out.count("training continues without wandb") == 1 and "Traceback" not in printed.err
    assert len(lines(tmp_path / "run")) == 30 and (tmp_path / "run" / "report.html").is_file()


def test_wandb_that_fails_later_is_left_out_once(
    fake_wandb: types.SimpleNamespace, overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_wandb.fails_at = 2
    assert train_here([*overrides, *NARROW, "train.steps=5", "logging.wandb=offline"]) == 0
    assert capfd.readouterr().out.count("Connection lost; training continues without wandb") == 1
    assert len(lines(tmp_path / "run")) == 5


@pytest.mark.parametrize("method", ["write", "rewind", "flush", "close"])
def test_logger_without_a_method_is_left_out_once(method: str) -> None:
    """Whatever of its interface it lacks."""
    notes: list[str] = []
    lacking = types.SimpleNamespace(
        **{name: lambda *_: None for name in ("write", "rewind", "flush", "close") if name != method}
    )
    sink, none = Guarded("mine", lambda: lacking, notes.append), torch.zeros(0)
    for _ in range(2):
        sink.write({"step": 1}, none, none)
        sink.rewind(0)
        sink.flush()
    sink.close()
    assert len(notes) == 1 and "training continues without mine" in notes[0]


def test_the_guide_s_logger_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """It overrides one method and inherits the others."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "guide" / "reports.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    sink, none = SinkGroup([names["PrintLoss"]()]), torch.zeros(0)
    sink.write({"step": 1, "loss": 2.5}, none, none)
    sink.rewind(0)
    sink.flush()
    sink.close()
    assert capsys.readouterr().out == "1 2.5\n"


def test_tensorboard_without_its_package_is_refused(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from launch.__main__ import main as longcat

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else find(name))
    assert longcat(["train", *overrides, "logging.tensorboard=true"]) == 2
    error_line(capfd.readouterr().err, "logging.tensorboard=true", "not installed", "pip install tensorboard")


def test_tensorboard_gets_every_number(overrides: list[str], tmp_path: Path) -> None:
    """A second start continues after the first; TensorBoard's own reader sees each step once."""
    from tensorboard.backend.event_processing import event_accumulator as reader

    words = [*overrides, *NARROW, "logging.tensorboard=true"]
    assert train_here([*words, "train.steps=2"]) == 0
    assert train_here([*words, "train.steps=4"]) == 0
    seen = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    seen.Reload()
    events = seen.Scalars("loss")
    assert [event.step for event in events] == [1, 2, 3, 4]
    assert [event.value for event in events] == pytest.approx([row["loss"] for row in lines(tmp_path / "run")])
    assert "lr" in seen.Tags()["scalars"]


def test_a_rollback_takes_steps_back_from_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import event_accumulator as reader

    logger, none = TensorBoardLogger(tmp_path, 0), torch.zeros(0)
    for step in range(1, 5):
        logger.write({"step": step, "loss": 1.0}, none, none)
    logger.rewind(2)
    logger.write({"step": 3, "loss": 2.0}, none, none)
    logger.close()
    seen = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    seen.Reload()
    assert [(event.step, event.value) for event in seen.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 2.0)]
