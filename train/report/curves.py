"""Curves reduced to few points: bucket means of a long series with the envelope of its values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from train.report.reading import Array

BUCKETS = 400
SMOOTHING = 60  # a drawn point averages this fraction of the series, so that noise does not hide the trend


@dataclass(frozen=True)
class Curve:
    """P points: the mean of each bucket and around it, the smallest and the largest value at it."""

    x: Array  # [P]
    raw: Array  # [P] mean of the bucket
    mean: Array  # [P] mean over neighbouring buckets too
    low: Array  # [P]
    high: Array  # [P]

    @property
    def has_envelope(self) -> bool:
        """Whether any bucket has more than one value."""
        return bool((self.high > self.low).any())


def downsample(x: Array, y: Array, buckets: int = BUCKETS, exact: bool = False) -> Curve:
    """Reduce a series to at most `buckets` points, keeping minima and maxima.

    Each point is the mean over a window centred on its bucket, at most 1/SMOOTHING of the series wide and
    narrower towards the beginning, so that a steep start stays steep. The extremes are those of the bucket
    (three values at least), so that a single bad step stays visible. With `exact` nothing is smoothed.
    """
    count = len(x)
    edges = np.linspace(0, count, min(buckets, count) + 1).astype(int)
    start, stop = edges[:-1], edges[1:]
    near = 0 if exact or count < SMOOTHING else 1
    pairs = list(zip(np.maximum(0, start - near), np.minimum(count, stop + near), strict=True))
    low, high = np.array([y[a:b].min() for a, b in pairs]), np.array([y[a:b].max() for a, b in pairs])
    middle, raw = (np.add.reduceat(values, start) / (stop - start) for values in (x, y))
    mean = raw if exact else smooth_around(raw, len(raw) // (2 * SMOOTHING))
    return Curve(middle, raw, np.clip(mean, low.min(), high.max()), low, high)


def smooth_around(y: Array, reach: int) -> Array:
    """Return means over up to `reach` values on either side, at the start only as many as precede a value."""
    sums = np.cumsum(np.insert(y, 0, 0.0))
    at = np.arange(len(y))
    before = np.minimum(reach, at)
    start, stop = at - before, np.minimum(len(y), at + before + 1)
    return (sums[stop] - sums[start]) / (stop - start)


def smooth(y: Array, window: int) -> Array:
    """Return the trailing mean over at most `window` values, shorter at the start."""
    sums = np.cumsum(np.insert(y, 0, 0.0))
    ends = np.arange(1, len(y) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def noise_window(count: int) -> int:
    """Return how many steps to average so that noise goes and shape stays: 2 % of them, 1 to 200."""
    return max(1, min(200, count // 50))


def first_below(x: Array, y: Array, limit: float) -> float | None:
    """Return the first x at which y is below `limit`, None where it never is."""
    below = np.flatnonzero(y < limit)
    return float(x[below[0]]) if len(below) else None


def settled_from(x: Array, y: Array, low: float, high: float) -> float | None:
    """Return the x from which the averaged series stays inside [low, high] to its end, else None."""
    averaged = smooth(y, noise_window(len(y)))
    outside = np.flatnonzero((averaged < low) | (averaged > high))
    if not len(outside):
        return float(x[0]) if len(x) else None
    return float(x[outside[-1] + 1]) if outside[-1] + 1 < len(x) else None
