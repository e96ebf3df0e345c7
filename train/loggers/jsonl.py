"""metrics.jsonl and routing.jsonl: one line per step, and what a resumed run does with older lines."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.checkpoint.files import sync_folder
from train.config import Config
from train.run_dir.files import LineFile, Note, remove_quietly
from train.run_dir.sealed import DamagedError, seal_line, unseal_line, unseal_lines

if TYPE_CHECKING:
    from torch import Tensor

METRICS, ROUTING, SUPERSEDED = "metrics.jsonl", "routing.jsonl", "superseded.jsonl"


def step_of_line(line: bytes) -> int | None:
    """The step of a line of metrics.jsonl or routing.jsonl; None where it cannot be read, or has changed."""
    try:
        return step_of_row(unseal_line(line))
    except ValueError:
        return None


def step_of_row(row: dict[str, Any]) -> int | None:
    step = row.get("step")
    return step if type(step) is int and step > 0 else None


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The readable lines of a file of metrics, in their order; none where there is no file.

    A note on stderr says how many lines have changed since they were written: they are left out.
    """
    if not path.is_file():
        return
    changed: list[int] = []
    for number, row in enumerate(unseal_lines(path), 1):
        if isinstance(row, DamagedError):
            changed.append(number)
        elif not isinstance(row, ValueError) and step_of_row(row) is not None:
            yield row
    if changed:
        print(
            f"note: {path}: {len(changed)} lines have changed since they were written and are left out, the first is "
            f"line {changed[0]}",
            file=sys.stderr,
        )


@dataclass
class Moved:
    """How many lines `move_after` moved."""

    later: int = 0  # of steps that are trained again
    unreadable: int = 0
    repeated: int = 0  # an older line of a step that has a newer one
    steps: list[int] = field(default_factory=list)  # of the lines that stay


def move_after(path: Path, step: int, target: Path) -> Moved:
    """Keep one line for each step up to ``step`` in ``path``, in their order; append all other lines to ``target``.

    Nothing is written where every line stays. Raises OSError; then no line is lost, and some may be in both files.
    """
    if not path.is_file():
        return Moved()
    with path.open("rb") as lines:
        found = [step_of_line(line) for line in lines]
    newest = {line_step: number for number, line_step in enumerate(found)}
    stays = [
        line_step is not None and line_step <= step and newest[line_step] == number
        for number, line_step in enumerate(found)
    ]
    in_order = [line_step for line_step, kept in zip(found, stays, strict=True) if kept and line_step is not None]
    moved = Moved(steps=sorted(in_order))
    moved.unreadable = found.count(None)
    moved.later = sum(line_step is not None and line_step > step for line_step in found)
    moved.repeated = len(found) - moved.unreadable - moved.later - len(in_order)
    if all(stays) and in_order == moved.steps and _ends_with_line_feed(path):
        return moved
    partial = path.with_suffix(".partial")
    try:
        with path.open("rb") as lines, partial.open("wb") as kept, target.open("ab") as others:
            staying = []
            for line, line_step, line_stays in zip(lines, found, stays, strict=True):
                whole = line if line.endswith(b"\n") else line + b"\n"
                if line_stays:
                    staying.append((line_step or 0, whole))
                else:
                    others.write(whole)
            for _, whole in sorted(staying, key=lambda pair: pair[0]):
                kept.write(whole)
            for file in (others, kept):
                file.flush()
                os.fsync(file.fileno())
        sync_folder(target.parent)  # the moved lines are safe before the old file goes
        partial.replace(path)
        sync_folder(path.parent)
    except OSError:
        remove_quietly(partial)
        raise
    if not target.stat().st_size:
        target.unlink()
    return moved


def _ends_with_line_feed(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 1))
        return size == 0 or file.read() == b"\n"


def missing_steps(steps: list[int]) -> str:
    """The gaps between ascending steps in words, for instance `4-6, 9`; empty without gaps."""
    gaps = [(low + 1, high - 1) for low, high in pairwise(steps) if high - low > 1]
    shown = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in gaps[:4])
    return shown + (f" and {len(gaps) - 4} more gaps" if len(gaps) > 4 else "")


class JsonLines:
    """Appends one object per step; floats keep their bits (Python writes the shortest exact form)."""

    def __init__(self, config: Config, resumed_step: int, note: Note) -> None:
        folder = self.folder = config.run.folder
        self.note = note
        self.routing_every = config.logging.routing_every
        continues = resumed_step > 0 and config.checkpoint.resume in ("auto", "never")  # not another run's checkpoint
        if continues and (folder / METRICS).is_file() and next(rows(folder / METRICS), None) is None:
            note(f"{folder / METRICS} has no readable line, though the run is at step {resumed_step}")
        self._tidy(folder / METRICS, resumed_step, folder / SUPERSEDED, note)
        self._tidy(folder / ROUTING, resumed_step, folder / f"routing-{SUPERSEDED}", note)
        self.metrics, self.routing = LineFile(folder / METRICS, note), LineFile(folder / ROUTING, note)

    def write(self, metrics: dict[str, Any], counts: Tensor, biases: Tensor) -> None:
        self.metrics.write(seal_line(metrics))
        if self.routing_every and (metrics["step"] % self.routing_every == 0 or metrics["step"] == 1):
            row = {"step": metrics["step"], "counts": counts.tolist(), "bias": biases.tolist()}
            self.routing.write(seal_line(row))

    def rewind(self, step: int) -> None:
        """Move the lines of the steps after ``step`` to the superseded files."""
        for lines, target in ((self.metrics, SUPERSEDED), (self.routing, f"routing-{SUPERSEDED}")):
            lines.flush()
            try:
                move_after(lines.path, step, self.folder / target)
            except OSError as error:
                self.note(f"{lines.path}: lines after step {step} stay beside the new ones: {error.strerror or error}")

    def flush(self) -> None:
        self.metrics.flush()
        self.routing.flush()

    def close(self) -> None:
        self.metrics.close()
        self.routing.close()

    @staticmethod
    def _tidy(path: Path, step: int, target: Path, note: Note) -> None:
        """Move the lines that a resumed run writes again, and say so."""
        try:
            moved = move_after(path, step, target)
        except OSError as error:
            note(f"{path}: lines after step {step} stay beside the new ones: {error.strerror or error}")
            return
        if path.name == METRICS:
            if moved.later:
                note(
                    f"{moved.later} logged steps after step {step} have no checkpoint: they are trained again, and "
                    f"their old lines are kept in {target.name}"
                )
            if gaps := missing_steps([*moved.steps, step + 1]):
                note(f"{path}: the lines of steps {gaps} are missing")
        if moved.unreadable or moved.repeated:
            note(
                f"{path}: lines that cannot be read, or have changed ({moved.unreadable}), and of steps that occur "
                f"again ({moved.repeated}) are moved to {target.name}"
            )
