"""What ended the ranks: one cause and the nodes to blame, from exit.json's fields, exit codes and lost nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from longcat.errors import BAD_INPUT, CORRUPT, CRASHED, OK, STOPPED, UNHEALTHY
from train.new_run import new_run

if TYPE_CHECKING:
    from launch.fleet import Assignment, NodeReport


class Cause(StrEnum):
    """Why all ranks ended."""

    done = "done"
    stop = "stop"  # a signal or the time limit; state is saved
    configuration = "configuration"
    unhealthy = "unhealthy"
    corruption = "corruption"
    hang = "hang"  # a rank stopped answering, or held the others up
    straggler = "straggler"  # a rank was slow for many steps; state is saved
    out_of_memory = "out_of_memory"
    disk_full = "disk_full"
    node_lost = "node_lost"  # no heartbeat for launch.node_timeout
    store_lost = "store_lost"  # the store that connects the nodes, or that through which ranks meet
    supervisor_lost = "supervisor_lost"  # an earlier command was killed: it left no totals
    crash = "crash"


BY_CODE = {
    OK: Cause.done,
    BAD_INPUT: Cause.configuration,
    STOPPED: Cause.stop,
    UNHEALTHY: Cause.unhealthy,
    CORRUPT: Cause.corruption,
}
ADVICE = {
    Cause.configuration: "correct the configuration: the message names the key",
    Cause.unhealthy: "look at the loss in report.html and at the data; a lower optim.lr needs a new run, from the last "
    "checkpoint or an earlier one",
    Cause.corruption: "take the named machine out of the job",
    Cause.hang: "look at the named rank's machine; raise parallel.timeout_seconds if it is only slow",
    Cause.straggler: "look at the named rank's machine, and at the load of its experts in report.html",
    Cause.out_of_memory: "the same start needs the same memory: set parallel.recompute=full or raise parallel.fsdp, or "
    + new_run("a lower train.micro_batch_size", "train.micro_batch_size"),
    Cause.disk_full: "free space in the run folder's file system, or lower checkpoint.keep",
    Cause.node_lost: "look at the named machine and its network; raise launch.node_timeout if it was only busy",
    Cause.store_lost: "look at the machine of the first node and its network",
    Cause.supervisor_lost: "look for what killed longcat train: its machine's log may say that it ran out of memory",
    Cause.crash: "look for the traceback in run.log and the output; if a rank got signal 9, its machine's log may "
    "say that it ran out of memory",
}
WORDS = {
    Cause.configuration: "wrong configuration",
    Cause.unhealthy: "unhealthy numbers",
    Cause.corruption: "silent data corruption",
    Cause.out_of_memory: "out of memory",
    Cause.disk_full: "full disk",
    Cause.node_lost: "lost node",
    Cause.store_lost: "lost store",
    Cause.supervisor_lost: "lost supervisor",
}
STRIKES = (Cause.crash, Cause.hang, Cause.straggler, Cause.node_lost, Cause.corruption)  # blame a node


@dataclass(frozen=True)
class Fault:
    """How one start of all ranks ended: the cause, the ranks and nodes to blame, and what exit.json says."""

    cause: Cause
    code: int
    message: str
    ranks: tuple[int, ...] = ()
    nodes: tuple[str, ...] = ()
    last_lines: str = ""  # that the rank that failed first wrote to its standard error

    @property
    def headline(self) -> str:
        """`crash of rank 1 on b: rank 1 got signal 9`."""
        many = "s" * (len(self.ranks) > 1)
        ranks = f" of rank{many} {', '.join(map(str, self.ranks))}" if self.ranks else ""
        where = f" on {', '.join(self.nodes)}" if self.nodes and self.ranks else ""
        return f"{WORDS.get(self.cause, self.cause)}{ranks}{where}: {self.message}"


def find_fault(
    assignment: Assignment,
    reports: Sequence[NodeReport],
    lost: Sequence[str] = (),
    exit_json: Mapping[str, Any] | None = None,
    store_error: str = "",
) -> Fault:
    """Tell the cause.

    Args:
        lost: nodes that sent no heartbeat and have not reported.
        exit_json: what this start wrote, None if nothing.
        store_error: why the nodes can no longer be asked, if so.
    """
    details: Mapping[str, Any] = exit_json or {}
    code = exit_code(reports, bool(lost or store_error), details)
    failed = {rank: own for report in reports for rank, own in report.codes.items() if own}
    cause, ranks = BY_CODE.get(code, Cause.crash), _named(details)
    if cause == Cause.stop and isinstance(details.get("straggler"), dict):
        cause = Cause.straggler
    elif cause == Cause.crash:
        cause = _kind_of_crash(details, lost, store_error)
    if cause == Cause.crash and not ranks:
        first = _first_failed(reports)
        ranks = tuple(sorted(failed))[:1] if first is None else (first,)
    nodes: tuple[str, ...] = ()
    if cause == Cause.node_lost:
        ranks, nodes = (), tuple(lost)
    elif cause in STRIKES:
        nodes = tuple(dict.fromkeys(assignment.nodes[rank // assignment.processes] for rank in ranks))
        if not nodes and len(assignment.nodes) == 1:
            nodes = assignment.nodes
    if cause == Cause.node_lost:
        message = f"no heartbeat from {', '.join(lost)}"
    elif cause == Cause.store_lost and store_error:
        message = f"the store that connects the nodes is lost ({store_error})"
    else:
        first = _first_failed(reports)
        own = {rank: failed[rank] for rank in (*ranks, first) if rank in failed}
        message = str(details.get("message", "")) or describe(own or failed)
    last = next((report.stderr for report in _failed(reports)), "")
    return Fault(cause, code, message, ranks, nodes, last)


def exit_code(reports: Sequence[NodeReport], is_incomplete: bool, exit_json: Mapping[str, Any]) -> int:
    """Of the run: exit.json's where this start wrote one, else that of the rank that failed first."""
    codes = {rank: code for report in reports for rank, code in report.codes.items()}
    try:
        written = int(exit_json["code"])
    except (KeyError, TypeError, ValueError):
        written = None
    if not is_incomplete and codes and not any(codes.values()):
        return OK
    first = _first_failed(reports)
    code = codes.get(first, CRASHED) if first is not None else CRASHED
    if code == BAD_INPUT or written is None:  # 2: exit.json may be another run's
        return code if code > 0 else CRASHED
    if written == OK and not any(codes.values()):
        return OK  # a node was lost after the end
    return written or (code if code > 0 else CRASHED)


def _failed(reports: Sequence[NodeReport]) -> list[NodeReport]:
    """Reports of nodes with a rank that failed, the first one first."""
    return sorted((report for report in reports if report.first_failed is not None), key=lambda report: report.ended)


def _first_failed(reports: Sequence[NodeReport]) -> int | None:
    return next((report.first_failed for report in _failed(reports)), None)


def _named(details: Mapping[str, Any]) -> tuple[int, ...]:
    """The ranks that exit.json blames; of a corruption's suspects the likeliest, whose rank the finding carries."""
    finding = details.get("finding")
    if isinstance(finding, dict):
        return (finding["rank"],) if isinstance(finding.get("rank"), int) else ()
    for key in ("hang", "straggler"):
        found = details.get(key)
        if isinstance(found, dict):
            named = (entry["rank"] for entry in found.get("ranks", ()) if isinstance(entry, dict) and "rank" in entry)
            return tuple(named)
    return ()


def _kind_of_crash(details: Mapping[str, Any], lost: Sequence[str], store_error: str) -> Cause:
    if details.get("cause") in (Cause.out_of_memory, Cause.disk_full):
        return Cause(details["cause"])
    if lost:
        return Cause.node_lost
    if store_error or details.get("cause") == Cause.store_lost:
        return Cause.store_lost
    hang = details.get("hang")
    return Cause.hang if isinstance(hang, dict) and hang.get("kind") != "dead" else Cause.crash


def describe(codes: Mapping[int, int]) -> str:
    """`rank 1 got signal 9`, for ranks that left no message."""
    if not codes:
        return "the ranks ended without a message"
    rank = min(codes, key=lambda rank: (codes[rank] >= 0, rank))
    return f"rank {rank} " + (f"got signal {-codes[rank]}" if codes[rank] < 0 else f"ended with code {codes[rank]}")
