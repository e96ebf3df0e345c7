"""What a person reads when restarts were given up: gave_up.txt in the run folder."""

from __future__ import annotations

import shlex
import textwrap
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

from launch.supervisor.causes import ADVICE, Cause, Fault
from launch.supervisor.decide import End
from launch.supervisor.ledger import Life, describe, summary
from launch.supervisor.node_choice import Choice, Start, strikes_of, struck
from train.new_run import words

SHOWN = 20  # newest starts on the page, and nodes
WIDTH = 110


def page(
    run: str,
    command: Sequence[str],
    members: Sequence[str],
    history: Sequence[Start],
    lives: Sequence[Life],
    end: End,
    choice: Choice,
) -> str:
    """The page: what happened, what to do, each start with its time, steps, cause and ranks, nodes, and the ledger.

    Args:
        history: the command's starts.
        lives: the same, after those of commands before it of a run that had not ended.
    """
    last = history[-1].fault if history else None
    lines = [f"The run {run} has ended with exit code {end.code}. longcat train does not start it again.", ""]
    lines += ["What happened", *_wrapped(_capital(last.headline if last else "no ranks were started"))]
    lines += _wrapped(_capital(end.reason)) if end.reason else []
    if history:
        kept = lives[-1].kept
        newest = f"its newest checkpoint is that of step {kept}" if kept else "it has no checkpoint"
        lines += [f"  The run got to step {history[-1].step}; {newest}."]
    lines += ["", "What to do", *_to_do(run, command, last, lives, end, several=choice.counts[0] > 1)]
    lines += _last_lines(last) if last else []
    if history:
        lines += ["", f"Starts ({_of(len(history))})", *_starts(history, lives[-len(history) :])]
    if choice.counts[0] > 1:
        lines += ["", f"Nodes (there now: {', '.join(members[:SHOWN]) or 'none'}{', …' * (len(members) > SHOWN)})"]
        lines += _nodes(history, choice, lives[-1].end if lives else 0.0)
    if lives:
        lines += ["", "Where the time went", *_indented(describe(summary(lives)))]
    return "\n".join([*lines, "", "run.log, report.html and launch.jsonl in the run folder say more.", ""])


def _to_do(
    run: str, command: Sequence[str], last: Fault | None, lives: Sequence[Life], end: End, several: bool
) -> list[str]:
    """Numbered steps; the last one is the command: the same, or a new run's where the same would end the same way."""
    found = [part for part in dict.fromkeys((end.advice, ADVICE.get(last.cause, "") if last else "")) if part]
    kept, typed = lives[-1].kept if lives else 0, shlex.join(["longcat", "train", *command])
    again = "Then start the same command again"
    if last and last.cause == Cause.unhealthy:
        again = "Then start a new run, which may have other values"
        new = words("optim.lr", checkpoint=run if kept else None)
        replaced = {shlex.split(word)[0].partition("=")[0] for word in new}
        old = [word for word in command if word.lstrip("+").partition("=")[0] not in replaced]
        typed = " ".join([shlex.join(["longcat", "train", *old]), *new])
    again += ", on every node" if several else ""
    found.append(f"{again}; it goes on from step {kept}:" if kept else f"{again}:")
    lines = [line for number, part in enumerate(found, 1) for line in _wrapped(_capital(part), f"  {number}. ")]
    return [*lines, f"     {typed}"]


def _last_lines(fault: Fault) -> list[str]:
    kept = [line for line in fault.last_lines.splitlines() if line.strip()][-SHOWN:]
    return ["", "What the rank that failed first wrote last", *(f"  | {line[:400]}" for line in kept)] if kept else []


def _starts(history: Sequence[Start], lives: Sequence[Life]) -> list[str]:
    lines = []
    for number, (start, life) in list(enumerate(zip(history, lives, strict=True), 1))[-SHOWN:]:
        when = datetime.fromtimestamp(life.end, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        steps = f"steps {life.base + 1} to {life.finished[-1][0]}" if life.finished else "no step"
        head = f"  {number:>3}. to {when}, {life.end - life.begin:.1f} s, {steps}: "
        lines += _wrapped(start.fault.headline, head, " " * 7)
    return lines


def _nodes(history: Sequence[Start], choice: Choice, now: float) -> list[str]:
    counts = Counter(strike.node for strike in strikes_of(history, choice.earlier))
    barred, excluded = struck(history, choice, now)
    lines = []
    for name, count in counts.most_common(SHOWN):
        text = f"  {name}: {count} fault{'s' * (count != 1)}"
        if name in barred:
            text += "; computes wrongly, gets no ranks"
        elif name in excluded:
            hours = choice.window_seconds / 3600
            text += f"; excluded where others can be used (launch.max_strikes={choice.max_strikes} in {hours:g} h)"
        lines.append(text)
    return lines or ["  no faults"]


def _of(count: int) -> str:
    return str(count) if count <= SHOWN else f"{count}; the newest {SHOWN}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _indented(lines: Sequence[str]) -> list[str]:
    return [line for text in lines for line in _wrapped(text)]


def _wrapped(text: str, first: str = "  ", rest: str = "") -> list[str]:
    found = textwrap.wrap(
        " ".join(text.split()), WIDTH, initial_indent=first, subsequent_indent=rest or " " * len(first),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return found or [first.rstrip()]
