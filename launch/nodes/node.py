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
from contextlib import suppress
from typing import Any

from launch.fleet import Assignment, NodeReport
from launch.leader import decide_end
from launch.nodes.claims import ClaimError
from launch.nodes.link import (
    ASSIGNMENT,
    END,
    INCARNATION,
    STOP,
    Link,
    StoreFleet,
    StoreLostError,
)
from launch.nodes.member import BEFORE_RANKS, POLL_SECONDS, Member
from launch.nodes.rendezvous import RendezvousParameters
from launch.nodes.store import RANKS_PORT
from launch.ranks import LocalRanks
from launch.signals import Signals
from launch.supervisor.recall import Earlier, Leader
from longcat.errors import CRASHED, STOPPED, ConfigError, LongCatError
from longcat.json_text import dumps
from train.config import Config
from train.loggers.jsonl import METRICS
from train.process.search_path import found_by_children
from train.process.stop import SAVE_SIGNAL
from train.run_dir.exit_file import claim_exit, exit_written, recorded_code

LOOK_SECONDS = 0.5  # between heartbeats of few nodes (launch/pace.py)
LOST_SECONDS = 2.0  # for ranks to end by themselves when the store, and theirs with it, is lost
PORT_SECONDS = 0.1  # between looks for the port of the ranks' store


def run_node(overrides: list[str], config: Config, place: RendezvousParameters, processes: int) -> int:
    """Train with this node's share of the ranks; returns the run's exit code, the same on every node."""
    from train.check import check

    os.environ["LOCAL_WORLD_SIZE"] = str(processes)  # for the check of this machine's memory
    check(config, processes * place.nodes)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    with Signals(ends_process=True) as signals, found_by_children():
        try:
            return Node(overrides, config, place, processes, signals).run()
        except InterruptedError:
            print(BEFORE_RANKS, file=sys.stderr)
            return STOPPED


class Node(Member):
    """This node's part in the run: it does what assignments say, and on the first node a thread decides on them."""

    def __init__(
        self, overrides: list[str], config: Config, place: RendezvousParameters, processes: int, signals: Signals
    ) -> None:
        super().__init__(config, place, processes, signals)
        self.overrides = tuple(overrides)
        self.exit_before = exit_written(config.run.folder)
        self.decider: threading.Thread | None = None
        self.metrics_size, self.fruitless = -1, 0
        self.unreported: NodeReport | None = None  # of ranks that ended when the way to the store was lost

    def run(self) -> int:
        """Join, train, and end with the run's exit code."""
        expected = self.place.nodes
        try:
            self.deadline = time.monotonic() + self.settings.join_seconds
            self.meeting.begin(self.deadline)
            while True:
                try:
                    return self.take_part(expected)
                except StoreLostError as error:
                    if not self.settings.restarts:
                        raise
                    was_first = self.meeting.is_first
                    code = self.meet_again(error)
                if code is not None:
                    return code
                expected = max(self.members - (self.meeting.is_first and not was_first), 1)
        except StoreLostError as error:
            return self.end_alone(str(error))
        finally:
            self.meeting.close()

    def take_part(self, expected: int) -> int:
        """Join and follow; on the first node, decide once ``expected`` nodes are there. Returns the run's exit code.

        Raises:
            StoreLostError: the store, or the first node, is lost.
        """
        self.join()
        if self.unreported is not None:  # the first node may still wait for it
            self.report(self.unreported)
        if self.meeting.is_first:
            names = self.wait_for_nodes(expected)
            arguments = (self.link, names[: self.place.nodes])
            self.decider = threading.Thread(target=self.decide, args=arguments, daemon=True, name="decide")
            self.decider.start()
        code = self.follow()
        with suppress(StoreLostError):
            self.leave(self.meeting.is_first)
        return code

    def meet_again(self, error: StoreLostError) -> int | None:
        """With `launch.restarts`, after the loss of the store or of the first node; this node's ranks have ended.

        Returns:
            The run's exit code if it has ended.

        Raises:
            StoreLostError: so many losses in a row without a new step are too many.
        """
        try:
            size = (self.config.run.folder / METRICS).stat().st_size
        except OSError:  # before the first step there is none
            size = max(self.metrics_size, 0)
        self.fruitless = self.fruitless + 1 if size == self.metrics_size else 0
        self.metrics_size = size
        if self.fruitless > self.settings.restarts:
            raise error
        print(f"launch: {self.name}: {error}; the nodes meet again", file=sys.stderr, flush=True)
        turn = 0 if self.meeting.is_first else 1 + (self.id or 0)
        self.deadline = time.monotonic() + self.settings.join_seconds
        self.earlier = Earlier(self.first_name)
        self.link.end()
        if self.decider is not None:
            self.decider.join()  # it must not write into the run folder beside another's
            self.decider = None
        before = self.link.store
        code = self.meeting.again(turn, self.deadline)
        if code is None and self.link.store != before:
            self.incarnation, self.unreported = 0, None
        return code

    def decide(self, link: Link, nodes: list[str]) -> None:
        """In a thread of the first node: decide on starts, and at last on how all nodes end."""
        first = Assignment(1, tuple(nodes), self.processes, self.overrides)
        fleet = StoreFleet(link, self.settings.node_timeout, self.meeting.check_before_start)
        leader = Leader(self.meeting.number, self.meeting.check, self.command, self.earlier)
        try:
            end = {"code": decide_end(self.config, fleet, first, self.place.nodes, leader)}
        except StoreLostError:
            return  # this node's main thread notices, too
        except LongCatError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            end = {"code": error.exit_code}
        except BaseException:
            traceback.print_exc()
            end = {"code": CRASHED}
        try:
            if not self.meeting.end(end["code"]):
                return
        except ClaimError as error:  # the others still learn the end from the store
            print(f"launch: {error}", file=sys.stderr, flush=True)
        with suppress(StoreLostError):
            link.request(claim={END: dumps({"message": "", **end})})

    def follow(self) -> int:
        """Do what each assignment says until the run ends; returns its exit code.

        Raises:
            StoreLostError: the store, or the first node, is lost.
            ConfigError, InterruptedError: the run ends before ranks have started.
        """
        while True:
            decides = self.decider is None or self.decider.is_alive()  # before the look: it publishes the end last
            values = self.look()
            if END in values:
                return self.end_as_all(json.loads(values[END]))
            if not decides and self.settings.restarts:
                raise StoreLostError("this node, the first one, could not go on deciding")
            if int(values.get(INCARNATION, "0")) > self.incarnation:
                assignment = Assignment.parse(self.link.read(ASSIGNMENT)[ASSIGNMENT])
                self.incarnation, self.exit_before = assignment.incarnation, exit_written(self.config.run.folder)
                if self.name in assignment.nodes:
                    self.train(assignment)
                    continue
            while self.signals.waiting:  # a signal that could not be passed on waits for the next store
                self.pass_to_others(self.signals.waiting[0])
                self.signals.waiting.pop(0)
            time.sleep(self.pause(POLL_SECONDS if self.incarnation == 0 else LOOK_SECONDS))

    def end_as_all(self, end: dict[str, Any]) -> int:
        """The exit code. A message comes where nodes end before ranks have started."""
        if end["message"]:
            with suppress(StoreLostError):
                self.leave(False)
            raise InterruptedError if end["code"] == STOPPED else ConfigError(end["message"])
        return int(end["code"])

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
        last, ended = ranks.last_lines(ranks.first_failed), ranks.failed_at or time.time()
        self.unreported = NodeReport(self.name, assignment.incarnation, ranks.codes, ranks.first_failed, last, ended)
        if lost is not None:
            raise lost
        self.report(self.unreported)

    def report(self, report: NodeReport) -> None:
        self.link.set(f"{report.incarnation}/report/{self.id}", report.to_json())
        self.unreported = None

    def ranks_port(self) -> int | None:
        """Port of the ranks' TCPStore on the store's host; None if the run ends first.

        That store imports torch, which may take longer than a node may be silent.
        """
        while True:
            values = self.look()
            if END in values:
                return None
            if RANKS_PORT in values:
                return int(values[RANKS_PORT])
            time.sleep(self.pause(PORT_SECONDS))

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
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),  # as torchrun
            "GROUP_RANK": str(assignment.nodes.index(self.name)),
            "GROUP_WORLD_SIZE": str(len(assignment.nodes)),
        }

    def wait(self, ranks: LocalRanks) -> StoreLostError | None:
        """Until all local ranks have ended; ends them a while after a failure anywhere, or without a store."""
        fleet, asked = StoreFleet(self.link, self.settings.node_timeout), set[str]()
        looked, published, noted_stop, lost = 0.0, float("inf"), False, None
        while not ranks.poll():
            now = time.monotonic()
            for number in self.signals.take():
                ranks.signal(number)
                if number != SAVE_SIGNAL:
                    asked.add(STOP)
            grace = ranks.grace_seconds
            if lost is None and (now - looked > self.pause(LOOK_SECONDS) or grace < published):
                looked = now
                try:
                    if grace < published:
                        published = grace
                        fleet.stop_ranks(self.incarnation, grace)
                    if self.signals.is_stopped() and not noted_stop:
                        noted_stop = True
                        self.link.set(STOP, "stop")
                    self.obey(ranks, self.look(), asked)
                except StoreLostError as error:
                    lost = error
                    ranks.end_within(LOST_SECONDS)
            time.sleep(POLL_SECONDS)
        return lost

    def obey(self, ranks: LocalRanks, values: dict[str, str], asked: set[str]) -> None:
        """Carry out new requests of the first node."""
        own = f"{self.incarnation}/control/"
        for key in values.keys() - asked:
            asked.add(key)
            if key.startswith(f"{own}signal/"):
                ranks.signal(signal.Signals(int(values[key])))
            elif key == STOP:  # a node was told before it had ranks, and these were not there to hear it
                ranks.signal(signal.SIGTERM)
            elif key.startswith(f"{own}stop/"):
                ranks.end_within(float(values[key]))

    def end_alone(self, reason: str) -> int:
        """The exit code where the nodes cannot agree on one any more."""
        folder = self.config.run.folder
        if self.meeting.is_others():
            print(f"error: {reason}; the run goes on without this node", file=sys.stderr, flush=True)
            return CRASHED
        if exit_written(folder) not in (None, self.exit_before):
            return recorded_code(folder)
        if claim_exit(folder, CRASHED, reason):
            print(f"error: {reason}", file=sys.stderr, flush=True)
        return CRASHED
