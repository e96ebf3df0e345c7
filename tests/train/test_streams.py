"""Output that nobody reads: training and other commands end as usual."""

from __future__ import annotations

import errno
import io
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.running import NARROW, ROOT, exit_json, lines, wait_for_step
from train.process.lasting_streams import LastingStream
from train.terminal import Terminal


def start(words: list[str], **streams: object) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launch", *words]
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams)  # type: ignore[call-overload, no-any-return]


def finish(process: subprocess.Popen[bytes], seconds: float = 180) -> int:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


@pytest.mark.parametrize("processes", [1, 2])
def test_closed_pipe_ends_no_run(processes: int, overrides: list[str], tmp_path: Path) -> None:
    """As `longcat train | head -2 2>&1`: both streams lose their reader after the first bytes."""
    words = [*overrides, *NARROW, "train.steps=12", f"run.num_processes={processes}"]
    process = start(["train", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    assert finish(process) == 0
    folder = tmp_path / "run"
    assert exit_json(folder) == {"code": 0, "message": "done"}
    assert len(lines(folder)) == 12 and (folder / "checkpoints" / "step-00000012").is_dir()
    log = (folder / "run.log").read_text()
    assert "nobody reads standard output any more (Broken pipe)" in log and "report: " in log


@pytest.mark.parametrize("streams", ["stdout", "stdout_and_stderr"])
def test_streams_closed_at_the_start_end_no_run(streams: str, overrides: list[str], tmp_path: Path) -> None:
    """As `longcat train >&-`: no file of the run may get the number of a standard stream."""
    closing = ">&-" if streams == "stdout" else ">&- 2>&-"
    words = ["-m", "launch", "train", *overrides, *NARROW, "train.steps=2"]
    command = f'exec "$0" "$@" {closing}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", command, sys.executable, *words], cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0
    assert [row["step"] for row in lines(tmp_path / "run")] == [1, 2]
    assert (tmp_path / "run" / "run.log").read_text().count("report: ") == 1


def test_lost_terminal_saves_and_stops(overrides: list[str], tmp_path: Path) -> None:
    """A closed ssh session: every write fails with EIO and SIGHUP comes; the state is saved, the code is 3."""
    ours, theirs = pty.openpty()
    process = start(["train", *overrides, *NARROW, "train.steps=100000"], stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    end = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").is_file() and time.monotonic() < end:
        os.read(ours, 4096)
    os.close(ours)
    wait_for_step(tmp_path / "run", len(lines(tmp_path / "run")) + 2)
    assert process.poll() is None, "the lost terminal ended the run"
    process.send_signal(signal.SIGHUP)
    assert finish(process) == 3
    assert exit_json(tmp_path / "run")["message"].startswith("stopped on SIGHUP after step ")
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


@pytest.mark.parametrize("words,code", [(["--help"], 0), (["counts", "model=debug"], 0), (["nonsense"], 2)])
def test_commands_survive_a_closed_pipe(words: list[str], code: int) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = start(words, stdout=writing, stderr=writing)
    os.close(writing)
    assert finish(process) == code


class Failing(io.StringIO):
    """A stream whose writes fail with an error number while it is set."""

    number: int | None = None

    def write(self, text: str) -> int:
        if self.number is not None:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)


def test_full_disk_behind_the_stream_may_pass() -> None:
    stream = Failing()
    lasting = LastingStream(stream)
    stream.number = errno.ENOSPC
    lasting.write("lost")
    stream.number = None
    lasting.write("kept")
    assert stream.getvalue() == "kept" and lasting.lost is None


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.EBADF, errno.ECONNRESET])
def test_terminal_goes_silent_and_the_log_continues(number: int, tmp_path: Path) -> None:
    stream = Failing()
    terminal = Terminal(10, 4, 6, stream, tmp_path / "run.log")
    terminal.note("before")
    stream.number = number
    terminal.note("during")
    terminal.step({"step": 1})
    terminal.close()
    log = (tmp_path / "run.log").read_text().splitlines()
    assert log[:2] == ["before", "during"] and os.strerror(number) in log[2] and log[-1].strip().startswith("1/10")
    assert stream.getvalue() == "before\n"


def test_neither_stream_nor_log_ends_no_run(tmp_path: Path) -> None:
    """Standard output is lost already when run.log cannot be opened."""
    stream = Failing()
    stream.number = errno.EPIPE
    terminal = Terminal(10, 4, 6, stream, tmp_path / "missing" / "run.log")
    terminal.note("kept in memory")
    (tmp_path / "missing").mkdir()
    terminal.step({"step": 1})
    terminal.close()
    assert (tmp_path / "missing" / "run.log").read_text().startswith("kept in memory\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_characters_that_a_stream_lacks_are_escaped(encoding: str) -> None:
    """As with PYTHONIOENCODING or a locale of another encoding; `\\udcff` is a byte of a path that is no UTF-8."""
    raw = io.BytesIO()
    stream = LastingStream(io.TextIOWrapper(raw, encoding=encoding, write_through=True))
    stream.write("a → b\udcff\n")
    assert raw.getvalue() == b"a \\u2192 b\\udcff\n"


@pytest.mark.parametrize("variable", ["PYTHONIOENCODING=ascii", "PYTHONOPTIMIZE=2"])
def test_help_is_printed_in_any_environment(variable: str) -> None:
    name, _, value = variable.partition("=")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), name: value}
    done = subprocess.run([sys.executable, "-P", "-m", "launch", "--help"], env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"train" in done.stdout
