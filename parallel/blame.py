"""Who holds the others up: signs of life of all ranks in, one sentence out. Knows no process group and no clock."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass

WAITS, WORKS, FAILED = "waits", "works", "failed"  # states of a rank
GONE, SILENT, LATE, NOBODY = "gone", "silent", "late", "nobody"  # kinds of blame
SLOW = "raise parallel.timeout_seconds if it is only slow"
MAX_NAMED = 4  # ranks that a sentence lists one by one


@dataclass(frozen=True)
class Sign:
    """What a rank last said of itself."""

    rank: int
    beat: int  # counts the signs: one that stands still comes from a rank that has stopped
    wall: float  # seconds since 1970, by the rank's own clock
    step: int
    sequence: int  # crumbs so far: equal programs have come equally far
    state: str  # waits (for other ranks) | works | failed (an exchange raised)
    what: str  # the innermost crumb, "" between crumbs
    group: str  # the axis that it is an exchange of, "" where nobody said
    phase: str  # the crumb around it, "" without one
    before: str  # the exchange that ended last
    still_seconds: float  # since a crumb last began or ended
    machine: str
    pid: int

    def text(self) -> str:
        """As it lies in the store."""
        return json.dumps(asdict(self))

    @staticmethod
    def parse(text: str | bytes) -> Sign:
        return Sign(**json.loads(text))

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
class Blame:
    """Which ranks hold the others up, and in words why and what to do."""

    kind: str  # gone | silent | late | nobody (no rank stands out)
    ranks: tuple[int, ...]
    why: str
    advice: str = SLOW


def verdict(
    me: int, signs: Mapping[int, Sign], silent: AbstractSet[int], gone: AbstractSet[int], now: float
) -> Blame | None:
    """Decide from the ranks' signs who is to blame; None where nobody waits and nobody is missing.

    In this order: a process that is no more, a rank whose signs have stopped, one that is at work while others wait
    for it, one that waits for something earlier than the rest, one that waits for something else than most.

    Args:
        silent: ranks whose beat did not move while we looked.
        gone: ranks whose process is known to have ended.
        now: seconds since 1970, for the age of the last signs.
    """
    for kind, ranks, happened, advice in (
        (GONE, gone, "is gone", "if the kernel ended it for want of memory, its machine's log says so"),
        (SILENT, silent, "has stopped answering", SLOW),
    ):
        first = sorted(ranks & signs.keys(), key=lambda rank: (signs[rank].state == FAILED, signs[rank].wall))
        if first:
            return Blame(kind, tuple(first), missing(first, signs, happened, now), advice)
    waiting = {rank: sign for rank, sign in signs.items() if sign.state != WORKS}  # or have waited until they failed
    working = signs.keys() - waiting.keys()
    if not waiting:
        return None
    if working:
        late = min(working, key=lambda rank: (signs[rank].step, signs[rank].sequence, -signs[rank].still_seconds))
        seconds = signs[late].still_seconds
        why = f"{named(late, signs)} has not come to it (for {seconds:.0f} s at {signs[late].place})"
        return Blame(LATE, (late,), why)
    return odd_one_out(me, waiting)


def missing(ranks: list[int], signs: Mapping[int, Sign], happened: str, now: float) -> str:
    """`rank 0 (process 7 on host) is gone (its last sign 3 s ago: …)`, and how many more."""
    first = signs[ranks[0]]
    others = ranks[1:]
    more = f", and so {'is' if len(others) == 1 else 'are'} {listed(others)}" if others else ""
    return (
        f"{named(first.rank, signs)} {happened} (its last sign {max(0.0, now - first.wall):.0f} s ago: "
        f"{first.place}){more}"
    )


def odd_one_out(me: int, waiting: Mapping[int, Sign]) -> Blame:
    """All wait: who is behind, or in another exchange than most."""
    places = {rank: (sign.step, sign.what) for rank, sign in waiting.items()}
    order = sorted(waiting, key=lambda rank: (waiting[rank].step, waiting[rank].sequence))
    if len(set(places.values())) == 1:
        return Blame(NOBODY, (), "every rank waits in the same place: look at the network between them")
    late, ahead = order[0], order[-1]
    if (waiting[late].step, waiting[late].sequence) == (waiting[ahead].step, waiting[ahead].sequence):
        kinds = list(places.values())
        late = min(order, key=lambda rank: (kinds.count(places[rank]), rank == me, rank))
    return Blame(LATE, (late,), f"{named(late, waiting)} has not come to it: it waits at {waiting[late].place}")


def witness(me: int, signs: Mapping[int, Sign], blame: Blame) -> Sign | None:
    """The rank that the sentence begins with: this one, or the longest waiting one where this one is to blame."""
    candidates = [sign for rank, sign in signs.items() if rank not in blame.ranks and sign.state != WORKS]
    mine = next((sign for sign in candidates if sign.rank == me), None)
    return mine or max(candidates, key=lambda sign: sign.still_seconds, default=None)


def sentence(seen: Sign | None, blame: Blame) -> str:
    """One line: who waits, how long, for what, who is to blame, what to do."""
    if seen is None:
        return f"{blame.why}; {blame.advice}"
    if seen.state == FAILED:
        begin = f"rank {seen.rank} could not finish step {seen.step}'s {seen.exchange}"
    elif seen.state == WAITS:
        begin = f"rank {seen.rank} has waited {seen.still_seconds:.0f} s in step {seen.step} for {seen.exchange}"
    else:
        begin = f"rank {seen.rank} has not moved for {seen.still_seconds:.0f} s at {seen.place}"
    return f"{begin}: {blame.why}; {blame.advice}"


def named(rank: int, signs: Mapping[int, Sign]) -> str:
    """A rank with what a person needs to look for it."""
    sign = signs[rank]
    return f"rank {rank} (process {sign.pid} on {sign.machine.partition('/')[0]})"


def listed(ranks: Iterable[int]) -> str:
    """`ranks 1, 2`, or the first few and how many more."""
    ranks = sorted(ranks)
    text = ", ".join(str(rank) for rank in ranks[:MAX_NAMED])
    more = f" and {len(ranks) - MAX_NAMED} more" if len(ranks) > MAX_NAMED else ""
    return f"rank{'s' * (len(ranks) > 1)} {text}{more}"
