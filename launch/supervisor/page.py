"""What a person reads when restarts were given up: gave_up.txt in the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from launch.supervisor.decide import End, Start
from launch.supervisor.ledger import Life, describe, summary

GAVE_UP = "gave_up.txt"
SHOWN = 20  # newest starts on the page


def page(run: str, machine: str, history: Sequence[Start], lives: Sequence[Life], end: End) -> str:
    """The page: what happened, what to do, each start with its time, step, cause and ranks, and the ledger."""
    fault = history[-1].fault
    lines = [
        f"Run {run} on {machine} is not started again (exit code {end.code}).",
        "",
        f"What happened: {fault.cause}: {fault.message}",
        f"What to do:    {end.reason}",
        f"               The same command resumes from step {lives[-1].kept} once that is done.",
        "",
        f"Starts ({len(history)}; the newest {min(len(history), SHOWN)}):",
    ]
    for number, (start, life) in list(enumerate(zip(history, lives, strict=True), 1))[-SHOWN:]:
        ranks = f", ranks {', '.join(map(str, start.fault.ranks))}" if start.fault.ranks else ""
        when = datetime.fromtimestamp(life.end, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        lines.append(f"  {number}. {when}  step {start.step}  {start.fault.cause}{ranks}: {start.fault.message}")
    return "\n".join([*lines, "", "Where the time went:", *(f"  {line}" for line in describe(summary(lives))), ""])
