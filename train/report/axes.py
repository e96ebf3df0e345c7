"""The horizontal axes of a page: steps, tokens, FLOPs or time, one scale for all charts, and marks of events."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from train.report.labels import spread
from train.report.numbers import Formatter, compact, exponent, linear_ticks
from train.report.reading import Array, RunData
from train.report.scale import WIDTH, Scale, extent

KNOTS = 400  # points of the table from steps to another axis; between them it is linear
TICK_GAP = 0.18  # of the width, between the last round number and the end of the data
DENSE = 0.55  # of the width, from which a number is left out on a phone
MARK_GAP = 0.07  # of the width, between the numbers of two marks
UNITS = ((86400, "days"), (3600, "hours"), (60, "minutes"))
NUMBERED = 12  # marks with a number; more would not fit a phone


@dataclass(frozen=True)
class ChartMark:
    """Something that happened before ``step``: the end of the warm-up, another mixture."""

    step: float
    text: str


@dataclass(frozen=True)
class HorizontalAxis:
    """One choice of horizontal axis. ``values`` are, for each run, those at its knots."""

    key: str
    name: str
    title: str  # on its button
    values: list[Array]
    scale: Scale
    write: Formatter


class Axes:
    """The horizontal axes that all runs of a page have; `default` is tokens if they are known.

    A curve's positions are steps of its run; the tables translate them.
    """

    def __init__(self, runs: Sequence[RunData], marks: Sequence[ChartMark] = ()) -> None:
        runs = [run for run in runs if run.columns]
        self.knots = [_thinned(run.columns["step"]) for run in runs]
        self.numbers = {id(run): number for number, run in enumerate(runs)}
        self.all: list[HorizontalAxis] = []
        for key, title in (("tokens", "tokens"), ("step", "steps"), ("flops", "FLOPs"), ("seconds", "time")):
            values = [_at(run, key, knots) for run, knots in zip(runs, self.knots, strict=True)]
            if values and all(np.isfinite(one).all() for one in values):
                self.all.append(_axis(key, title, values))
        last = max((float(one[-1]) for one in self.knots), default=0.0)
        self.marks = [mark for mark in marks if mark.step <= last]

    @property
    def default(self) -> HorizontalAxis:
        return self.all[0]

    def number(self, run: RunData) -> int:
        """The run's place in the tables."""
        return self.numbers[id(run)]

    def share(self, steps: Array | float, run: int = 0, axis: HorizontalAxis | None = None) -> Array:
        """Positions from 0 (left) to 1 (right) of steps of a run."""
        axis = axis or self.default
        return axis.scale.share(np.interp(steps, self.knots[run], axis.values[run]))

    def across(self, axis: HorizontalAxis | None = None, target: int = 4) -> str:
        """The numbers under the frame, to the last one of the data; the axis names itself behind them."""
        axis = axis or self.default
        ticks = end_ticks(axis.scale, target)
        texts = [axis.write(tick) for tick in ticks]
        shares = [float(axis.scale.share(tick)) for tick in ticks]
        spans = "".join(
            f"<span{_side(share)} style=left:{100 * share:.2f}%>{text}</span>"
            for share, text in zip(shares, texts, strict=True)
        )
        return f"{spans}<em>{escape(axis.name)}</em>"

    def mark_lines(self, axis: HorizontalAxis | None = None) -> str:
        """Path data of the marks' vertical lines."""
        return "".join(f"M{round(float(self.share(mark.step, 0, axis)) * WIDTH)} 0V1000" for mark in self.marks)

    def mark_numbers(self, axis: HorizontalAxis | None = None) -> str:
        """The marks' numbers above the frame, never over each other."""
        shares = [float(self.share(mark.step, 0, axis)) for mark in self.marks[:NUMBERED]]
        places = spread(shares, MARK_GAP, 0.0, 1.0)
        return "".join(f"<b style=left:{100 * place:.1f}%>{number}</b>" for number, place in enumerate(places, start=1))

    def data(self) -> dict[str, object]:
        """What the page's script needs to change the axis."""
        return {
            "knots": [[round(float(step), 1) for step in knots] for knots in self.knots],
            "axes": {
                axis.key: {
                    "name": axis.name,
                    "low": axis.scale.low,
                    "high": axis.scale.high,
                    "at": [np.rint(axis.scale.share(one) * WIDTH).astype(int).tolist() for one in axis.values],
                    "across": self.across(axis),
                    "lines": self.mark_lines(axis),
                    "marks": self.mark_numbers(axis),
                }
                for axis in self.all
            },
        }


def end_ticks(scale: Scale, target: int) -> list[float]:
    """Round numbers and the end of the scale; round numbers too near to the end are left out."""
    ticks = [tick for tick in linear_ticks(scale.low, scale.high, target) if float(scale.share(tick)) < 1 - TICK_GAP]
    return [*ticks, scale.high]


def _side(share: float) -> str:
    """The class of a number: how it is aligned, and whether a narrow frame has no room for it."""
    if share > 0.94 or share < 0.04:
        return " class=last" if share > 0.5 else " class=first"
    return " class=dense" if share > DENSE else ""


def _thinned(steps: Array) -> Array:
    return steps[np.unique(np.linspace(0, len(steps) - 1, min(KNOTS, len(steps))).astype(int))]


def _at(run: RunData, key: str, steps: Array) -> Array:
    values = run.position(key)
    known = np.isfinite(values)
    if not known.any():
        return np.full(len(steps), math.nan)
    return np.interp(steps, run.columns["step"][known], values[known])


def _axis(key: str, title: str, values: list[Array]) -> HorizontalAxis:
    name, write = {"flops": ("FLOPs", exponent), "step": ("step", _count)}.get(key, (key, _count))
    if key == "seconds":
        longest = max(float(one.max()) for one in values)
        unit, name = next((pair for pair in UNITS if longest >= 2 * pair[0]), (1, "seconds"))
        values = [one / unit for one in values]
    low, high = extent(np.concatenate(values))
    scale = Scale(0.0 if 0 < low < 0.25 * high else low, high)
    return HorizontalAxis(key, name, title, values, scale, write)


def _count(value: float) -> str:
    return compact(value, 4 if value < 1e4 else 3)
