"""The starts of a run with restarts: where the wall time went, and how each start ended."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from train.report.numbers import DASH, duration, percent
from train.report.reading import RunData, number

SMALLEST = 5e-4  # share of the wall time from which a part is drawn
SHOWN = 20  # newest starts in the table
LAST_TIME = 1e11  # seconds since 1970 that a date can show
# Parts of the wall time in launch.jsonl → style of their colour, and what they mean
PARTS: Mapping[str, tuple[str, str]] = {
    "useful": ("--c:var(--c2)", "steps that no later start repeated"),
    "saving": ("--c:var(--c0)", "training waited for checkpoints"),
    "lost": ("--c:var(--warn)", "steps that a later start trained again"),
    "detecting": ("--c:var(--c1)", "from the last finished step to the end of all ranks, after a fault"),
    "starting": ("--c:var(--c4)", "from a start to its first finished step"),
    "waiting": ("--c:var(--rest)", "pauses between starts"),
    "ending": ("--c:var(--c6)", "from the last finished step to the end, without a fault"),
}


def starts_section(run: RunData) -> str:
    """The section as HTML; empty where nothing restarts the run."""
    ends = [row for row in run.starts if row.get("event") == "end"]
    if not ends:
        return ""
    return shares(totals(run.starts)) + table(ends)


def totals(journal: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Sums over the commands that have ended: each writes its totals in its last line."""
    found: dict[str, float] = {}
    for row in journal:
        if row.get("event") == "totals":
            for name in (*PARTS, "wall_seconds", "faults", "first_start_seconds"):
                value = number(row.get(name))
                found[name] = found.get(name, 0.0) + (value if math.isfinite(value) else 0.0)
    return found


def availability(found: Mapping[str, float]) -> float | None:
    """Useful and saving over the wall clock; None before a command has ended."""
    wall = found.get("wall_seconds", 0.0)
    return (found["useful"] + found["saving"]) / wall if wall > 0 else None


def shares(found: Mapping[str, float]) -> str:
    """A bar of the wall time by part, its legend, and the sentence on faults."""
    share = availability(found)
    if share is None:
        return ""
    wall = found["wall_seconds"]
    present = [(name, *PARTS[name], found[name]) for name in PARTS if found[name] > SMALLEST * wall]
    bar = "".join(
        f'<i style="{style};flex:{seconds:.6g}" title="{name} {escape(duration(seconds))}: {meaning}"></i>'
        for name, style, meaning, seconds in present
    )
    keys = "".join(
        f'<span style="{style}" title="{meaning}"><i></i>{name} {duration(seconds)} ({percent(seconds / wall)})</span>'
        for name, style, meaning, seconds in present
    )
    faults = int(found["faults"])
    text = f"Availability {percent(share)} of {duration(wall)}"
    if faults:
        trained = found["useful"] + found["saving"] + found["lost"]
        recovery = (found["detecting"] + found["starting"] - found["first_start_seconds"] + found["waiting"]) / faults
        text += (
            f", with {faults} {'fault' if faults == 1 else 'faults'}: one in {duration(trained / faults)} of training; "
            f"{duration(recovery)} to recover and {duration(found['lost'] / faults)} of lost steps each"
        )
    return f"<p>{text}.</p><div class=shares>{bar}</div><p class=keys>{keys}</p>"


def table(ends: Sequence[Mapping[str, Any]]) -> str:
    """A row for each of the newest starts."""
    head = "".join(f"<th>{name}</th>" for name in ("ended", "cause", "ranks", "step", "code", "to the first step"))
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells(end))}</tr>" for end in ends[-SHOWN:])
    hidden = len(ends) - SHOWN
    more = (
        f"<p>{hidden} earlier {'start is' if hidden == 1 else 'starts are'} in launch.jsonl.</p>" if hidden > 0 else ""
    )
    return f"<div class=scrolled><table><tr>{head}</tr>{rows}</table></div>{more}"


def cells(end: Mapping[str, Any]) -> list[str]:
    """The cells of a start; what a line does not have is a dash."""
    when, first = (number(end.get(name)) for name in ("time", "first_step_seconds"))
    ranks = end.get("ranks")
    known = 0 <= when < LAST_TIME
    return [
        datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if known else DASH,
        str(end.get("cause", DASH)).replace("_", " "),
        ", ".join(map(str, ranks)) if isinstance(ranks, list) and ranks else DASH,
        str(end.get("step", DASH)),
        str(end.get("code", DASH)),
        duration(first),
    ]
