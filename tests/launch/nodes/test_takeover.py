"""The store and the first node are killed: a run with restarts goes on to the state of an undisturbed one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.nodes.claims import Claims
from launch.supervisor.ledger import PARTS
from tests.support.ports import free_ports
from tests.support.running import NARROW, exact, exit_json, finish, lines, node, train_two
from tests.support.soak import kill_tree

STEPS = 60
SUPERVISED = ["launch.restarts=3", "launch.backoff_seconds=0.1", "launch.node_timeout=10", "launch.join_seconds=300"]


def journal(folder: Path) -> list[dict[str, Any]]:
    path = folder / "launch.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def start(words: list[str], names: str) -> dict[str, subprocess.Popen[str]]:
    """Nodes, the first of which has started its store before the others look for it."""
    address = f"launch.rendezvous=127.0.0.1:{free_ports(1)[0]}"
    several = ["launch.nodes=2", address, "run.num_processes=1", "parallel.timeout_seconds=60"]
    nodes = {names[0]: node(names[0], [*words, *several, *SUPERVISED])}
    while not stores(nodes[names[0]]):
        assert nodes[names[0]].poll() is None, finish(nodes[names[0]])
        time.sleep(0.05)
    return nodes | {name: node(name, [*words, *several, *SUPERVISED]) for name in names[1:]}


def stores(runner: subprocess.Popen[str]) -> list[psutil.Process]:
    """The store's process, without its child."""
    try:
        return [each for each in psutil.Process(runner.pid).children() if "launch.nodes.store" in each.cmdline()]
    except psutil.NoSuchProcess:
        return []


def wait_for(nodes: dict[str, subprocess.Popen[str]], folder: Path, starts: int, step: int) -> None:
    """Until so many starts have been made and the last one has finished a step beyond ``step``."""
    end = time.monotonic() + 400
    while time.monotonic() < end:
        begun = [line for line in journal(folder) if line["event"] == "start"]
        if len(begun) >= starts and newest_step(folder) > max(step, begun[-1]["step"]):
            return
        ended = [name for name, each in nodes.items() if each.poll() not in (None, -signal.SIGKILL)]
        assert not ended, {name: finish(nodes[name]) for name in ended}
        time.sleep(0.05)
    raise AssertionError(journal(folder))


def newest_step(folder: Path) -> int:
    """A resume takes lines out of the file, and a line may be half written."""
    with suppress(OSError, ValueError, IndexError):
        return int(lines(folder)[-1]["step"])
    return 0


@pytest.mark.skipif(sys.platform != "linux", reason="ranks end with their parent on Linux")
def test_run_outlives_its_store_and_its_first_node(overrides: list[str], tmp_path: Path) -> None:
    """kill -9 of the store alone; then of everything on the first node, whose place a spare takes."""
    run = [*overrides, *NARROW, f"train.steps={STEPS}", "checkpoint.every=5"]
    folder = tmp_path / "run"
    nodes = start(run, "abc")
    wait_for(nodes, folder, 1, 6)
    stores(nodes["a"])[0].kill()
    wait_for(nodes, folder, 2, 12)
    claim = Claims(folder).newest()
    assert claim is not None and claim.number == 2
    kill_tree(nodes[claim.node].pid)
    ends = {name: finish(process, 400) for name, process in nodes.items()}
    assert [name for name, (code, _) in ends.items() if code] == [claim.node], ends
    found = journal(folder)
    assert [line["incarnation"] for line in found if line["event"] == "start"] == [1, 2, 3], found
    causes = [(line["cause"], line["nodes"]) for line in found if line["event"] == "end"]
    assert causes == [("store_lost", []), ("node_lost", [claim.node]), ("done", [])]
    assert found[-1]["starts"] == 3 and found[-1]["faults"] == 2
    assert sum(found[-1][name] for name in PARTS) == pytest.approx(found[-1]["wall_seconds"])
    assert exit_json(folder)["code"] == 0
    undisturbed = [word for word in run if not word.startswith("run.name")]
    assert train_two([*undisturbed, "run.name=undisturbed"]) == [0]
    assert exact(folder) == exact(tmp_path / "undisturbed")
