"""The nodes of a run as its leader sees them: assignments, reports, and the exit code of one incarnation."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from launch.local import exit_written
from launch.pace import leader_pause
from launch.supervisor.causes import describe
from launch.supervisor.recall import Leader
from longcat.errors import BAD_INPUT, CORRUPT, CRASHED, OK, STOPPED, UNHEALTHY, ConfigError, FolderInUseError
from longcat.json_text import dumps
from train.config import Config
from train.run_dir import claim_exit, forget_exit, lock, recorded_code

POLL_SECONDS = 0.1
GRACE_SECONDS = 8.0  # for ranks to say why they end, once one has failed anywhere
SAVE_SECONDS = 3600.0  # for ranks that end because all have agreed to: they may still save
AGREED = (OK, STOPPED, UNHEALTHY, CORRUPT)


@dataclass(frozen=True)
class Assignment:
    """Which ranks one incarnation has, that is one start of all ranks."""

    incarnation: int
    nodes: tuple[str, ...]  # names, in the order of node ranks
    processes: int  # local ranks of each node
    overrides: tuple[str, ...]

    def to_json(self) -> str:
        return dumps(asdict(self))

    @staticmethod
    def parse(text: str) -> Assignment:
        values = json.loads(text)
        return Assignment(**values | {name: tuple(values[name]) for name in ("nodes", "overrides")})


@dataclass(frozen=True)
class NodeReport:
    """How a node's ranks ended in one incarnation."""

    node: str
    incarnation: int
    codes: dict[int, int]  # global rank → exit code; negative: a signal
    first_failed: int | None  # global rank whose failure this node saw first
    stderr: str  # last lines of that rank
    ended: float  # when its first rank failed, or all had ended; seconds since 1970

    def to_json(self) -> str:
        return dumps(asdict(self))

    @staticmethod
    def parse(text: str) -> NodeReport:
        values = json.loads(text)
        return NodeReport(**values | {"codes": {int(rank): code for rank, code in values["codes"].items()}})


@dataclass(frozen=True)
class NodeState:
    """A member of the job."""

    name: str
    id: int  # Slurm's, or the order of arrival
    seconds_silent: float  # since its node runner's last heartbeat
    spare: bool = False  # has no ranks in this incarnation


class Fleet(Protocol):
    """What starts and ends ranks on all nodes. Every method may raise ConnectionError: the nodes cannot be reached."""

    def nodes(self) -> list[NodeState]:
        """Members by id; those that are silent for longer than `launch.node_timeout` are left out."""

    def start(self, assignment: Assignment) -> None:
        """Start the ranks of an incarnation; its number must be higher than all before."""

    def reports(self, incarnation: int) -> list[NodeReport]:
        """Of the nodes whose ranks have ended so far."""

    def signal(self, number: int) -> None:
        """Send a signal to every rank of the current incarnation, once it has a handler."""

    def stop_ranks(self, incarnation: int, grace_seconds: float) -> None:
        """Kill the incarnation's ranks that still run ``grace_seconds`` from now."""

    def stop_requested(self) -> bool:
        """Whether a stop signal has reached any node; the ranks that run have got it."""


@dataclass(frozen=True)
class Outcome:
    """How one incarnation ended: what nodes reported, and those that were lost before they could."""

    reports: tuple[NodeReport, ...]
    lost: tuple[str, ...]

    @property
    def codes(self) -> dict[int, int]:
        return {rank: code for report in self.reports for rank, code in report.codes.items()}

    @property
    def failed(self) -> dict[int, int]:
        return {rank: code for rank, code in self.codes.items() if code}

    @property
    def message(self) -> str:
        """For an end of which no rank has said why."""
        if self.lost:
            return f"node {', '.join(self.lost)} sent no heartbeat (launch.node_timeout)"
        first = self.first_failure
        return describe({} if first is None else {first: self.codes[first]})

    @property
    def first_failure(self) -> int | None:
        """The rank that failed first: others may have been killed because of it."""
        failed = [report for report in self.reports if report.first_failed is not None]
        return min(failed, key=lambda report: report.ended).first_failed if failed else None


def run_incarnation(fleet: Fleet, assignment: Assignment) -> Outcome:
    """Start the ranks and wait until every node has reported or is lost; a lost node ends the others' ranks."""
    fleet.start(assignment)
    stopping = False
    while True:
        reports = fleet.reports(assignment.incarnation)
        silent = set(assignment.nodes) - {report.node for report in reports}
        lost = silent - {node.name for node in fleet.nodes()} if silent else set()
        if lost and not stopping:
            stopping = True
            fleet.stop_ranks(assignment.incarnation, GRACE_SECONDS)
        if silent == lost:
            return Outcome(tuple(reports), tuple(node for node in assignment.nodes if node in lost))
        time.sleep(leader_pause(POLL_SECONDS, len(assignment.nodes)))


def exit_code(outcome: Outcome, folder: Path, exit_before: tuple[int, int] | None) -> int:
    """Exit.json's code where this incarnation wrote one, else that of the first rank that failed.

    Args:
        exit_before: `exit_written` before the start.
    """
    if not outcome.lost and not outcome.failed:
        return OK
    first = outcome.first_failure
    code = CRASHED if first is None or outcome.codes[first] < 0 else outcome.codes[first]
    # 2: the folder may be another run's
    if code == BAD_INPUT or exit_written(folder) in (None, exit_before):
        return code
    return recorded_code(folder, code) or code  # a rank that has said that all is done may crash while it ends


def grace_seconds(code: int) -> float:
    """How long other ranks may go on after one has ended with this code."""
    return SAVE_SECONDS if code in AGREED else 1.0 if code == BAD_INPUT else GRACE_SECONDS


def decide_end(config: Config, fleet: Fleet, assignment: Assignment, nodes: int, leader: Leader | None = None) -> int:
    """One start, or several with `launch.restarts`; returns the run's exit code."""
    if config.launch.restarts:
        from launch.supervisor.loop import supervise

        seconds = config.launch.join_seconds
        return supervise(config, assignment.overrides, assignment.processes, fleet, nodes, seconds, leader)
    before = exit_written(config.run.folder)
    outcome = run_incarnation(fleet, assignment)
    code = exit_code(outcome, config.run.folder, before)
    if code == CRASHED and exit_written(config.run.folder) in (None, before):
        print(f"error: {outcome.message}", file=sys.stderr, flush=True)
        with suppress(FolderInUseError, ConfigError), lock(config.run.folder):  # else it is another training's
            forget_exit(config.run.folder)
            claim_exit(config.run.folder, CRASHED, outcome.message)
    return code
