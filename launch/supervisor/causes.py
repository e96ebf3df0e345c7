"""What ended the ranks: one cause, from exit.json's fields and the ranks' exit codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from longcat.errors import BAD_INPUT, CORRUPT, CRASHED, OK, STOPPED, UNHEALTHY


class Cause(StrEnum):
    """Why all ranks ended."""

    done = "done"
    stop = "stop"  # a signal or the time limit; state is saved
    configuration = "configuration"
    unhealthy = "unhealthy"
    corruption = "corruption"
    hang = "hang"  # a rank stopped answering, or held the others up
    out_of_memory = "out_of_memory"
    disk_full = "disk_full"
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
    Cause.unhealthy: "look at the loss in report.html; lower optim.lr, or resume from an earlier checkpoint",
    Cause.corruption: "take the named machine out of the job, then start the same command again",
    Cause.hang: "look at the named rank's machine; raise parallel.timeout_seconds if it is only slow",
    Cause.out_of_memory: "the same start needs the same memory: set parallel.recompute=full, lower "
    "train.micro_batch_size, or raise parallel.fsdp",
    Cause.disk_full: "free space in the run folder's file system, or lower checkpoint.keep",
    Cause.crash: "run.log and the output above have the traceback; if a rank got SIGKILL, look into its machine's log",
}


@dataclass(frozen=True)
class Fault:
    """How one start of all ranks ended: the cause, the ranks that are to blame, and what exit.json says."""

    cause: Cause
    code: int
    message: str
    ranks: tuple[int, ...] = ()


def find_fault(code: int, codes: Mapping[int, int], exit_json: Mapping[str, Any] | None) -> Fault:
    """Tell the cause.

    Args:
        code: how the start ended as a whole.
        codes: rank → exit code of the ranks that failed; negative for a signal.
        exit_json: what this start wrote, None if nothing.
    """
    message = str((exit_json or {}).get("message", "")) or describe(codes)
    details = exit_json or {}
    cause = BY_CODE.get(code, Cause.crash)
    ranks: tuple[int, ...] = ()
    if cause == Cause.crash and details.get("cause") in (Cause.out_of_memory, Cause.disk_full):
        cause = Cause(details["cause"])
    elif cause == Cause.crash and isinstance(details.get("hang"), dict):
        hang = details["hang"]
        cause = Cause.crash if hang.get("kind") == "dead" else Cause.hang
        ranks = tuple(entry["rank"] for entry in hang.get("ranks", ()))
    elif cause == Cause.corruption:
        found = details.get("finding", {}).get("ranks", ())
        ranks = tuple(entry["rank"] for entry in found if isinstance(entry, dict) and "rank" in entry)
    if cause == Cause.crash and not ranks:
        ranks = tuple(sorted(rank for rank, own in codes.items() if own < 0) or sorted(codes))[:1]
    return Fault(cause, code if code > 0 or cause == Cause.done else CRASHED, message, ranks)


def describe(codes: Mapping[int, int]) -> str:
    """`rank 1 got signal 9`, for ranks that left no message."""
    if not codes:
        return "the ranks ended without a message"
    rank = min(codes, key=lambda rank: (codes[rank] >= 0, rank))
    return f"rank {rank} " + (f"got signal {-codes[rank]}" if codes[rank] < 0 else f"ended with code {codes[rank]}")
