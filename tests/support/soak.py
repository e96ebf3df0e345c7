"""A soak: node runners on this machine, and faults of many kinds planted from outside while they train unattended."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from launch.nodes.claims import Claims
from launch.nodes.link import Link
from launch.nodes.rendezvous import find_identity
from tests.support.ports import free_ports
from tests.support.running import ROOT, ranks_below
from train.checkpoint.manifest import list_checkpoints

PLANTED = ROOT / "tests" / "support" / "planted"
PATIENCE = 1200.0  # seconds for anything to happen: the machine may be busy
SLOW_STOPPED, SLOW_RUNNING = 0.25, 0.05  # seconds of a slow rank's cycle


@dataclass(frozen=True)
class Planted:
    """A fault and what followed it."""

    kind: str
    early: bool  # while ranks started
    incarnation: int
    rank: int
    node: str
    step: int  # newest finished step when it was planted
    planted: float  # seconds since 1970
    cause: str  # that the supervisor found
    nodes: tuple[str, ...]  # that it blamed
    ended: float  # when all ranks had ended


class Cluster:
    """Node runners of one run, each a process with a name of its own.

    Args:
        words: of `longcat train`, the same on every node.
        folder: the run's.
        scratch: for logs and for faults that ranks look for.
    """

    def __init__(self, words: Sequence[str], folder: Path, scratch: Path) -> None:
        (self.port,) = free_ports(1)
        self.words = [*words, f"launch.rendezvous=127.0.0.1:{self.port}"]
        self.folder, self.scratch, self.faults = folder, scratch, scratch / "faults"
        self.faults.mkdir(parents=True)
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.dead: set[str] = set()

    def start(self, name: str, **environment: str) -> None:
        """Start a node's runner."""
        own = {"LONGCAT_NODE": name, "PLANTED_FAULTS": str(self.faults), "OMP_NUM_THREADS": "1"}
        own |= {"PYTHONPATH": f"{PLANTED}{os.pathsep}{ROOT}", "GLOO_SOCKET_IFNAME": "lo", **environment}
        with (self.scratch / f"{name}.log").open("wb") as log:
            self.nodes[name] = subprocess.Popen(
                [sys.executable, "-m", "launch", "train", *self.words],
                env={**os.environ, **own},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ranks(self) -> dict[int, tuple[int, str]]:
        """Rank → process id and node."""
        found = {}
        for name, process in self.nodes.items():
            for pid in ranks_below(process.pid):
                with suppress(OSError, StopIteration):
                    words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                    found[next(int(word[5:]) for word in words if word.startswith(b"RANK="))] = pid, name
        return found

    def lose(self, name: str) -> None:
        """A node is gone: its runner, its ranks, and its store if it has one."""
        self.dead.add(name)
        kill_tree(self.nodes[name].pid)

    def store(self) -> psutil.Process:
        """The process in which the nodes meet, on the first of them."""
        found = [each for each in psutil.Process(self.nodes[self.first].pid).children() if is_store(each)]
        assert found, self.log()
        return found[0]

    def wait_for_members(self) -> None:
        """Until all nodes that were started have joined."""
        link = Link("127.0.0.1", self.port, find_identity(self.folder, {}), PATIENCE)
        wanted = self.nodes.keys() - self.dead
        self.wait("all nodes", lambda: wanted <= {name for _, name, _ in link.request(nodes=True)["nodes"]})
        link.close()

    def journal(self) -> list[dict[str, Any]]:
        with suppress(FileNotFoundError):
            return [json.loads(line) for line in (self.folder / "launch.jsonl").read_text().splitlines()]
        return []

    @property
    def first(self) -> str:
        """The node that holds the store and decides."""
        claim = Claims(self.folder).newest()
        assert claim is not None
        return claim.node

    def rows(self) -> set[bytes]:
        """The complete lines of metrics.jsonl."""
        with suppress(FileNotFoundError):
            return set((self.folder / "metrics.jsonl").read_bytes().rpartition(b"\n")[0].splitlines())
        return set()

    def step(self) -> int:
        """The newest finished step."""
        return max((int(json.loads(row)["step"]) for row in self.rows()), default=0)

    def log(self) -> str:
        """The end of the output of the node that decides."""
        claim = Claims(self.folder).newest()
        name = next(iter(self.nodes)) if claim is None else claim.node
        return (self.scratch / f"{name}.log").read_text(errors="replace")[-6000:]

    def wait(self, what: str, is_so: Callable[[], bool], may_end: bool = False) -> None:
        """Wait for an event; fails if a node ends before that was not killed."""
        end = time.monotonic() + PATIENCE
        while not is_so():
            for name, process in self.nodes.items():
                code = process.poll()
                assert may_end or name in self.dead or code is None, f"{name} ended with {code}: {what}\n{self.log()}"
            assert time.monotonic() < end, f"not within {PATIENCE} s: {what}\n{self.log()}"
            time.sleep(0.02)

    def finish(self) -> dict[str, int]:
        """Wait until all nodes have ended; returns the codes of those that were not killed."""
        living = {name: process for name, process in self.nodes.items() if name not in self.dead}
        self.wait("the end of the run", lambda: all(p.poll() is not None for p in living.values()), may_end=True)
        return {name: process.returncode for name, process in living.items()}

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        running = [process for process in self.nodes.values() if process.poll() is None]
        below = [child for process in running for child in psutil.Process(process.pid).children(recursive=True)]
        for process in (*running, *below):
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
        for process in self.nodes.values():
            process.wait()


class Soak:
    """Plants faults one after the other, and notes what the supervisor makes of them."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.cluster, self.chance = cluster, random.Random(seed)
        self.planted: list[Planted] = []

    def plant(self, kind: str) -> Planted:
        """Plant a fault some steps after the newest start, and wait until the run trains again."""
        cluster, steps = self.cluster, self.chance.randint(1, 9)
        early = kind in EARLY and self.chance.random() < 0.3
        cluster.wait("a start", lambda: self.newest("start") > self.newest("end"))
        incarnation, rows = self.newest("start"), cluster.rows()
        is_over = self.ended(incarnation)
        cluster.wait("ranks", lambda: is_over() or len(cluster.ranks()) == 2)
        if early:
            time.sleep(self.chance.uniform(0, 4))
        else:
            cluster.wait("steps", lambda: is_over() or len(cluster.rows() - rows) >= steps)
        ranks = cluster.ranks()
        if is_over() or len(ranks) < 2:  # a node that fails every time was given ranks
            return self.plant(kind)
        rank = self.chance.choice(sorted(ranks))
        if kind == "node lost" and ranks[rank][1] == cluster.first:
            rank = 1 - rank
        pid, node = ranks[rank]
        if kind == "first node lost":
            node = cluster.first
        at, step = time.time(), cluster.step()
        PLANT[kind](self, rank, pid, node, is_over)
        cluster.wait(f"the end of start {incarnation} ({kind}, rank {rank})", is_over)
        end = next(line for line in cluster.journal() if line["event"] == "end" and line["incarnation"] == incarnation)
        found = Planted(kind, early, incarnation, rank, node, step, at, end["cause"], tuple(end["nodes"]), end["time"])
        self.planted.append(found)
        return found

    def newest(self, event: str) -> int:
        return max((line["incarnation"] for line in self.cluster.journal() if line["event"] == event), default=0)

    def sizes(self) -> list[int]:
        """Nodes of each start."""
        return [len(line["on"]) for line in self.cluster.journal() if line["event"] == "start"]

    def ended(self, incarnation: int) -> Callable[[], bool]:
        return lambda: self.newest("end") >= incarnation

    def ask(self, rank: int, kind: str) -> None:
        """Let a rank do something to itself before its next step."""
        partial = self.cluster.faults / "partial"
        partial.write_text(kind)
        partial.rename(self.cluster.faults / f"rank-{rank}")


def kill(soak: Soak, rank: int, pid: int, node: str, is_over: Callable[[], bool]) -> None:
    os.kill(pid, signal.SIGKILL)


def hang(soak: Soak, rank: int, pid: int, node: str, is_over: Callable[[], bool]) -> None:
    os.kill(pid, signal.SIGSTOP)


def not_finite(soak: Soak, rank: int, pid: int, node: str, is_over: Callable[[], bool]) -> None:
    soak.ask(rank, "nan")


def flip_bits(soak: Soak, rank: int, pid: int, node: str, is_over: Callable[[], bool]) -> None:
    soak.ask(rank, soak.chance.choice(["weight", "moment"]))


def corrupt_checkpoint(soak: Soak, rank: int, pid: int, node: str, is_over: Callable[[], bool]) -> None:
    """Other bytes in the newest checkpoint, unseen until a rank is killed."""
    pids = [own for own, _ in soak.cluster.ranks().values()]
    for own in pids:
        os.kill(own, signal.SIGSTOP)
    found = list_checkpoints(soak.cluster.folder / "checkpoints")
    if found:
        shard = soak.chance.choice(sorted(found[-1].glob("*.distcp")))
        shard.write_bytes(shard.read_bytes()[:-8] + b"damaged!")
    os.kill(pid, signal.SIGKILL)
    for own in pids:
        with suppress(ProcessLookupError):
            os.kill(own, signal.SIGCONT)


def fill_disk(soak: Soak, rank: int, pid: int, node: str, is_over: Callable[[], bool]) -> None:
    """Somebody else's file takes all space for some seconds, in which a rank is killed."""
    ballast = soak.cluster.folder.parent / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)
    time.sleep(soak.chance.uniform(0, 2))
    os.kill(pid, signal.SIGKILL)
    threading.Timer(soak.chance.uniform(0, 12), ballast.unlink).start()


def slow_down(soak: Soak, rank: int, pid: int, node: str, is_over: Callable[[], bool]) -> None:
    """A rank that runs a sixth of the time."""
    while not is_over():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(SLOW_STOPPED)
            os.kill(pid, signal.SIGCONT)
        time.sleep(SLOW_RUNNING)


def lose_node(soak: Soak, rank: int, pid: int, node: str, is_over: Callable[[], bool]) -> None:
    soak.cluster.lose(node)


def kill_store(soak: Soak, rank: int, pid: int, node: str, is_over: Callable[[], bool]) -> None:
    soak.cluster.store().kill()


def lose_first_node(soak: Soak, rank: int, pid: int, node: str, is_over: Callable[[], bool]) -> None:
    """The node that decides is gone for good, and the store with it; it need not have ranks."""
    soak.cluster.lose(soak.cluster.first)


def is_store(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return "launch.nodes.store" in process.cmdline()
    return False


def kill_tree(pid: int) -> None:
    """Kill a process and all below it, as if at one moment."""
    everything = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for act in (psutil.Process.suspend, psutil.Process.kill):
        for process in everything:
            with suppress(psutil.NoSuchProcess):
                act(process)


PLANT: dict[str, Callable[[Soak, int, int, str, Callable[[], bool]], None]] = {
    "kill -9": kill,
    "hang": hang,
    "NaN": not_finite,
    "bit flip": flip_bits,
    "corrupt checkpoint": corrupt_checkpoint,
    "disk full": fill_disk,
    "slow rank": slow_down,
    "node lost": lose_node,
    "store killed": kill_store,
    "first node lost": lose_first_node,
}
CAUSES = {  # what the supervisor may take them for
    "kill -9": {"crash"},
    "hang": {"hang"},
    "NaN": {"unhealthy"},
    "bit flip": {"corruption"},
    "corrupt checkpoint": {"crash"},
    "disk full": {"disk_full", "crash"},  # the space may be back before anybody looks
    "slow rank": {"straggler"},
    "node lost": {"node_lost"},
    "store killed": {"store_lost"},
    "first node lost": {"node_lost"},
}
EARLY = ("kill -9", "hang", "node lost")  # may also come while ranks start
TAKES_A_NODE = ("bit flip", "node lost", "first node lost")


def draw(chance: random.Random, count: int, each: int, kinds: Sequence[str]) -> list[str]:
    """So many faults in random order: ``each`` of every kind at least, not more that take a node."""
    rest = [kind for kind in kinds if kind not in TAKES_A_NODE]
    found = [*kinds] * each + chance.choices(rest, k=count - each * len(kinds))
    chance.shuffle(found)
    return found


@contextmanager
def small_disk(path: Path, mebibytes: int) -> Iterator[bool]:
    """A file system of that size at ``path``, where this user may mount one; else a folder, and False."""
    path.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(path)]
    mounted = shutil.which("mount") is not None and not subprocess.run(words, capture_output=True).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(path)], check=True)
