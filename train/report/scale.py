"""Scales: from values to positions in a picture, linear or logarithmic, and the numbers beside it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from train.report.numbers import linear_ticks, log_ticks, tick_formatter
from train.report.reading import Array

WIDTH, HEIGHT = 2000, 1000  # units of the scaled picture, fine enough for integers


@dataclass(frozen=True)
class Scale:
    """Maps values to units of the picture, from `low` to `high`, logarithmic or not."""

    low: float
    high: float
    log: bool = False

    def share(self, values: Array | float) -> Array:
        """Return positions from 0 (low) to 1 (high), cut a little outside the frame."""
        ends = np.array([self.low, self.high])
        values = np.asarray(values, dtype=np.float64)
        if self.log:
            ends, values = np.log10(ends), np.log10(np.maximum(values, self.low * 1e-3))
        share: Array = np.clip((values - ends[0]) / (ends[1] - ends[0]), -0.05, 1.05)
        return share

    def ticks(self, target: int = 5) -> list[float]:
        """Return the round numbers to mark, about `target` of them where the axis is linear."""
        return log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high, target)


def linear_scale(values: Array, from_zero: bool = False) -> Scale:
    """A linear scale with a margin around finite values; it starts at 0 on request if none is negative."""
    low, high = extent(values, relative=0.05)
    margin = 0.05 * (high - low)
    return Scale(0.0 if from_zero and values.min() >= 0 else low - margin, high + margin)


def log_scale(values: Array) -> Scale | None:
    """A logarithmic scale with a margin around the positive ones of finite values; None without any."""
    positive = values[values > 0]
    if not len(positive):
        return None
    low, high = float(positive.min()), float(positive.max())
    margin = max(1.02, (high / low) ** 0.05)
    return Scale(low / margin, high * margin, True)


def extent(values: Array, relative: float = 1e-9) -> tuple[float, float]:
    """Return smallest and largest value, separated where they are (nearly) equal."""
    low, high = float(values.min()), float(values.max())
    least = max(abs(low), abs(high), 1e-12) * relative
    if high - low < least:
        middle = (low + high) / 2
        low, high = middle - least / 2, middle + least / 2
    return low, high


def numbers_up(scale: Scale, target: int = 5, unit: str = "") -> str:
    """Return the numbers left of the frame."""
    ticks = scale.ticks(target)
    write = tick_formatter(ticks)
    return "".join(f"<span style=bottom:{100 * float(scale.share(t)):.2f}%>{write(t)}{unit}</span>" for t in ticks)


def path(x: Array, y: Array) -> str:
    """Return path data through positions given as shares of the frame (y upwards)."""
    across, down = np.rint(x * WIDTH).astype(int), np.rint((1 - y) * HEIGHT).astype(int)
    return "M" + "L".join(f"{a} {d}" for a, d in zip(across, down, strict=True))


def line_across(scale: Scale, value: float) -> str:
    """Return path data of a horizontal line through the picture."""
    return f"M0 {round((1 - float(scale.share(value))) * HEIGHT)}H{WIDTH}"
