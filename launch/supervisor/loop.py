"""Starts the ranks again until the run is done or a person is needed; journal, ledger and page in the run folder."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.fleet import AGREED, GRACE_SECONDS, SAVE_SECONDS, Assignment, Fleet, NodeReport
from launch.pace import leader_pause
from launch.supervisor import ledger
from launch.supervisor.causes import Cause, Fault, find_fault
from launch.supervisor.decide import Again, End, Policy, Wait, decide
from launch.supervisor.journal import Journal
from launch.supervisor.layouts import layouts
from launch.supervisor.ledger import Life
from launch.supervisor.node_choice import Choice, Start
from launch.supervisor.page import page
from launch.supervisor.progress import RunProgress
from launch.supervisor.prometheus import serving
from launch.supervisor.recall import Leader, Unfinished, lost_first_node, recall, thinned
from longcat.errors import CRASHED, OK, STOPPED, ConfigError, FolderInUseError
from train.checkpoint.find import is_inside
from train.checkpoint.manifest import step_of
from train.compose import quoted
from train.config import Config
from train.launch_config import GAVE_UP, JOURNAL, OnStraggler, OnUnhealthy
from train.report import write_report
from train.run_dir.exit_file import claim_exit, exit_written, forget_exit
from train.run_dir.files import remove_quietly
from train.run_dir.folder import lock

STOPPED_BETWEEN = "stopped while no ranks trained; the same command resumes from the last checkpoint"
NO_SPACE = "no space is left in the run folder's file system, so no rank could write why it ended"
IN_USE = "the run folder is in use by ranks of another start or training"
REPORT = "report.html"
POLL_SECONDS = 0.05
MESSAGE_CHARACTERS = 240


def supervise(
    config: Config,
    overrides: Sequence[str],
    processes: int,
    fleet: Fleet,
    nodes: int = 1,
    wait_seconds: float = 0.0,
    leader: Leader | None = None,
) -> int:
    """Start ranks on ``nodes`` nodes of the fleet until they succeed or `decide` ends the run; returns the exit code.

    Args:
        overrides: the configuration of the ranks.
        processes: ranks of each node.
        wait_seconds: how long to wait for nodes where too few can be used.
        leader: this node's part as the first of several.
    """
    progress = RunProgress(config.run.folder / "metrics.jsonl")
    supervisor = Supervisor(config, overrides, processes, fleet, nodes, progress, leader)
    with serving(config.launch.metrics_port, supervisor.gauges), progress:
        return supervisor.run(wait_seconds)


class Supervisor:
    """The history of one command's starts, and the wall time of a run that commands before it have not ended.

    Args:
        progress: watches the run's metrics.jsonl.
        leader: this node's part as the first of several.
    """

    def __init__(
        self,
        config: Config,
        overrides: Sequence[str],
        processes: int,
        fleet: Fleet,
        nodes: int,
        progress: RunProgress,
        leader: Leader | None = None,
    ) -> None:
        self.config, self.overrides, self.processes, self.fleet = config, tuple(overrides), processes, fleet
        self.nodes, self.progress, self.folder = nodes, progress, config.run.folder
        self.leader, self.claim = leader, leader.claim if leader is not None else 0
        self.command = leader.command if leader is not None else uuid.uuid4().hex
        self.journal = Journal(self.folder, self.say, *([leader.check] if leader is not None else []))
        self.layouts = layouts(config, nodes, processes)
        self.policy = policy_of(config, tuple(self.layouts), self.journal, self.command)
        self.earlier: list[Start] = []  # of commands before this one
        self.history: list[Start] = []
        self.lives: list[Life] = []  # of both
        self.members: list[str] = []

    def recall(self) -> list[Unfinished]:
        """Go on with the ledger of a run that has not ended; returns the starts whose end is to be noted."""
        members = [node.name for node in self.fleet.nodes()]
        lost = lost_first_node(self.leader.earlier if self.leader is not None else None, members)
        found = recall(self.folder / JOURNAL, self.command, lost, self.progress.path, self.say)
        self.earlier, self.history, self.lives = found.earlier, found.own, found.lives
        return found.unfinished

    def run(self, wait_seconds: float = 0.0) -> int:
        """Start, decide, wait, until the end.

        Raises:
            FolderInUseError: another training has the run folder; nothing in it has changed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.recall()
        if not self.history:
            with lock(self.folder):
                remove_quietly(self.folder / GAVE_UP)
        for each in unfinished:
            self.record_end(each.line, each.start, each.life)
        while True:
            decision = self.decide()
            if isinstance(decision, Again) and self.history:
                self.announce(decision)
                self.pause(decision.pause_seconds)
                decision = self.decide()  # nodes may have come or gone
            if isinstance(decision, Wait):
                decision = self.wait_for_nodes(decision, wait_seconds)
            if self.is_stopped() and not isinstance(decision, End):
                forget_exit(self.folder)
                claim_exit(self.folder, STOPPED, STOPPED_BETWEEN)
                self.say(STOPPED_BETWEEN)
                return self.finish(End(STOPPED, STOPPED_BETWEEN))
            if isinstance(decision, End):
                return self.finish(decision)
            assert isinstance(decision, Again)
            self.run_once(decision)

    @property
    def own_lives(self) -> list[Life]:
        return self.lives[len(self.earlier) :]

    def decide(self) -> Again | Wait | End:
        """What follows, with the nodes that are there now."""
        self.members = [node.name for node in self.fleet.nodes()]
        steps = self.journal.checkpoint_steps()
        return decide(self.history, self.members, self.policy, time.time(), steps, self.earlier)

    def announce(self, decision: Again) -> None:
        """Say what ended the last start, and what follows."""
        last, life = self.history[-1], self.lives[-1]
        on = f" on {', '.join(decision.nodes)}" if self.nodes > 1 else ""
        when = f" in {decision.pause_seconds:.1f} s" if decision.pause_seconds else ""
        reason = f" ({decision.reason})" if decision.reason else ""
        self.say(
            f"start {len(self.lives)} ended after {life.end - life.begin:.1f} s at step {self.progress.step}: "
            f"{shortened(last.fault.headline)}"
        )
        self.say(f"start {len(self.lives) + 1} follows{when}{on}; newest checkpoint: step {life.kept}{reason}")

    def is_stopped(self) -> bool:
        return self.fleet.stop_requested()

    def pause(self, seconds: float) -> None:
        """Wait for so long, or until a stop is requested."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self.is_stopped():
            self.journal.flush()
            time.sleep(min(left, POLL_SECONDS))

    def wait_for_nodes(self, decision: Wait, seconds: float) -> Again | Wait | End:
        """What follows when enough nodes are there, when a stop is requested, or after ``seconds``."""
        end = time.monotonic() + seconds
        found: Again | Wait | End = decision
        self.say(f"waiting up to {seconds:.0f} s for nodes: {decision.reason}; {decision.advice}")
        while isinstance(found, Wait) and not self.is_stopped():
            if time.monotonic() > end:
                return End(found.code, found.reason, found.advice, too_few_nodes=True)
            self.pause(leader_pause(10 * POLL_SECONDS, self.nodes))
            found = self.decide()
        return found

    def run_once(self, decision: Again) -> None:
        """Start the ranks, wait for their end, and note how it went.

        Raises:
            ConnectionError: the store that connects the nodes is lost; the journal says so.
        """
        self.progress.begin()
        if self.lives:
            self.forget_exit()
        saves, before, exit_before = len(self.journal.saves()), self.progress.best, exit_written(self.folder)
        begin, number = time.time(), len(self.lives) + 1
        assignment, newest = self.assignment(number, decision)
        self.journal.record(
            {
                "event": "start",
                "command": self.command,
                "claim": self.claim,
                "incarnation": number,
                "time": begin,
                "step": self.progress.step,
                "before": before,
                "newest": min(self.progress.step, newest),
                "on": list(decision.nodes),
                "so_far": ledger.summary(self.lives) if self.lives else None,
            }
        )
        try:
            reports, lost = self.watch(assignment)
        except ConnectionError as error:
            self.progress.look()
            fault = find_fault(assignment, [], store_error=first_line(error))
            self.note(fault, assignment, begin, before, saves, newest)
            raise
        self.progress.look()
        written = self.journal.exit() if exit_written(self.folder) != exit_before else None
        fault = find_fault(assignment, reports, lost, written)
        if fault.cause == Cause.configuration and self.is_in_use():
            fault = replace(fault, cause=Cause.crash, code=CRASHED, message=IN_USE)
        if fault.cause == Cause.crash and written is None and self.journal.is_disk_full():
            fault = replace(fault, cause=Cause.disk_full, message=NO_SPACE, ranks=(), nodes=())  # nor for exit.json
        self.note(fault, assignment, begin, before, saves, newest)

    def forget_exit(self) -> None:
        """Remove the last start's exit.json: the first rank may be lost before it does, and others would read it."""
        with suppress(FolderInUseError), lock(self.folder):
            forget_exit(self.folder)

    def is_in_use(self) -> bool:
        """Whether some rank holds the run folder, of an earlier start that does not end, or of another training."""
        try:
            with lock(self.folder):
                return False
        except FolderInUseError:
            return True

    def assignment(self, number: int, decision: Again) -> tuple[Assignment, int]:
        """The ranks of a start, with what it changes in their configuration; the step that it can start from."""
        extra, newest = [*self.layouts[len(decision.nodes)], *self.time_left()], self.journal.newest_checkpoint()
        resume = self.config.checkpoint.resume
        if any(life.finished for life in self.own_lives) and is_own_start(self.folder, resume):
            resume = "auto"  # the first start has followed the command; now the run goes on
        if decision.nodes and len(decision.nodes) < self.nodes:
            self.say(f"{len(decision.nodes)} of {self.nodes} nodes: {' '.join(extra)} (launch.shrink)")
        if decision.before_step is not None:
            path = self.journal.checkpoint_before(decision.before_step)
            if path is not None:
                self.say(f"going back to {path} (launch.max_rollback_checkpoints); newer ones are set aside")
                resume, newest = str(path), step_of(path)
        if self.config.launch.on_straggler == OnStraggler.restart and not decision.spares:
            extra.append(f"launch.on_straggler={OnStraggler.report}")  # no other node could take its place
        if resume != self.config.checkpoint.resume:
            extra.append(f"checkpoint.resume={resume if resume == 'auto' else quoted(resume)}")
        return Assignment(number, decision.nodes, self.processes, (*self.overrides, *extra)), newest

    def time_left(self) -> list[str]:
        """What is left of `train.stop_after_seconds`, which counts from the command's first start."""
        seconds, own = self.config.train.stop_after_seconds, self.own_lives
        if not seconds or not own:
            return []
        left = min(own[0].begin + seconds - time.time(), seconds)
        return [f"train.stop_after_seconds={max(left, 1.0):.0f}"]

    def watch(self, assignment: Assignment) -> tuple[list[NodeReport], list[str]]:
        """Start the ranks and wait until each node has reported or is lost → the reports, and the lost nodes."""
        number, granted = assignment.incarnation, float("inf")
        self.fleet.start(assignment)
        while True:
            reports = self.fleet.reports(number)
            there = {node.name for node in self.fleet.nodes()}
            missing = [name for name in assignment.nodes if name not in {report.node for report in reports}]
            lost = [name for name in missing if name not in there]
            if len(lost) == len(missing):
                return reports, lost
            failed = {code for report in reports for code in report.codes.values() if code}
            grace = SAVE_SECONDS if not lost and failed.issubset(AGREED) else GRACE_SECONDS
            if (lost or failed) and grace < granted:  # a node may be lost while the others save
                self.fleet.stop_ranks(number, grace)
                granted = grace
            self.journal.flush()
            time.sleep(leader_pause(POLL_SECONDS, len(assignment.nodes)))

    def note(self, fault: Fault, assignment: Assignment, begin: float, before: int, saves: int, newest: int) -> None:
        """Add a start that has ended to the history, the ledger and the journal."""
        end, finished = time.time(), tuple(self.progress.finished)
        new_saves = self.journal.saves()[saves:]
        base = min(self.progress.base, newest)  # a start without a step does not show where it began
        start = Start(fault, before, self.progress.best, base, assignment.nodes, end)
        life = Life(
            begin,
            end,
            finished,
            base,
            self.journal.newest_checkpoint(),
            sum(float(save.get("blocked_seconds", 0.0)) for save in new_saves),
            len(new_saves),
            fault.cause not in (Cause.done, Cause.stop),
        )
        self.history.append(start)
        self.lives.append(ledger.after(self.lives[-1].end, life) if self.lives else life)
        self.record_end(
            {"command": self.command, "claim": self.claim, "incarnation": assignment.incarnation}, start, life
        )

    def record_end(self, line: Mapping[str, Any], start: Start, life: Life) -> None:
        """Note in the journal what `recall` reads; ``line`` says which start it is."""
        fault, finished = start.fault, life.finished
        self.journal.record(
            {
                "event": "end",
                "command": line.get("command"),
                "claim": line.get("claim", 0),
                "incarnation": line["incarnation"],
                "time": life.end,
                "cause": fault.cause,
                "code": fault.code,
                "ranks": list(fault.ranks),
                "nodes": list(fault.nodes),
                "message": fault.message,
                "step": self.progress.step,
                "best": start.step,
                "base": life.base,
                "kept": life.kept,
                "blocked_seconds": life.blocked_seconds,
                "saves": life.saves,
                "finished": thinned(finished, [*self.journal.checkpoint_steps(), life.kept]),
                "first_step_seconds": finished[0][1] - life.begin if finished else None,
            }
        )

    def finish(self, end: End) -> int:
        """Write the ledger, and the page if a person is needed; returns the exit code."""
        found = ledger.summary(self.lives, time.time()) if self.lives else {}
        self.journal.record(
            {"event": "totals", "time": time.time(), "code": end.code, "too_few_nodes": end.too_few_nodes, **found}
        )
        why = "; ".join(part for part in (end.reason, end.advice) if part)
        if end.code not in (OK, STOPPED) and self.is_in_use():
            self.say(f"not starting again: {why}; {IN_USE}")  # what is in the folder is the other training's
        elif end.code not in (OK, STOPPED):
            claim_exit(self.folder, end.code, self.history[-1].fault.message if self.history else end.reason)
            with suppress(OSError):
                command, choice = self.overrides, self.policy.choice
                text = page(str(self.folder), command, self.members, self.history, self.lives, end, choice)
                (self.folder / GAVE_UP).write_text(text)
                self.say(f"not starting again: {why}; {self.folder / GAVE_UP} says more")
        for line in ledger.describe(found) if found else ():
            self.say(line)
        with suppress(OSError, ConfigError):
            if (self.folder / REPORT).is_file():  # the ranks wrote it before these totals
                write_report(self.folder)
        self.journal.close()
        return end.code

    def gauges(self) -> dict[str, float | None]:
        """What /metrics shows."""
        now, last = time.time(), self.progress.last_step_time
        return {
            "step": self.progress.step,
            "loss": self.progress.newest.get("loss"),
            "seconds_since_last_step": None if last is None else now - last,
            "starts": len(self.lives) + 1,
            "faults": sum(life.is_fault for life in self.lives),
            "availability": ledger.summary(self.lives)["availability"] if self.lives else None,
            "nodes": len(self.members),
        }

    @staticmethod
    def say(text: str) -> None:
        print(f"launch: {text}", file=sys.stderr, flush=True)


def shortened(text: str) -> str:
    """For the terminal, where ranks have printed their messages whole."""
    line = " ".join(text.split())
    return line if len(line) <= MESSAGE_CHARACTERS else f"{line[:MESSAGE_CHARACTERS]} …"


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def is_own_start(folder: Path, resume: str) -> bool:
    """Whether `checkpoint.resume` names no start (`never`) or one inside the run's own folder: it holds once."""
    return resume == "never" or (resume != "auto" and is_inside(Path(resume), folder))


def policy_of(config: Config, counts: tuple[int, ...], journal: Journal, command: str) -> Policy:
    """The policy in the section `launch`, and the strikes of commands before ``command``."""
    settings = config.launch
    strikes = journal.strikes(settings.max_strikes, command)
    choice = Choice(counts, settings.max_strikes, settings.strike_hours * 3600, strikes)
    return Policy(
        settings.restarts,
        settings.backoff_seconds,
        settings.on_unhealthy == OnUnhealthy.retry,
        settings.max_rollback_checkpoints,
        choice,
    )
