"""The node runner: `longcat train` on one of several nodes joins the run, starts its ranks and ends as the run ends."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from contextlib import suppress
from types import FrameType
from typing import Any

from launch.fleet import (
    GRACE_SECONDS,
    Assignment,
    Fleet,
    NodeReport,
    exit_code,
    grace_seconds,
    run_incarnation,
)
from launch.link import (
    ASSIGNMENT,
    END,
    STOP,
    StoreFleet,
    StoreLostError,
    meet,
    start_store,
)
from launch.local import exit_written, found_by_children
from launch.ranks import LocalRanks
from launch.rendezvous import Place, find_identity
from launch.store import RANKS_PORT
from longcat.errors import CRASHED, STOPPED, ConfigError, LongCatError
from longcat.json_text import dumps
from train.checkpoint.compatibility import flatten
from train.config import Config
from train.run_dir import as_mapping, claim_exit, recorded_code
from train.stop import SAVE_SIGNAL, STOP_SIGNALS, is_ignored

POLL_SECONDS = 0.05
LOOK_SECONDS = 0.5  # between signs of life
LEAVE_SECONDS = 5.0
PORT_SECONDS = 0.1  # between looks for the port of the ranks' store
CONFIGURATION, AGREED, LEADER = "job/configuration", "job/agreed/", "job/leader"
BEFORE_RANKS = "stopped before the ranks started; nothing was trained"


def run_node(overrides: list[str], config: Config, place: Place, processes: int) -> int:
    """Train with this node's share of the ranks; returns the run's exit code, the same on every node."""
    from train.check import check

    os.environ["LOCAL_WORLD_SIZE"] = str(processes)  # for the check of this machine's memory
    check(config, processes * place.nodes)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    with Signals() as signals, found_by_children():
        try:
            return Node(overrides, config, place, processes, signals).run()
        except InterruptedError:
            print(BEFORE_RANKS, file=sys.stderr)
            return STOPPED


class Signals:
    """The first stop signal and each request to save, until the ranks get them; later stop signals are ignored."""

    def __init__(self) -> None:
        self.stop: signal.Signals | None = None
        self.waiting: list[signal.Signals] = []

    def __enter__(self) -> Signals:
        numbers = [number for number in STOP_SIGNALS if number != signal.SIGHUP or not is_ignored(number)]
        self.before = {number: signal.signal(number, self._note) for number in (*numbers, SAVE_SIGNAL)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():  # more signals must not change the exit code while the process ends
            signal.signal(number, handler if self.stop is None else signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == SAVE_SIGNAL:
            self.waiting.append(SAVE_SIGNAL)
        elif self.stop is None:
            self.stop = signal.Signals(number)
            self.waiting.append(self.stop)

    def is_stopped(self) -> bool:
        return self.stop is not None

    def take(self) -> list[signal.Signals]:
        waiting, self.waiting = self.waiting, []
        return waiting


class Node:
    """This node's part in the run: it does what assignments say, and on the first node a thread decides on them."""

    def __init__(self, overrides: list[str], config: Config, place: Place, processes: int, signals: Signals) -> None:
        self.overrides, self.config, self.place, self.processes = tuple(overrides), config, place, processes
        self.signals, self.settings = signals, config.launch
        self.identity = find_identity(config.run.folder, os.environ)
        self.exit_before = exit_written(config.run.folder)
        self.incarnation = 0
        self.control: dict[str, float] = {}  # requests to end ranks → when they are due

    def run(self) -> int:
        """Join, train, and end with the run's exit code."""
        deadline, timeout = time.monotonic() + self.settings.join_seconds, self.settings.node_timeout
        server = start_store(self.place.port, 2 * timeout, self.identity) if self.place.may_be_first else None
        try:
            self.link = meet(self.place, self.identity, deadline, timeout, self.signals.is_stopped)
            names = self.join(server is not None, deadline)
            if server is not None:
                self.link.set(LEADER, str(self.id))
                first = Assignment(1, tuple(names[: self.place.nodes]), self.processes, self.overrides)
                threading.Thread(target=self.decide, args=[first], daemon=True, name="decide").start()
            code = self.follow()
            with suppress(StoreLostError):
                self.leave(server is not None)
            return code
        except StoreLostError as error:
            return self.end_alone(str(error))
        finally:
            if server is not None:
                server.kill()
                server.wait()

    def join(self, is_first: bool, deadline: float) -> list[str]:
        """Wait for all nodes; returns their names in the order of node ranks.

        Raises:
            ConfigError: one is missing, there are too many, or they were not started alike.
        """
        wanted = 0 if is_first else self.place.id
        token, nodes = uuid.uuid4().hex, self.place.nodes
        self.id = self.link.request(join={"token": token, "name": self.place.name, "wanted": wanted})["id"]
        if self.id >= nodes and not self.settings.restarts:
            self.link.request(leave=self.id)
            raise ConfigError(
                f"launch.nodes={nodes} nodes have joined the run at {self.link.address} already; raise launch.nodes on "
                f"all of them, or do not start it here (a run that has just been killed is gone in a minute)"
            )
        self.check_agreement()
        while True:
            answer = self.look()
            self.name = next(name for number, name, _ in answer["nodes"] if number == self.id)
            names = [name for number, name, _ in answer["nodes"] if f"{AGREED}{number}" in answer["values"]]
            if END in answer["values"]:
                raise ConfigError(json.loads(answer["values"][END])["message"])
            if len(names) >= nodes or ASSIGNMENT in answer["values"]:
                return names
            if self.signals.is_stopped():
                self.link.request(leave=self.id)
                raise InterruptedError
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{len(names)} of launch.nodes={nodes} nodes came to {self.link.address} within "
                    f"{self.settings.join_seconds:g} s (launch.join_seconds): {', '.join(names)}; "
                    f"start longcat train on {self.missing(names)} as well"
                )
            time.sleep(0.1)

    def missing(self, names: list[str]) -> str:
        """The hosts that did not come, where Slurm tells all, else how many."""
        missing = [host for host in self.place.hosts if host not in names]
        return ", ".join(missing) or f"{self.place.nodes - len(names)} more"

    def check_agreement(self) -> None:
        """Compare this node's configuration with that of the first to come.

        Raises:
            ConfigError: with a key that differs; before ranks have started, on every node.
        """
        ours: dict[str, Any] = flatten(as_mapping(self.config))
        ours |= {"launch.nodes": self.place.nodes, "run.num_processes": self.processes}
        text = dumps({"node": self.place.name, "keys": ours}, default=str)
        answer = self.link.request(claim={CONFIGURATION: text}, read=["job/"])["values"]
        first, here = json.loads(answer[CONFIGURATION]), json.loads(text)["keys"]
        theirs = first["keys"]
        for key in sorted(here.keys() | theirs.keys()):
            if here.get(key) != theirs.get(key):
                message = (
                    f"{key} is {theirs.get(key)} on node {first['node']} and {here.get(key)} on node "
                    f"{self.place.name}; start longcat train with the same words and files on every node"
                )
                if ASSIGNMENT not in answer:
                    self.link.request(claim={END: dumps({"code": ConfigError.exit_code, "message": message})})
                self.link.request(leave=self.id)
                raise ConfigError(message)
        self.link.set(f"{AGREED}{self.id}", self.place.name)

    def decide(self, first: Assignment) -> None:
        """In a thread of the first node: decide on starts, and at last on how all nodes end."""
        link = self.link
        try:
            end = {"code": decide_end(self.config, StoreFleet(link, self.settings.node_timeout), first)}
        except StoreLostError:
            return  # this node's main thread notices, too
        except LongCatError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            end = {"code": error.exit_code}
        except BaseException:
            traceback.print_exc()
            end = {"code": CRASHED}
        with suppress(StoreLostError):
            link.request(claim={END: dumps({"message": "", **end})})

    def follow(self) -> int:
        """Do what each assignment says until the run ends; returns its exit code.

        Raises:
            StoreLostError: the store, or the first node, is lost.
        """
        while True:
            values = self.look()["values"]
            if END in values:
                return int(json.loads(values[END])["code"])
            assignment = Assignment.parse(values[ASSIGNMENT]) if ASSIGNMENT in values else None
            if assignment is not None and assignment.incarnation > self.incarnation:
                self.incarnation, self.exit_before = assignment.incarnation, exit_written(self.config.run.folder)
                if self.name in assignment.nodes:
                    self.train(assignment)
                    continue
            for number in self.signals.take():
                self.pass_to_others(number)
            time.sleep(POLL_SECONDS if self.incarnation == 0 else LOOK_SECONDS)

    def look(self) -> dict[str, Any]:
        """Give a sign of life; read what is asked of this node, and who lives.

        Raises:
            StoreLostError: the store, or the first node, is lost.
        """
        answer = self.link.request(beat=self.id, nodes=True, read=["job/", f"{self.incarnation}/control/"])
        leader = answer["values"].get(LEADER)
        living = {number for number, _, silent in answer["nodes"] if silent <= self.settings.node_timeout}
        if leader is not None and int(leader) not in living and END not in answer["values"]:
            raise StoreLostError(
                f"the first node gave no sign of life for {self.settings.node_timeout:g} s (launch.node_timeout)"
            )
        return answer

    def pass_to_others(self, number: signal.Signals) -> None:
        """A signal to a node that has no ranks is meant for the run."""
        StoreFleet(self.link, self.settings.node_timeout).signal(number)
        if number != SAVE_SIGNAL:
            self.link.set(STOP, number.name)

    def train(self, assignment: Assignment) -> None:
        """Start this node's ranks, wait for their end, and report it."""
        place, port = assignment.nodes.index(self.name), self.ranks_port()
        if port is None:
            return
        ranks = LocalRanks(
            assignment.overrides, place * assignment.processes, assignment.processes, self.environment(assignment, port)
        )
        lost: StoreLostError | None = None
        try:
            lost = self.wait(ranks)
        finally:
            ranks.kill()
        if lost is not None:
            raise lost
        last, ended = ranks.last_lines(ranks.first_failed), ranks.failed_at or time.time()
        report = NodeReport(self.name, assignment.incarnation, ranks.codes, ranks.first_failed, last, ended)
        self.link.set(f"{assignment.incarnation}/report/{self.id}", report.to_json())

    def ranks_port(self) -> int | None:
        """Port of the ranks' TCPStore on the store's host; None if the run ends first.

        That store imports torch, which may take longer than a node may be silent.
        """
        while True:
            values = self.look()["values"]
            if END in values:
                return None
            if RANKS_PORT in values:
                return int(values[RANKS_PORT])
            time.sleep(PORT_SECONDS)

    def environment(self, assignment: Assignment, port: int) -> dict[str, str]:
        """What torch.distributed reads. Its keys and those of the watchdog get the incarnation as a prefix."""
        return {
            "MASTER_ADDR": self.link.host,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": str(True),
            "TORCHELASTIC_RESTART_COUNT": str(assignment.incarnation),
            "TORCHELASTIC_RUN_ID": hashlib.sha256(dumps(self.identity).encode()).hexdigest()[:16],
            "WORLD_SIZE": str(assignment.processes * len(assignment.nodes)),
            "LOCAL_WORLD_SIZE": str(assignment.processes),
            "GROUP_RANK": str(assignment.nodes.index(self.name)),
            "GROUP_WORLD_SIZE": str(len(assignment.nodes)),
        }

    def wait(self, ranks: LocalRanks) -> StoreLostError | None:
        """Until all local ranks have ended; ends them a while after a failure anywhere, or without a store."""
        fleet, asked, kill_at, lost = StoreFleet(self.link, self.settings.node_timeout), set[str](), float("inf"), None
        looked, published, noted_stop = 0.0, float("inf"), False
        while not ranks.poll():
            now = time.monotonic()
            for number in self.signals.take():
                ranks.signal(number)
                if number != SAVE_SIGNAL:
                    asked.add(STOP)
            if now > kill_at:
                ranks.kill()
            grace = min((grace_seconds(code) for code in ranks.codes.values() if code), default=float("inf"))
            if lost is None and (now - looked > LOOK_SECONDS or grace < published):
                looked = now
                try:
                    if grace < published:
                        published = grace
                        fleet.stop_ranks(self.incarnation, grace)
                    if self.signals.is_stopped() and not noted_stop:
                        noted_stop = True
                        self.link.set(STOP, "stop")
                    kill_at = min(kill_at, self.obey(ranks, self.look()["values"], asked))
                except StoreLostError as error:
                    lost, kill_at = error, min(kill_at, now + GRACE_SECONDS)
            time.sleep(POLL_SECONDS)
        return lost

    def obey(self, ranks: LocalRanks, values: dict[str, str], asked: set[str]) -> float:
        """Carry out new requests of the first node; returns when ranks that still run must be killed."""
        kill_at, own = float("inf"), f"{self.incarnation}/control/"
        for key in values.keys() - asked:
            asked.add(key)
            if key.startswith(f"{own}signal/"):
                ranks.signal(signal.Signals(int(values[key])))
            elif key == STOP:  # a node was told before it had ranks, and these were not there to hear it
                ranks.signal(signal.SIGTERM)
            elif key.startswith(f"{own}stop/"):
                kill_at = min(kill_at, time.monotonic() + float(values[key]))
        return kill_at

    def end_alone(self, reason: str) -> int:
        """The exit code where the nodes cannot agree on one any more."""
        folder = self.config.run.folder
        if exit_written(folder) not in (None, self.exit_before):
            return recorded_code(folder)
        if claim_exit(folder, CRASHED, reason):
            print(f"error: {reason}", file=sys.stderr, flush=True)
        return CRASHED

    def leave(self, is_first: bool) -> None:
        """Say goodbye; the first node, whose store ends next, waits for the others'."""
        self.link.request(leave=self.id)
        end = time.monotonic() + LEAVE_SECONDS
        while is_first and time.monotonic() < end:
            if all(silent > LEAVE_SECONDS for _, _, silent in self.link.request(nodes=True)["nodes"]):
                return
            time.sleep(POLL_SECONDS)


def decide_end(config: Config, fleet: Fleet, assignment: Assignment) -> int:
    """One start, or several with `launch.restarts`; returns the run's exit code."""
    if config.launch.restarts:
        from launch.supervisor.loop import supervise

        nodes, seconds = len(assignment.nodes), config.launch.join_seconds
        return supervise(config, assignment.overrides, assignment.processes, fleet, nodes, seconds)
    before = exit_written(config.run.folder)
    outcome = run_incarnation(fleet, assignment)
    code = exit_code(outcome, config.run.folder, before)
    if code == CRASHED and claim_exit(config.run.folder, CRASHED, outcome.message):
        print(f"error: {outcome.message}", file=sys.stderr, flush=True)
    return code
