"""The leader of a run: it starts the ranks on all nodes, once or again and again, and decides on the exit code."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launch.fleet import GRACE_SECONDS, Assignment, Fleet, NodeReport
from launch.pace import leader_pause
from launch.supervisor.causes import describe
from launch.supervisor.recall import Leader
from longcat.errors import BAD_INPUT, CRASHED, OK, ConfigError, FolderInUseError
from train.config import Config
from train.run_dir.exit_file import claim_exit, exit_written, forget_exit, recorded_code
from train.run_dir.folder import lock

POLL_SECONDS = 0.1


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
