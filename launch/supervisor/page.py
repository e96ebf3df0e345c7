"""What a person reads when restarts were given up: gave_up.txt in the run folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

from launch.supervisor.decide import End
from launch.supervisor.ledger import Life, describe, summary
from launch.supervisor.nodes import Choice, Start, strikes_of

SHOWN = 20  # newest starts on the page


def page(
    run: str, members: Sequence[str], history: Sequence[Start], lives: Sequence[Life], end: End, choice: Choice
) -> str:
    """The page: what happened, what to do, each start with its time, step, cause and ranks, and the ledger."""
    on = ", ".join(members) if len(members) <= SHOWN else f"{len(members)} nodes"
    happened = f"{history[-1].fault.cause}: {history[-1].fault.message}" if history else "no ranks were started"
    lines = [
        f"Run {run} on {on} is not started again (exit code {end.code}).",
        "",
        f"What happened: {happened}",
        f"What to do:    {end.reason}",
        f"               The same command resumes from step {lives[-1].kept if lives else 0} once that is done.",
        "",
        f"Starts ({len(history)}; the newest {min(len(history), SHOWN)}):",
    ]
    for number, (start, life) in list(enumerate(zip(history, lives, strict=True), 1))[-SHOWN:]:
        ranks = f", ranks {', '.join(map(str, start.fault.ranks))}" if start.fault.ranks else ""
        nodes = f" on {', '.join(start.fault.nodes)}" if start.fault.nodes and len(start.nodes) > 1 else ""
        when = datetime.fromtimestamp(life.end, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        lines.append(f"  {number}. {when}  step {start.step}  {start.fault.cause}{ranks}{nodes}: {start.fault.message}")
    counts = Counter(strike.node for strike in strikes_of(history, choice.earlier))
    if any(len(start.nodes) > 1 for start in history):
        lines += ["", f"Faults by node (excluded from {choice.max_strikes} on; launch.max_strikes):"]
        lines += [f"  {name}: {count}" for name, count in counts.most_common(SHOWN)]
    time_lines = describe(summary(lives)) if lives else []
    return "\n".join([*lines, "", "Where the time went:", *(f"  {line}" for line in time_lines), ""])
