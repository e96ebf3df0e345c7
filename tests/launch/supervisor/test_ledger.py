"""The ledger of wall time, the progress that it is made from, and /metrics."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.supervisor.ledger import PARTS, Life, parts_of, summary
from launch.supervisor.progress import Progress
from launch.supervisor.prometheus import serving
from tests.support.running import free_ports


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
    progress = Progress(path, lambda: now[0])

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


def test_prometheus_reads_the_gauges() -> None:
    (port,) = free_ports(1)
    with serving(port, lambda: {"step": 12, "loss": 2.5, "seconds_since_last_step": None}):
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    values = dict(line.split() for line in text.splitlines() if not line.startswith("#"))
    assert values == {"longcat_step": "12", "longcat_loss": "2.5"}
