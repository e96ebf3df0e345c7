"""Where the wall time of a run with restarts went; the parts add up to the wall clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

PARTS = ("useful", "saving", "lost", "detecting", "starting", "waiting", "ending")


@dataclass(frozen=True)
class Life:
    """One start of all ranks, from its begin to its end. Times are seconds since 1970."""

    begin: float
    end: float
    finished: tuple[tuple[int, float], ...]  # (step, when it was finished)
    base: int  # step it started from
    kept: int  # step of the newest checkpoint at its end
    blocked_seconds: float  # training waited so long for saves
    saves: int
    is_fault: bool


def after(end: float, life: Life) -> Life:
    """The life without a time before ``end``: the clock of the machine that noted the last one may be ahead."""
    if life.begin >= end:
        return life
    finished = tuple((step, max(when, end)) for step, when in life.finished)
    return replace(life, begin=end, end=max(life.end, end), finished=finished)


def parts_of(lives: Sequence[Life], now: float | None = None) -> dict[str, float]:
    """Seconds by part, from the first begin to ``now``, by default the last end.

    useful: steps that a later start did not repeat. saving: training waited for checkpoints. lost: steps after the
    checkpoint from which the next start went on. detecting: from the last finished step to the end of all ranks, after
    a fault. ending: the same without a fault. starting: from the begin to the first finished step. waiting: pauses.
    """
    parts = dict.fromkeys(PARTS, 0.0)
    for life, following in zip(lives, [*lives[1:], None], strict=True):
        if following is not None:
            parts["waiting"] += following.begin - life.end
        elif now is not None:
            parts["waiting"] += now - life.end
        if not life.finished:
            parts["starting"] += life.end - life.begin
            continue
        first, last = life.finished[0][1], life.finished[-1][1]
        parts["starting"] += first - life.begin
        parts["detecting" if life.is_fault else "ending"] += life.end - last
        kept = life.kept if following is None else min(following.base, life.finished[-1][0])
        until = max([when for step, when in life.finished if step <= kept], default=first) if life.is_fault else last
        parts["lost"] += last - until
        blocked = min(life.blocked_seconds, until - first)
        parts["saving"] += blocked
        parts["useful"] += until - first - blocked
    return parts


def summary(lives: Sequence[Life], now: float | None = None) -> dict[str, Any]:
    """The parts, availability (useful and saving over the wall clock) and what a Poisson process of faults predicts.

    With a mean time M between faults (of time that trains), a recovery R (detecting, waiting and starting) and T
    between checkpoints, a fault costs R + T/2, so that availability is M / (M + R + T/2), the first start apart.
    """
    end = lives[-1].end if now is None else max(now, lives[-1].end)
    parts, wall = parts_of(lives, end), end - lives[0].begin
    faults = sum(life.is_fault for life in lives)
    trained = parts["useful"] + parts["saving"] + parts["lost"]
    found: dict[str, Any] = {"wall_seconds": wall, "starts": len(lives), "faults": faults, **parts}
    found["availability"] = (parts["useful"] + parts["saving"]) / wall if wall > 0 else 0.0
    first_start = (lives[0].finished[0][1] if lives[0].finished else lives[0].end) - lives[0].begin
    found["first_start_seconds"] = first_start
    if not faults:
        return found
    recovery = (parts["detecting"] + parts["starting"] - first_start + parts["waiting"]) / faults
    between = trained / faults
    saves = sum(life.saves for life in lives)
    interval = trained / saves if saves else trained
    found["mean_seconds_between_faults"] = between
    found["mean_recovery_seconds"] = recovery
    found["mean_lost_seconds"] = parts["lost"] / faults
    cost = recovery + interval / 2
    expected = between / (between + cost) if between + cost > 0 else 0.0
    found["expected_availability"] = expected * (1 - first_start / wall if wall > 0 else 0.0)
    return found


def describe(found: dict[str, Any]) -> list[str]:
    """The summary in lines for a person."""
    wall = found["wall_seconds"]
    share = [f"{name} {found[name]:.1f} s ({found[name] / max(wall, 1e-9):.1%})" for name in PARTS if found[name] > 0]
    starts, faults = found["starts"], found["faults"]
    lines = [f"{wall:.1f} s in {starts} start{'s' * (starts != 1)}: {', '.join(share)}"]
    if faults:
        lines.append(
            f"availability {found['availability']:.2%} with {faults} fault{'s' * (faults != 1)} in "
            f"{found['mean_seconds_between_faults'] * faults:.1f} s of training; "
            f"recovery {found['mean_recovery_seconds']:.1f} s, lost steps {found['mean_lost_seconds']:.1f} s each; "
            f"a Poisson process of faults gives {found['expected_availability']:.2%}"
        )
    return lines
