"""Which rank holds the others up: heartbeats of all ranks in, one message out. Uses no process group and no clock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from parallel.watchdog.events import RankState
from parallel.watchdog.heartbeats import Heartbeat
from parallel.watchdog.progress import GroupCounts
from parallel.watchdog.wait_graph import decode_ranks, ranks_reached, wait_ends, wait_path

IF_SLOW = "raise parallel.timeout_seconds if it is only slow"
IF_KILLED = "if the kernel killed it for lack of memory, its machine's log says so"
MAX_LISTED = 4  # ranks that a message lists one by one


class HangCause(StrEnum):
    """Why a collective does not end."""

    DEAD = "dead"  # a process has ended
    UNRESPONSIVE = "unresponsive"  # a rank's heartbeats have stopped
    STRAGGLER = "straggler"  # a rank works, or waits in another collective
    UNKNOWN = "unknown"  # no rank differs from the others
    STORE_LOST = "store_lost"  # heartbeats cannot be read, and no rank is known to be lost


@dataclass(frozen=True)
class Diagnosis:
    """Which ranks hold the others up, with a reason and an advice for the message."""

    cause: HangCause
    ranks: tuple[int, ...]  # the first one is named in the message
    reason: str
    advice: str = IF_SLOW


def diagnose(
    this_rank: int,
    heartbeats: Mapping[int, Heartbeat],
    unresponsive: AbstractSet[int],
    dead: AbstractSet[int],
    now: float,
) -> Diagnosis | None:
    """Decide from the heartbeats which ranks hold the others up; None where no rank waits and none is lost.

    In this order: a process that has ended, a rank whose heartbeats have stopped, on GPUs a rank that has not issued a
    collective that others' devices wait for, a rank that works at the end of the chain of waits that begins here, ranks
    that wait for each other in different collectives.

    Args:
        unresponsive: ranks that published no heartbeat during the observation.
        dead: ranks whose process is known to have ended.
        now: seconds since 1970, for the age of the last heartbeats.
    """
    for cause, ranks in ((HangCause.DEAD, dead), (HangCause.UNRESPONSIVE, unresponsive)):
        lost = sorted(ranks & heartbeats.keys(), key=lambda rank: _order_of_loss(heartbeats[rank]))
        if lost:
            return diagnose_lost(cause, lost, heartbeats, now)
    waiting = [rank for rank, heartbeat in heartbeats.items() if heartbeat.is_waiting]
    if not waiting:
        return None
    on_device = diagnose_device(this_rank, waiting, heartbeats)
    if on_device is not None:
        return on_device
    start = this_rank if this_rank in waiting else max(waiting, key=lambda rank: heartbeats[rank].idle_seconds)
    ends = wait_ends(start, heartbeats)
    if heartbeats[ends[0][0]].is_waiting:
        return diagnose_cycle(start, ends[0], heartbeats)
    return diagnose_working(start, [rank for (rank,) in ends], heartbeats)


def diagnoses(
    this_rank: int, own: Diagnosis | None, heartbeats: Mapping[int, Heartbeat], seconds: float
) -> Iterator[tuple[int, Diagnosis]]:
    """Yield (rank whose wait it explains, diagnosis): the reader's own first, then those of other waiting ranks.

    Others are needed where the rank that the reader waits for may take longer (a slow span). They are the ranks that
    have waited for longer than ``seconds``, longest first; a rank on the chain of waits of an earlier one is
    left out.
    """
    if own is None:
        return
    yield this_rank, own
    if own.cause not in (HangCause.STRAGGLER, HangCause.UNKNOWN):
        return  # these do not depend on who looks
    long = {rank: one for rank, one in heartbeats.items() if one.is_waiting and one.idle_seconds > seconds}
    covered = ranks_reached(this_rank, heartbeats) if heartbeats[this_rank].is_waiting else set()
    for rank in sorted(long, key=lambda rank: (-long[rank].idle_seconds, rank)):
        if rank not in covered:
            found = diagnose(rank, heartbeats, set(), set(), 0.0)
            assert found is not None  # this rank waits
            yield rank, found
            covered |= ranks_reached(rank, heartbeats)


def diagnose_device(this_rank: int, waiting: list[int], heartbeats: Mapping[int, Heartbeat]) -> Diagnosis | None:
    """Which ranks have not issued the collective that other ranks' devices wait for; None if the counts do not say.

    The span that a rank waits in may be another group's: the host runs ahead of the device. Ranks in a slow span come
    last.
    """
    counts = GroupCounts({rank: heartbeat.groups for rank, heartbeat in heartbeats.items() if heartbeat.groups})
    starts = sorted(waiting, key=lambda rank: (rank != this_rank, rank))
    found = None
    for start in starts:
        one = counts.find_behind(start)
        found = found or one
        if one is not None and any(heartbeats[rank].slow_seconds_ago > 0 for rank in one.ranks):
            found = one
            break
    if found is not None:
        ranks = sorted(found.ranks, key=lambda rank: (heartbeats[rank].step, heartbeats[rank].sequence, rank))
        straggler, number = heartbeats[ranks[0]], found.group.completed + 1
        reason = (
            f"{rank_text(straggler)} has not issued collective {number} of the group {found.group.name}, which "
            f"{list_ranks(found.waiting)} {'waits' if len(found.waiting) == 1 else 'wait'} for on the device "
            f"(for {straggler.idle_seconds:.0f} s at {straggler.location})"
        )
        return Diagnosis(HangCause.STRAGGLER, tuple(ranks), reason)
    stuck = counts.stuck_group()
    if stuck is None:
        return None
    reason = (
        f"all ranks of the group {stuck.name} ({list_ranks(decode_ranks(stuck.ranks))}) have issued its collective "
        f"{stuck.completed + 1}, and no device has completed it: check the network between them, and their GPUs"
    )
    return Diagnosis(HangCause.UNKNOWN, (), reason)


def _order_of_loss(heartbeat: Heartbeat) -> tuple[bool, float]:
    """The first rank to stop comes first; one that ended because its collective failed comes last."""
    return heartbeat.state == RankState.FAILED, heartbeat.timestamp


def diagnose_lost(cause: HangCause, ranks: list[int], heartbeats: Mapping[int, Heartbeat], now: float) -> Diagnosis:
    """`rank 0 (process 7 on host) has died (its last heartbeat 3 s ago: …)`, and which other ranks have."""
    verb, advice = ("has died", IF_KILLED) if cause == HangCause.DEAD else ("has stopped answering", IF_SLOW)
    first, others = heartbeats[ranks[0]], ranks[1:]
    more = f", and so {'has' if len(others) == 1 else 'have'} {list_ranks(others)}" if others else ""
    age = max(0.0, now - first.timestamp)
    reason = f"{rank_text(first)} {verb} (its last heartbeat {age:.0f} s ago: {first.location}){more}"
    return Diagnosis(cause, tuple(ranks), reason, advice)


def diagnose_working(start: int, ranks: list[int], heartbeats: Mapping[int, Heartbeat]) -> Diagnosis:
    """Of ranks that work while others wait: the one furthest behind; at the same step, the one idle for longest.

    A rank in a slow span comes last.
    """

    def order(rank: int) -> tuple[bool, int, float, int]:
        heartbeat = heartbeats[rank]
        return heartbeat.slow_seconds_ago == 0, heartbeat.step, -heartbeat.idle_seconds, heartbeat.sequence

    straggler = min(ranks, key=order)
    seconds, location = heartbeats[straggler].idle_seconds, heartbeats[straggler].location
    reason = f"{delay_text(start, straggler, heartbeats)} (for {seconds:.0f} s at {location})"
    return Diagnosis(HangCause.STRAGGLER, (straggler,), reason)


def diagnose_cycle(start: int, ranks: tuple[int, ...], heartbeats: Mapping[int, Heartbeat]) -> Diagnosis:
    """All wait for each other: the one that is behind, or in another collective than most, and one that is not."""
    calls = [heartbeats[rank].call for rank in ranks]
    if len(set(calls)) == 1:
        reason = "every rank waits in the same collective: check the network between them"
        return Diagnosis(HangCause.UNKNOWN, (), reason)

    def order(rank: int) -> tuple[int, int, int, bool, int]:
        heartbeat = heartbeats[rank]
        return heartbeat.step, heartbeat.sequence, calls.count(heartbeat.call), rank == start, rank

    straggler = min(ranks, key=order)
    others = [rank for rank in ranks if heartbeats[rank].call != heartbeats[straggler].call]
    other = start if start in others else max(others, key=lambda rank: (calls.count(heartbeats[rank].call), -rank))
    reason = f"{delay_text(start, straggler, heartbeats)}: it waits at {heartbeats[straggler].location}"
    if other != start:  # the message begins with where ``start`` is
        reason += f", while {rank_text(heartbeats[other])} waits at {heartbeats[other].location}"
    return Diagnosis(HangCause.STRAGGLER, (straggler,), reason)


def delay_text(start: int, straggler: int, heartbeats: Mapping[int, Heartbeat]) -> str:
    """`rank 2 (…) has not reached it`, or through which ranks it delays ``start``."""
    path = wait_path(start, straggler, heartbeats)
    how = f"delays it through {list_ranks(path, in_order=False)}" if path else "has not reached it"
    return f"{rank_text(heartbeats[straggler])} {how}"


def reporter(this_rank: int, heartbeats: Mapping[int, Heartbeat], diagnosis: Diagnosis) -> Heartbeat | None:
    """The rank that the message begins with: this one, or the longest waiting one where this one is diagnosed."""
    candidates = [
        heartbeat for rank, heartbeat in heartbeats.items() if rank not in diagnosis.ranks and heartbeat.is_waiting
    ]
    own = next((heartbeat for heartbeat in candidates if heartbeat.rank == this_rank), None)
    return own or max(candidates, key=lambda heartbeat: heartbeat.idle_seconds, default=None)


def format_message(reporting: Heartbeat | None, diagnosis: Diagnosis) -> str:
    """One line: which rank has waited, how long, for what, which rank delays it, what to do."""
    if reporting is None:
        return f"{diagnosis.reason}; {diagnosis.advice}"
    rank, step, seconds = reporting.rank, reporting.step, reporting.idle_seconds
    if reporting.state == RankState.FAILED:
        begin = f"rank {rank} failed in step {step} in {reporting.activity}"
    elif reporting.state == RankState.WAITING:
        begin = f"rank {rank} has waited {seconds:.0f} s in step {step} for {reporting.activity}"
    else:
        begin = f"rank {rank} has made no progress for {seconds:.0f} s at {reporting.location}"
    return f"{begin}: {diagnosis.reason}; {diagnosis.advice}"


def as_finding(diagnosis: Diagnosis, heartbeats: Mapping[int, Heartbeat]) -> dict[str, Any]:
    """The diagnosis for machines: `kind` (a `HangCause`) and `ranks`, each with its host."""
    hosts = {rank: heartbeats[rank].machine.partition("/")[0] for rank in diagnosis.ranks if rank in heartbeats}
    return {"kind": str(diagnosis.cause), "ranks": [{"rank": rank, "host": host} for rank, host in hosts.items()]}


def rank_text(heartbeat: Heartbeat) -> str:
    """A rank with what a person needs to find it."""
    return f"rank {heartbeat.rank} (process {heartbeat.pid} on {heartbeat.machine.partition('/')[0]})"


def list_ranks(ranks: Iterable[int], in_order: bool = True) -> str:
    """`ranks 1, 2`, or the first few and how many more; ``in_order`` sorts them."""
    ranks = sorted(ranks) if in_order else list(ranks)
    text = ", ".join(str(rank) for rank in ranks[:MAX_LISTED])
    more = f" and {len(ranks) - MAX_LISTED} more" if len(ranks) > MAX_LISTED else ""
    return f"rank{'s' * (len(ranks) > 1)} {text}{more}"
