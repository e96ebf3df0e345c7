"""Several nodes on one machine: the state of one process tree, one exit code on every node, refusals in one line."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

import launch.nodes.meeting
from launch.__main__ import main
from launch.nodes.link import Link
from launch.nodes.meeting import start_store
from launch.nodes.node import Node
from launch.nodes.rendezvous import RendezvousParameters, expand_hosts, find_identity, find_place
from launch.signals import Signals
from longcat.errors import ConfigError
from tests.support.ports import free_ports
from tests.support.running import NARROW, exact, exit_json, finish, node, ranks_below, train_two, wait_for_step
from train.compose import compose
from train.launch_config import LaunchConfig, split_address

SHORT = [*NARROW, "launch.join_seconds=120", "launch.node_timeout=60", "run.num_processes=1"]

COMPOSING = threading.Lock()  # Hydra composes in one thread at a time


def two_nodes(words: list[str]) -> list[subprocess.Popen[str]]:
    address = f"launch.rendezvous=127.0.0.1:{free_ports(1)[0]}"
    return [node(name, [*words, *SHORT, "launch.nodes=2", address]) for name in ("a", "b")]


def test_two_nodes_have_the_state_of_one(overrides: list[str], tmp_path: Path) -> None:
    nodes = two_nodes([*overrides, "train.steps=6"])
    ends = [finish(process) for process in nodes]
    assert [code for code, _ in ends] == [0, 0], ends
    assert exit_json(tmp_path / "run")["code"] == 0
    assert train_two([*overrides, *NARROW, "train.steps=6", "run.name=alone"]) == [0]
    assert exact(tmp_path / "run") == exact(tmp_path / "alone")


@pytest.mark.skipif(sys.platform != "linux", reason="finds ranks in /proc")
def test_killed_rank_ends_every_node(overrides: list[str], tmp_path: Path) -> None:
    nodes = two_nodes([*overrides, "train.steps=100000"])
    wait_for_step(tmp_path / "run", 3, nodes[0])
    os.kill(ranks_below(nodes[1].pid)[0], signal.SIGKILL)
    ends = [finish(process) for process in nodes]
    assert [code for code, _ in ends] == [1, 1], ends
    assert exit_json(tmp_path / "run")["code"] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="finds ranks in /proc")
def test_repeated_signals_save_once_and_end_in_3(overrides: list[str], tmp_path: Path) -> None:
    """Runner and ranks of one node get TERM again and again, as Slurm sends it; the other node's get nothing."""
    nodes = two_nodes([*overrides, "train.steps=100000"])
    wait_for_step(tmp_path / "run", 3, nodes[0])
    ranks = ranks_below(nodes[0].pid)
    while nodes[0].poll() is None:
        for pid in (nodes[0].pid, *ranks):
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                continue
        time.sleep(0.3)
    ends = [finish(process) for process in nodes]
    assert [code for code, _ in ends] == [3, 3], ends
    assert exit_json(tmp_path / "run")["code"] == 3
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


SLOW_COMMIT = """
import os, time
if "RANK" in os.environ:
    rename = os.rename
    def slowly(source, target, **options):
        if os.path.basename(target).startswith("step-"):
            time.sleep(30)
        rename(source, target, **options)
    os.rename = slowly
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="finds ranks in /proc")
def test_save_of_30_seconds_is_whole_under_signals(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process of both nodes, the store among them, gets TERM again and again; committing takes 30 s."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(SLOW_COMMIT)  # a slow file system
    monkeypatch.setenv("SLOW", str(tmp_path / "slow"))
    nodes = two_nodes([*overrides, "train.steps=100000", "checkpoint.every=0"])
    wait_for_step(tmp_path / "run", 3, nodes[0])
    began = time.monotonic()
    everything = [process for each in nodes for process in (psutil.Process(each.pid), *children(each.pid))]
    while any(each.poll() is None for each in nodes):
        for process in everything:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        time.sleep(0.5)
    assert time.monotonic() - began > 30
    ends = [finish(process) for process in nodes]
    assert [code for code, _ in ends] == [3, 3], ends
    assert exit_json(tmp_path / "run")["code"] == 3
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert main(["checkpoint", "verify", str(checkpoint)]) == 0


def children(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="ranks end with their parent on Linux")
def test_killed_runner_leaves_no_rank(overrides: list[str], tmp_path: Path) -> None:
    nodes = two_nodes([*overrides, "train.steps=100000"])
    wait_for_step(tmp_path / "run", 3, nodes[0])
    orphan = ranks_below(nodes[1].pid)[0]
    environment = Path(f"/proc/{orphan}/environ").read_bytes()
    first = 1 if b"\0RANK=0\0" in environment else 0
    orphan = ranks_below(nodes[1 - first].pid)[0]
    nodes[1 - first].kill()
    code, errors = finish(nodes[first])
    assert code == 1, errors
    nodes[1 - first].communicate()
    assert not Path(f"/proc/{orphan}").exists()


def test_nobody_there(overrides: list[str]) -> None:
    """An address of documentation (RFC 5737), which no machine has."""
    alone = node(
        "a", [*overrides, *SHORT, "launch.nodes=2", "launch.rendezvous=192.0.2.1:29500", "launch.join_seconds=1"]
    )
    code, errors = finish(alone)
    assert (code, errors.count("\n")) == (2, 1), errors
    assert "192.0.2.1:29500" in errors


def join_here(words: list[str], signals: Signals | None = None) -> int:
    """A node runner in this process, for runs that end before ranks start."""
    with COMPOSING:
        config = compose(words)
    place = find_place(config.launch, os.environ)
    assert place is not None
    return Node(words, config, place, 1, signals or Signals()).run()


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.0 400 Bad Request\r\n\r\n", None], ids=["closes", "http", "silent"])
def test_port_of_another_program(answer: bytes | None, overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It may close the connection, answer in its own way, or never; nobody waits for launch.join_seconds."""
    monkeypatch.setattr(launch.nodes.meeting, "SILENT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as other, ExitStack() as kept:

        def serve() -> None:
            while True:
                try:
                    connection = kept.enter_context(other.accept()[0])
                except OSError:
                    return
                if answer is not None:
                    connection.sendall(answer)
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        words = [*overrides, *SHORT, "launch.join_seconds=1000", "launch.nodes=2", f"launch.rendezvous={address}"]
        says = f"nothing answers at {address}" if answer is None else f"another program .* answers at {address}"
        with pytest.raises(ConfigError, match=says):
            join_here(words)
        other.shutdown(socket.SHUT_RDWR)


def test_stop_while_nodes_come_ends_all(overrides: list[str]) -> None:
    """The one that gets no signal, first node or not, hears of it."""
    for stopped in (0, 1):
        words = [*overrides, *SHORT, "launch.nodes=3", f"launch.rendezvous=127.0.0.1:{free_ports(1)[0]}"]
        with ThreadPoolExecutor() as pool:
            signals = [Signals(), Signals()]
            first = pool.submit(join_here, words, signals[0])
            wait_for_store(words[-1])
            second = pool.submit(join_here, words, signals[1])
            wait_for_members(words, 2)
            signals[stopped]._note(signal.SIGTERM, None)
            for future in (first, second):
                with pytest.raises(InterruptedError):
                    future.result()


def test_missing_node(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGCAT_NODE", "a")
    address = f"launch.rendezvous=127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(ConfigError, match=r"1 of launch\.nodes=3 nodes came .*: a; start longcat train on 2 more"):
        join_here([*overrides, *SHORT, "launch.nodes=3", address, "launch.join_seconds=1"])


@pytest.mark.parametrize(
    ("other", "text", "is_met"),
    [
        (["launch.nodes=3"], r"launch\.nodes is [23] on node .* and [23] on node", True),
        (["optim.lr=0.5"], r"optim\.lr is .* on node .* and .* on node", True),
        (["run.name=other"], r"is that of another run: run folder is .*/run there and .*/other here", False),
    ],
)
def test_nodes_that_do_not_agree(other: list[str], text: str, is_met: bool, overrides: list[str]) -> None:
    """Both say which key differs; a run with a folder of its own does not even meet the other."""
    words = [*overrides, *SHORT, "launch.nodes=2", f"launch.rendezvous=127.0.0.1:{free_ports(1)[0]}"]
    if not is_met:
        words.append("launch.join_seconds=5")
    with ThreadPoolExecutor() as pool:
        first = pool.submit(join_here, words)
        wait_for_store(words[len(overrides) + len(SHORT) + 1])
        with pytest.raises(ConfigError, match=text):
            join_here([*words, *other])
        with pytest.raises(ConfigError, match=text if is_met else r"1 of launch\.nodes=2"):
            first.result()


def test_one_node_too_many(overrides: list[str]) -> None:
    """A third node is refused; the two that wait for each other do not notice."""
    words = [*overrides, *SHORT, "launch.nodes=1", f"launch.rendezvous=127.0.0.1:{free_ports(1)[0]}"]
    config = compose(words)
    place = RendezvousParameters(1, "a", "127.0.0.1", split_address(config.launch.rendezvous)[1], None)
    identity = find_identity(config.run.folder, {})
    store = start_store(place.port, 60, identity)
    assert store is not None
    link = Link(place.host, place.port, identity, 10)
    try:
        assert link.request(join={"token": "x", "name": "a", "wanted": 0})["id"] == 0
        with pytest.raises(ConfigError, match=r"launch\.nodes=1 nodes have joined .* already"):
            Node(words, config, place, 1, Signals()).run()
        assert [number for number, _, _ in link.request(nodes=True)["nodes"]] == [0]
    finally:
        link.close()
        store.kill()
        store.wait()


def wait_for_members(words: list[str], count: int) -> None:
    with COMPOSING:
        config = compose(words)
    link = Link(*split_address(config.launch.rendezvous), find_identity(config.run.folder, os.environ), 60)
    end = time.monotonic() + 120
    while len(link.request(nodes=True)["nodes"]) < count:
        assert time.monotonic() < end
        time.sleep(0.05)
    link.close()


def wait_for_store(address: str) -> None:
    host, _, port = address.partition("=")[2].partition(":")
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            socket.create_connection((host, int(port)), 5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"no store at {address}")


def test_slurm_environment() -> None:
    slurm = {
        "SLURM_NODEID": "1",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": "n[01-02]",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "3",
        "SLURMD_NODENAME": "n02",
    }
    place = find_place(LaunchConfig(), slurm)
    assert place is not None
    assert (place.nodes, place.host, place.port, place.id, place.name) == (2, "n01", 20451, 1, "n02")
    again = find_place(LaunchConfig(nodes=2), {**slurm, "SLURM_RESTART_COUNT": "1"})
    assert again is not None
    assert again.port != place.port
    assert find_identity(Path("run"), slurm) != find_identity(Path("run"), {**slurm, "SLURM_STEP_ID": "4"})
    with pytest.raises(ConfigError, match=r"launch\.nodes=3 and this Slurm step runs on 2"):
        find_place(LaunchConfig(nodes=3), slurm)
    with pytest.raises(ConfigError, match=r"4 tasks on 2 nodes"):
        find_place(LaunchConfig(), {**slurm, "SLURM_STEP_NUM_TASKS": "4"})


def test_one_machine_without_slurm() -> None:
    assert find_place(LaunchConfig(), {}) is None
    assert find_place(LaunchConfig(), {"SLURM_NODEID": "0", "SLURM_STEP_NUM_NODES": "1"}) is None
    with pytest.raises(ConfigError, match=r"needs launch\.rendezvous"):
        find_place(LaunchConfig(nodes=2), {})
    alone = LaunchConfig(rendezvous="a:29500")  # each node trained by itself, into one run folder
    with pytest.raises(ConfigError, match=r"launch\.rendezvous=a:29500 is for several nodes; .* launch\.nodes=N"):
        find_place(alone, {})
    assert find_place(LaunchConfig(nodes=1, rendezvous="a:29500"), {}) is None
    assert find_place(alone, {"SLURM_NODEID": "0", "SLURM_STEP_NUM_NODES": "1"}) is None


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("a[08-10,7]-ib,b2", ["a08-ib", "a09-ib", "a10-ib", "a7-ib", "b2"]),
        ("n3", ["n3"]),
        ("n1,n2", ["n1", "n2"]),
        ("r[2-3]n[5,7]", ["r2n5", "r2n7", "r3n5", "r3n7"]),
        ("", []),
    ],
)
def test_expand_hosts(nodes: str, names: list[str]) -> None:
    assert expand_hosts(nodes) == names
