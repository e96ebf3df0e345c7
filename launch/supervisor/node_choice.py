"""Which nodes get ranks: strikes, exclusion, spare nodes, fewer nodes. Pure functions of the history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launch.supervisor.causes import STRIKES, Cause, Fault


@dataclass(frozen=True)
class Start:
    """How one start of all ranks went."""

    fault: Fault
    before: int  # newest step that the run had reached before it
    step: int  # newest step that the run has reached at its end
    base: int = 0  # step that it started from
    nodes: tuple[str, ...] = ()  # that had ranks
    ended: float = 0.0  # seconds since 1970


@dataclass(frozen=True)
class Strike:
    """A fault that a node is blamed for."""

    node: str
    time: float  # seconds since 1970
    bars: bool = False  # it computes wrongly: no rank runs there again
    fruitless: bool = False  # in a start that brought no new step


@dataclass(frozen=True)
class Choice:
    """What limits the choice of nodes."""

    counts: tuple[int, ...] = (1,)  # numbers of nodes that the run can use, largest first
    max_strikes: int = 3  # from which a node is excluded
    window_seconds: float = 86400.0  # in which strikes count
    earlier: tuple[Strike, ...] = ()  # of commands before this one


def strikes_of(history: Sequence[Start], earlier: Iterable[Strike] = ()) -> list[Strike]:
    """Every strike of a run. Those of earlier commands never bar: somebody has looked at the nodes since, perhaps."""
    own = [
        Strike(node, start.ended, start.fault.cause == Cause.corruption, start.step <= start.before)
        for start in history
        if start.fault.cause in STRIKES
        for node in start.fault.nodes
    ]
    return [*earlier, *own]


def struck(history: Sequence[Start], choice: Choice, now: float) -> tuple[set[str], set[str]]:
    """(barred nodes, nodes with as many strikes as exclude)."""
    strikes = strikes_of(history, choice.earlier)
    counts = Counter(strike.node for strike in recent(strikes, choice, now))
    barred = {strike.node for strike in strikes if strike.bars}
    return barred, {node for node, count in counts.items() if count >= choice.max_strikes}


def recent(strikes: Iterable[Strike], choice: Choice, now: float) -> list[Strike]:
    """Those that count."""
    return [strike for strike in strikes if now - strike.time <= choice.window_seconds]


def choose_nodes(
    members: Sequence[str], history: Sequence[Start], choice: Choice, now: float
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The nodes that get ranks, and those that stand by; no nodes where too few can be used.

    As many nodes as the run can use; those of the last start stay, except a straggler's where another can take its
    place. A barred node is never used. A node with too many strikes is used only if the run could not go on without it;
    of such nodes those come first that were blamed for fewer starts without a new step, then for fewer faults.

    Args:
        members: names in the order of nodes.
    """
    barred, excluded = struck(history, choice, now)
    sound = [name for name in members if name not in barred]
    last = set(history[-1].nodes) if history else set()
    strikes = recent(strikes_of(history, choice.earlier), choice, now)
    faults = Counter(strike.node for strike in strikes)
    fruitless = Counter(strike.node for strike in strikes if strike.fruitless)
    slow = set(history[-1].fault.nodes) if history and history[-1].fault.cause == Cause.straggler else set()
    for pool in ([name for name in sound if name not in excluded], sound):
        count = next((count for count in choice.counts if count <= len(pool)), 0)
        if count:
            weight = {name: (1 + fruitless[name], faults[name]) if name in excluded else (0, 0) for name in pool}
            ranked = sorted(pool, key=lambda name: (*weight[name], name in slow, name not in last))
            chosen = set(ranked[:count])
            spares = tuple(name for name in pool if name not in chosen and name not in excluded | slow)
            return tuple(name for name in members if name in chosen), spares
    return (), ()
