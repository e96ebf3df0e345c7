"""Who holds the others up: signs of life of all ranks in, one sentence out. Knows no process group and no clock."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass

from parallel.watchdog.wait_graph import wait_ends, wait_path

WAITS, WORKS, FAILED = "waits", "works", "failed"  # states of a rank
DEAD, UNRESPONSIVE, STRAGGLER, UNKNOWN = "gone", "silent", "late", "nobody"  # kinds of blame
SLOW = "raise parallel.timeout_seconds if it is only slow"
MAX_NAMED = 4  # ranks that a sentence lists one by one


@dataclass(frozen=True)
class Heartbeat:
    """What a rank last said of itself."""

    rank: int
    beat: int  # counts the signs: one that stands still comes from a rank that has stopped
    wall: float  # seconds since 1970, by the rank's own clock
    step: int
    sequence: int  # crumbs so far: equal programs have come equally far
    state: str  # waits (for other ranks) | works | failed (an exchange raised)
    what: str  # the innermost crumb, "" between crumbs
    group: str  # the axis that it is an exchange of, "" where nobody said
    among: str  # the ranks of the exchange or the peer, as `waits.encode_ranks` writes them; "" is all
    phase: str  # the crumb around it, "" without one
    before: str  # the exchange that ended last
    still_seconds: float  # since a crumb last began or ended
    slow_seconds_ago: float  # since a part that may take long (a checkpoint's writing) ended; 0 in one, else infinite
    machine: str
    pid: int

    def text(self) -> str:
        """As it lies in the store."""
        return json.dumps(asdict(self))

    @staticmethod
    def parse(text: str | bytes) -> Heartbeat:
        return Heartbeat(**json.loads(text))

    @property
    def waits(self) -> bool:
        """Whether it waits for others, or did until its exchange failed."""
        return self.state != WORKS

    @property
    def call(self) -> tuple[object, ...]:
        """Equal on ranks in one and the same call of an exchange."""
        return self.step, self.phase, self.what, self.among

    @property
    def place(self) -> str:
        """`step 12, "expert dispatch, layer 3" of forward and backward`: where the rank is."""
        if not self.what:
            return f"step {self.step}, " + (f'after "{self.before}"' if self.before else "before the first exchange")
        last = f' after "{self.before}"' if self.state == WORKS and self.before else ""
        return f"step {self.step}, {self.exchange}{last}"

    @property
    def exchange(self) -> str:
        """The crumb with its group and what is around it."""
        group = f" ({self.group})" if self.group else ""
        return f'"{self.what}"{group}' + (f" of {self.phase}" if self.phase else "")


@dataclass(frozen=True)
class Diagnosis:
    """Which ranks hold the others up, and in words why and what to do."""

    kind: str  # gone | silent | late | nobody (no rank stands out)
    ranks: tuple[int, ...]
    why: str
    advice: str = SLOW


def diagnose(
    me: int, heartbeats: Mapping[int, Heartbeat], silent: AbstractSet[int], gone: AbstractSet[int], now: float
) -> Diagnosis | None:
    """Decide from the ranks' signs who is to blame; None where nobody waits and nobody is missing.

    In this order: a process that is no more, a rank whose signs have stopped, one at work at the end of the chain of
    waits that begins here, ranks that wait for each other in different exchanges.

    Args:
        silent: ranks whose beat did not move while we looked.
        gone: ranks whose process is known to have ended.
        now: seconds since 1970, for the age of the last signs.
    """
    for kind, ranks, happened, advice in (
        (DEAD, gone, "is gone", "if the kernel ended it for want of memory, its machine's log says so"),
        (UNRESPONSIVE, silent, "has stopped answering", SLOW),
    ):
        first = sorted(
            ranks & heartbeats.keys(), key=lambda rank: (heartbeats[rank].state == FAILED, heartbeats[rank].wall)
        )
        if first:
            return Diagnosis(kind, tuple(first), missing(first, heartbeats, happened, now), advice)
    waiting = [rank for rank, heartbeat in heartbeats.items() if heartbeat.waits]
    if not waiting:
        return None
    start = me if me in waiting else max(waiting, key=lambda rank: heartbeats[rank].still_seconds)
    found = wait_ends(start, heartbeats)
    if heartbeats[found[0][0]].waits:
        return cycle(start, found[0], heartbeats)
    return at_work(start, [rank for (rank,) in found], heartbeats)


def at_work(start: int, ranks: list[int], heartbeats: Mapping[int, Heartbeat]) -> Diagnosis:
    """Of ranks that work while others wait: the one furthest behind, of equals the one that has not moved for longest.

    One in a part that may take long comes last.
    """

    def order(rank: int) -> tuple[bool, int, float, int]:
        heartbeat = heartbeats[rank]
        return heartbeat.slow_seconds_ago == 0, heartbeat.step, -heartbeat.still_seconds, heartbeat.sequence

    late = min(ranks, key=order)
    seconds = heartbeats[late].still_seconds
    why = f"{not_come(start, late, heartbeats)} (for {seconds:.0f} s at {heartbeats[late].place})"
    return Diagnosis(STRAGGLER, (late,), why)


def not_come(start: int, late: int, heartbeats: Mapping[int, Heartbeat]) -> str:
    """`rank 2 (…) has not come to it`, or by way of whom it holds ``start`` up."""
    between = wait_path(start, late, heartbeats)
    how = f"holds it up by way of {listed(between, by_number=False)}" if between else "has not come to it"
    return f"{named(late, heartbeats)} {how}"


def missing(ranks: list[int], heartbeats: Mapping[int, Heartbeat], happened: str, now: float) -> str:
    """`rank 0 (process 7 on host) is gone (its last heartbeat 3 s ago: …)`, and how many more."""
    first = heartbeats[ranks[0]]
    others = ranks[1:]
    more = f", and so {'is' if len(others) == 1 else 'are'} {listed(others)}" if others else ""
    return (
        f"{named(first.rank, heartbeats)} {happened} (its last sign {max(0.0, now - first.wall):.0f} s ago: "
        f"{first.place}){more}"
    )


def cycle(start: int, ranks: tuple[int, ...], heartbeats: Mapping[int, Heartbeat]) -> Diagnosis:
    """All wait: of those that wait for each other who is behind, or in another exchange than most; and who is not."""
    calls = [heartbeats[rank].call for rank in ranks]
    if len(set(calls)) == 1:
        return Diagnosis(UNKNOWN, (), "every rank waits in the same place: look at the network between them")

    def order(rank: int) -> tuple[int, int, int, bool, int]:
        heartbeat = heartbeats[rank]
        return heartbeat.step, heartbeat.sequence, calls.count(heartbeat.call), rank == start, rank

    late = min(ranks, key=order)
    others = [rank for rank in ranks if heartbeats[rank].call != heartbeats[late].call]
    other = start if start in others else max(others, key=lambda rank: (calls.count(heartbeats[rank].call), -rank))
    why = f"{not_come(start, late, heartbeats)}: it waits at {heartbeats[late].place}"
    if other != start:  # the sentence begins with where that one is
        why += f", while {named(other, heartbeats)} waits at {heartbeats[other].place}"
    return Diagnosis(STRAGGLER, (late,), why)


def reporter(me: int, heartbeats: Mapping[int, Heartbeat], diagnosis: Diagnosis) -> Heartbeat | None:
    """The rank that the sentence begins with: this one, or the longest waiting one where this one is to blame."""
    candidates = [
        heartbeat for rank, heartbeat in heartbeats.items() if rank not in diagnosis.ranks and heartbeat.waits
    ]
    mine = next((heartbeat for heartbeat in candidates if heartbeat.rank == me), None)
    return mine or max(candidates, key=lambda heartbeat: heartbeat.still_seconds, default=None)


def format_message(seen: Heartbeat | None, diagnosis: Diagnosis) -> str:
    """One line: who waits, how long, for what, who is to blame, what to do."""
    if seen is None:
        return f"{diagnosis.why}; {diagnosis.advice}"
    if seen.state == FAILED:
        begin = f"rank {seen.rank} could not finish step {seen.step}'s {seen.exchange}"
    elif seen.state == WAITS:
        begin = f"rank {seen.rank} has waited {seen.still_seconds:.0f} s in step {seen.step} for {seen.exchange}"
    else:
        begin = f"rank {seen.rank} has not moved for {seen.still_seconds:.0f} s at {seen.place}"
    return f"{begin}: {diagnosis.why}; {diagnosis.advice}"


def named(rank: int, heartbeats: Mapping[int, Heartbeat]) -> str:
    """A rank with what a person needs to look for it."""
    heartbeat = heartbeats[rank]
    return f"rank {rank} (process {heartbeat.pid} on {heartbeat.machine.partition('/')[0]})"


def listed(ranks: Iterable[int], by_number: bool = True) -> str:
    """`ranks 1, 2`, or the first few and how many more; in their own order where that says something."""
    ranks = sorted(ranks) if by_number else list(ranks)
    text = ", ".join(str(rank) for rank in ranks[:MAX_NAMED])
    more = f" and {len(ranks) - MAX_NAMED} more" if len(ranks) > MAX_NAMED else ""
    return f"rank{'s' * (len(ranks) > 1)} {text}{more}"
