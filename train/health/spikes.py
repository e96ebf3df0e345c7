"""Spikes of a positive number: robust standard deviations above the last steps, on a logarithmic scale.

Every rank decides for itself from numbers that all have, so only operations are used whose result IEEE 754 fixes: the
C library's logarithm may differ in its last bit between processors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

LN_2 = 0.6931471805599453
TERMS = 18  # of the series, whose argument is at most 1/3: the rest is below 2^-53
SMALLEST = 1e-300  # what is not above it counts as this
NORMAL_SCALE = 1.4826  # median distance from the median → standard deviation of a normal distribution
# Least standard deviations of a logarithm. A gradient norm has a long tail above its median: on the quick start's clean
# curve 5 σ of what most steps show. With 6 σ a spike is at least 6 % more loss or 1.8 times the norm
LEAST_OF_LOSS, LEAST_OF_NORM = 0.01, 0.1


def logarithm(value: float) -> float:
    """Natural logarithm from basic operations: ln m = 2·artanh((m - 1)/(m + 1)) for the mantissa m in [1/2, 1)."""
    mantissa, exponent = math.frexp(max(value, SMALLEST))
    z = (mantissa - 1.0) / (mantissa + 1.0)
    square, total = z * z, 0.0
    for number in range(TERMS, -1, -1):
        total = total * square + 1.0 / (2 * number + 1)
    return exponent * LN_2 + 2.0 * z * total


def deviation(window: Sequence[float], value: float, size: int, least: float) -> float | None:
    """Robust standard deviations, at least ``least``, of ``value`` above `level`, all logarithms.

    The spread is that around a line through the medians of the window's halves: a loss that falls fast early in the
    training would hide its spikes otherwise. None while the window has less than half of its ``size``.
    """
    if len(window) < max(size // 2, 4):
        return None
    half = len(window) // 2
    slope = (median(window[-half:]) - median(window[:half])) / (len(window) - half)
    straight = [one - slope * position for position, one in enumerate(window)]
    middle = median(straight)
    spread = NORMAL_SCALE * median(abs(one - middle) for one in straight)
    return (value - level(window)) / max(spread, least)


def level(window: Sequence[float]) -> float:
    """The median of the newer part of a window: what a value is compared with."""
    return median(window[-recent_steps(window) :])


def recent_steps(window: Sequence[float]) -> int:
    """How many steps `level` looks at."""
    return max(4, len(window) // 4)


def push(window: list[float], value: float, size: int) -> None:
    """Append to a window of at most ``size``."""
    window.append(value)
    del window[: max(0, len(window) - size)]
