"""A store or a rank that falls silent after the ranks have met ends a run that needs it, in one line, and no other."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from launch.nodes.store import RanksStore
from parallel.watchdog import watchdog
from tests.support.distributed import inherit, rank_context, set_rank_environment
from tests.support.running import NARROW, exit_json
from train.compose import compose
from train.process.rank import main

TIMEOUT = 3.0  # parallel.timeout_seconds from the silence on: busy cores make the start slow
AT_MOST = 30.0  # seconds beyond it
START = 120.0  # seconds that ranks have to meet


def train_until_silent(
    rank: int, function: tuple[str, str], store: int | None, port: int, folder: Path, words: list[str], environment: Any
) -> None:
    """Train as one of two ranks. When both have come to ``function``, (module, name), a process stops.

    It is that of the store, with this number, or without one rank 1.
    """
    inherit(environment)
    set_rank_environment(rank, 2, port)
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "run"}
    with (folder / f"{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    module, name = importlib.import_module(function[0]), function[1]
    plain = getattr(module, name)

    def without_store(*arguments: Any, **named: Any) -> Any:
        dist.barrier()
        if rank == 0:
            (folder / "silent").write_text(str(time.monotonic()))
            if store is not None:
                os.kill(store, signal.SIGSTOP)
        dist.barrier()
        if name == "start":
            arguments = (TIMEOUT, *arguments[1:])
        elif name != "run_steps":
            watchdog.set_timeout(TIMEOUT)
        if store is None and rank == 0:
            (folder / "alone").touch()
        elif store is None:
            while not (folder / "alone").exists():  # rank 0 has left the barrier
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGSTOP)
        return plain(*arguments, **named)

    setattr(module, name, without_store)
    sys.exit(main(compose(words)))


def outcome(
    function: tuple[str, str], overrides: list[str], folder: Path, of_store: bool = True
) -> tuple[list[int | None], list[str], float]:
    """(exit codes, lines of errors of both ranks, seconds from the silence to the last exit)."""
    words = [*overrides, *NARROW, f"parallel.timeout_seconds={START}", "train.steps=2"]
    with RanksStore("127.0.0.1") as store:
        connected = dist.TCPStore("127.0.0.1", store.port)  # it imports torch first
        stopped = store.process.pid if of_store else None
        ranks = [
            rank_context().Process(
                target=train_until_silent,
                args=(rank, function, stopped, store.port, folder, words, dict(os.environ)),
            )
            for rank in range(2)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(START + TIMEOUT + AT_MOST)
        ended, codes = time.monotonic(), [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
        del connected
    printed = [line for rank in range(2) for line in (folder / f"{rank}.log").read_text().splitlines()]
    errors = [line for line in printed if "error" in line.lower() or "Traceback" in line]
    return codes, errors, ended - float((folder / "silent").read_text())


@pytest.mark.alone
@pytest.mark.parametrize(
    "function",
    [
        ("parallel.watchdog.watchdog", "start"),
        ("parallel.mesh", "make_topology"),
        ("train.checkpoint.saver", "background_group"),
    ],
    ids=["watchdog", "mesh", "checkpoints"],
)
def test_groups_that_a_silent_store_keeps_waiting_end_the_start(
    function: tuple[str, str], overrides: list[str], tmp_path: Path
) -> None:
    codes, errors, seconds = outcome(function, overrides, tmp_path)
    found = exit_json(tmp_path / "run")
    assert codes == [1, 1] and seconds < TIMEOUT + AT_MOST
    assert (found["code"], found["cause"]) == (1, "store_lost") and "hang" not in found
    assert errors == [f"error: {found['message']}"]


@pytest.mark.alone
def test_a_rank_that_stops_while_groups_are_made_is_named(overrides: list[str], tmp_path: Path) -> None:
    words = [*overrides, "parallel.ep=2"]  # with a second group of all ranks
    codes, errors, seconds = outcome(("parallel.mesh", "make_topology"), words, tmp_path, of_store=False)
    found = exit_json(tmp_path / "run")
    assert codes == [1, -signal.SIGKILL] and seconds < TIMEOUT + AT_MOST
    assert [one["rank"] for one in found["hang"]["ranks"]] == [1] and "process groups of the mesh" in found["message"]
    assert errors == [f"error: {found['message']}"]


@pytest.mark.alone
def test_a_run_with_its_groups_needs_no_store(overrides: list[str], tmp_path: Path) -> None:
    codes, errors, _ = outcome(("train.run", "run_steps"), [*overrides, "checkpoint.asynchronous=false"], tmp_path)
    assert (codes, errors) == ([0, 0], [])
    assert exit_json(tmp_path / "run")["code"] == 0
