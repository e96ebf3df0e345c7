"""The ledger of wall time, the progress that it is made from, and /metrics."""

from __future__ import annotations

import errno
import json
import os
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.supervisor.journal import Journal
from launch.supervisor.ledger import PARTS, Life, parts_of, summary
from launch.supervisor.progress import RunProgress
from launch.supervisor.prometheus import serving
from tests.support.ports import free_ports
from train.run_dir.sealed import intact_lines


def test_a_known_run_s_parts() -> None:
    """The second start goes on from step 2; the fault was found 4 s after the last step."""
    lives = [
        Life(0, 15, ((1, 5.0), (2, 7.0), (3, 9.0), (4, 11.0)), 0, 2, 0.5, 1, True),
        Life(18, 31, ((3, 24.0), (4, 26.0), (5, 28.0)), 2, 5, 0.0, 0, False),
    ]
    found = summary(lives)
    assert {name: found[name] for name in PARTS} == {
        "useful": 1.5 + 4,
        "saving": 0.5,
        "lost": 4,
        "detecting": 4,
        "starting": 5 + 6,
        "waiting": 3,
        "ending": 3,
    }
    assert found["availability"] == pytest.approx(6 / 31)
    assert found["mean_recovery_seconds"] == 4 + 3 + 6
    assert found["mean_seconds_between_faults"] == 10


@st.composite
def runs(draw: st.DrawFn) -> list[Life]:
    seconds = st.floats(0, 1e5)
    lives, now, step = [], draw(seconds), 0
    for _ in range(draw(st.integers(1, 6))):
        begin, base, finished = now, draw(st.integers(0, step)), []
        step = base
        for _ in range(draw(st.integers(0, 8))):
            now, step = now + draw(seconds), step + 1
            finished.append((step, now))
        now += draw(seconds)
        kept = draw(st.integers(0, step))
        lives.append(Life(begin, now, tuple(finished), base, kept, draw(seconds), 1, draw(st.booleans())))
        now += draw(seconds)
    return lives


@given(runs())
def test_parts_add_up_to_the_wall_clock(lives: list[Life]) -> None:
    parts = parts_of(lives)
    assert sum(parts.values()) == pytest.approx(lives[-1].end - lives[0].begin, abs=1e-6)
    assert all(value >= -1e-6 for value in parts.values())


def test_progress_knows_steps_and_resumes(tmp_path: Path) -> None:
    path, now = tmp_path / "metrics.jsonl", [0.0]
    progress = RunProgress(path, lambda: now[0])

    def write(steps: range, rest: str = "") -> None:
        now[0] += 1
        path.write_text("".join(json.dumps({"step": step, "loss": 1.5}) + "\n" for step in steps) + rest)
        progress.look()

    write(range(1, 2))
    write(range(1, 3), '{"step": 3, "lo')
    assert progress.finished == [(1, 1.0), (2, 2.0)]
    progress.begin()
    write(range(1, 2))  # a resume from step 1
    write(range(1, 3))
    assert (progress.base, progress.best, progress.finished) == (1, 2, [(2, 4.0)])
    write(range(1, 4))
    write(range(1, 3))  # a rollback
    assert (progress.base, progress.best, progress.finished) == (1, 3, [(2, 4.0)])


def test_progress_tells_repeated_steps_from_old_ones(tmp_path: Path) -> None:
    """A resume that has written as many steps as were there, or more, before anybody looks."""
    path, now = tmp_path / "metrics.jsonl", [0.0]

    def write(steps: range, seconds: float) -> None:
        now[0] += 10
        kept = path.read_text().splitlines(keepends=True)[: steps[0] - 1] if path.exists() else []
        path.write_text("".join(kept + [json.dumps({"step": step, "step_seconds": seconds}) + "\n" for step in steps]))
        progress.look()

    progress = RunProgress(path, lambda: now[0])
    write(range(1, 6), 1.0)
    assert progress.finished == [(1, 6.0), (2, 7.0), (3, 8.0), (4, 9.0), (5, 10.0)]
    for last in (4, 5, 8):  # before the old newest step, at it, behind it
        progress.begin()
        write(range(3, last + 1), 0.5 + last)
        assert (progress.base, progress.step, progress.best) == (2, last, max(last, 5))
        assert [step for step, _ in progress.finished] == list(range(3, last + 1))
        write(range(3, 6), 1.0)  # a rollback within a start, or its end
    again = RunProgress(path, lambda: now[0])
    assert (again.base, again.best, again.finished, again.last_step_time) == (5, 5, [], None)
    path.write_text("")
    again.look()
    assert (again.step, again.base, again.newest) == (0, 0, {"step": 0})


def test_progress_of_a_file_too_long_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.supervisor.progress.WINDOW_BYTES", 200)
    path = tmp_path / "metrics.jsonl"

    def write(steps: range, loss: float) -> None:
        path.write_text("".join(json.dumps({"step": step, "loss": loss}) + "\n" for step in steps))

    write(range(1, 50), 1.5)
    progress = RunProgress(path)
    assert (progress.step, progress.base) == (49, 49)
    write(range(1, 31), 2.5)
    progress.look()
    assert (progress.step, progress.base, [step for step, _ in progress.finished]) == (30, 29, [30])


def test_journal_keeps_lines_for_which_the_disk_has_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    journal, write = Journal(tmp_path / "run", notes.append), os.write
    journal.record({"event": "start"})

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    journal.record({"event": "end"})
    monkeypatch.setattr(os, "write", write)
    assert intact_lines(tmp_path / "run" / "launch.jsonl") == [{"event": "start"}]
    journal.flush()
    journal.close()
    assert intact_lines(tmp_path / "run" / "launch.jsonl") == [{"event": "start"}, {"event": "end"}]
    assert len(notes) == 2 and "cannot be written" in notes[0]


def test_prometheus_reads_the_gauges() -> None:
    (port,) = free_ports(1)
    with serving(port, lambda: {"step": 12, "loss": 2.5, "seconds_since_last_step": None}):
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    values = dict(line.split() for line in text.splitlines() if not line.startswith("#"))
    assert values == {"longcat_step": "12", "longcat_loss": "2.5"}
