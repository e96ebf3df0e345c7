"""Real ranks that are killed, stopped and robbed of a checkpoint go on to the state of an undisturbed run."""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from launch.supervisor.ledger import PARTS
from tests.support.running import (
    NARROW,
    exact,
    exit_json,
    finish,
    lines,
    program,
    ranks_below,
    train_two,
    wait_for_step,
)
from train.checkpoint.manifest import list_checkpoints

SUPERVISED = ["run.num_processes=2", "launch.restarts=2", "launch.backoff_seconds=0.1", "parallel.timeout_seconds=8"]


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "launch.jsonl").read_text().splitlines()]


def test_faults_change_no_bit(overrides: list[str], tmp_path: Path) -> None:
    """kill -9 of a rank beside a corrupt newest checkpoint; SIGSTOP of a rank."""
    run = [*overrides, *NARROW, "train.steps=40", "checkpoint.every=5"]
    folder = tmp_path / "run"
    process = program("launch", "train", *run, *SUPERVISED)
    wait_for_step(folder, 12, process)
    ranks = ranks_below(process.pid)
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    shard = next(list_checkpoints(folder / "checkpoints")[-1].glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-8] + b"damaged!")
    os.kill(ranks[1], signal.SIGKILL)
    os.kill(ranks[0], signal.SIGCONT)
    wait_for_restart(folder, 2, process, 24)
    os.kill(ranks_below(process.pid)[0], signal.SIGSTOP)
    code, errors = finish(process, 240)
    assert code == 0, errors
    assert exit_json(folder)["code"] == 0 and not (folder / "gave_up.txt").exists()
    ends = [line for line in journal(folder) if line["event"] == "end"]
    assert [(line["cause"], line["ranks"]) for line in ends] == [("crash", [1]), ("hang", [0]), ("done", [])]
    so_far = [row for row in lines(folder) if "starts/faults" in row]
    assert [row["starts/faults"] for row in so_far][-1] == 2
    totals = journal(folder)[-1]
    assert sum(totals[name] for name in PARTS) == pytest.approx(totals["wall_seconds"])
    assert totals["faults"] == 2
    assert "2 faults ended the ranks" in (folder / "report.html").read_text()
    undisturbed = [word for word in run if not word.startswith("run.name")]
    assert train_two([*undisturbed, "run.name=undisturbed"]) == [0]
    assert exact(folder) == exact(tmp_path / "undisturbed")


def wait_for_restart(folder: Path, incarnation: int, process: Any, step: int) -> None:
    """Wait until a later start of the ranks has finished ``step``."""
    while journal(folder)[-1] != {**journal(folder)[-1], "event": "start", "incarnation": incarnation}:
        assert process.poll() is None, finish(process)[1]
        time.sleep(0.05)
    wait_for_step(folder, step, process)


def test_a_start_that_cannot_go_well_ends_with_a_page(overrides: list[str], tmp_path: Path) -> None:
    """Numbers that are not finite: code 4, no second start, and a page that says so."""
    blows_up = ["optim.lr=1e30", "optim.grad_clip=0", "schedule.warmup_steps=0"]
    run = [*overrides, *NARROW, *blows_up, *SUPERVISED, "run.num_processes=1"]
    code, errors = finish(program("launch", "train", *run), 300)
    assert code == 4, errors
    text = (tmp_path / "run" / "gave_up.txt").read_text()
    assert "it has no checkpoint." in text  # it named that of step 0
    assert "What happened\n  Unhealthy numbers: " in text and "What to do\n  1. Look at the loss" in text
    causes = [line["cause"] for line in journal(tmp_path / "run") if line["event"] == "end"]
    assert causes == ["unhealthy"]
    (typed,) = (line for line in text.splitlines() if "longcat train " in line and "run.name=" in line)
    cured = shlex.split(typed.replace("NEW", "cured").replace("optim.lr=…", "optim.lr=0.001 train.steps=2"))[2:]
    assert [word for word in cured if word.startswith(("run.name=", "optim.lr="))] == [
        "run.name=cured",
        "optim.lr=0.001",
    ]
    assert finish(program("launch", "train", *cured), 300)[0] == 0, "the page's command"
