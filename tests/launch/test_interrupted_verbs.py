"""A stop signal where there is nothing to save: one line, exit code 3, and nothing half-written."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from launch.__main__ import main as longcat
from tests.support.running import exit_json, run_cleanly
from train.process.stop import SAVE_SIGNAL, STOP_SIGNALS, interruptible

pytestmark = pytest.mark.usefixtures("heeds_ctrl_c")


def killing(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def line(number: signal.Signals) -> str:
    return f"stopped on {number.name} before the end; the same command starts again\n"


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_interrupted_build_leaves_nothing(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A second signal, while the build is cleared away, is ignored."""
    (tmp_path / "a.txt").write_text("some text")

    def encode(*_: object) -> None:
        try:
            killing(number)
        finally:
            killing(number)

    monkeypatch.setattr("train.data.build._encode", encode)
    words = ["data", "build", f"data.source={tmp_path}", f"data.out={tmp_path / 'out'}"]
    assert run_cleanly(lambda: longcat(words)) == 3
    assert capfd.readouterr().err == line(number)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"]


@pytest.mark.parametrize("verb", ["export", "merge", "grow", "import"])
def test_interrupted_checkpoint_verbs_leave_nothing(
    verb: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source = str(checkpoint)
    if verb == "import":
        source = str(tmp_path / "exported")
        assert longcat(["export", f"source={checkpoint}", f"target={source}"]) == 0
    if verb == "merge":
        shutil.copytree(checkpoint, tmp_path / "again")
        source = f"{checkpoint},{tmp_path / 'again'}"
    module, name = {
        "export": ("export", "texts"),
        "merge": ("merge", "write"),
        "grow": ("grow", "write"),
        "import": ("import_folder", "write"),
    }[verb]
    room = "huggingface" if verb in ("export", "import") else "checkpoint"
    monkeypatch.setattr(f"train.{room}.{module}.{name}", lambda *_: killing(signal.SIGTERM))
    before = sorted(tmp_path.iterdir())
    capfd.readouterr()
    assert run_cleanly(lambda: longcat([verb, f"source={source}", f"target={tmp_path / 'target'}"])) == 3
    assert capfd.readouterr().err == line(signal.SIGTERM)
    assert sorted(tmp_path.iterdir()) == before


def test_stop_before_the_first_step_is_no_crash(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The run folder is there already, and training does not listen for signals yet."""
    monkeypatch.setattr("train.run.connect", lambda *_: killing(signal.SIGINT))
    assert run_cleanly(lambda: longcat(["train", *overrides])) == 3
    assert capfd.readouterr().err == line(signal.SIGINT)
    assert exit_json(tmp_path / "run") == {"code": 3, "message": line(signal.SIGINT).strip()}


def test_request_to_save_that_comes_early_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def encode(*_: object) -> int:
        killing(SAVE_SIGNAL)
        return 0

    monkeypatch.setitem(longcat.__globals__["VERBS"], "train", encode)
    assert run_cleanly(lambda: longcat(["train"])) == 0
    assert capfd.readouterr().err == ""


def test_ignored_signals_stay_ignored() -> None:
    """As `nohup` and a shell's `&` start a program."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            killing(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_second_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def twice(_: object) -> int:
        raise KeyboardInterrupt("stopped by a second Ctrl-C")

    monkeypatch.setitem(longcat.__globals__["VERBS"], "train", twice)
    assert longcat(["train"]) == 1
    assert capfd.readouterr().err == "error: stopped by a second Ctrl-C\n"
