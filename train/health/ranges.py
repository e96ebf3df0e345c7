"""Ranges of samples that are left out of the data, and where a position in the rest is."""

from __future__ import annotations

from collections.abc import Iterable


class SampleRanges:
    """Sorted, disjoint ranges [start, stop) of sample numbers that are not trained on."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.replace(ranges)

    def replace(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Forget the present ranges and take these."""
        self.ranges = []
        for start, stop in ranges:
            self.add(start, stop)

    def add(self, start: int, stop: int) -> None:
        """Leave out the samples ``start`` ... ``stop - 1`` too; ranges that touch become one."""
        apart = [(low, high) for low, high in self.ranges if high < start or low > stop]
        joined = [(low, high) for low, high in self.ranges if not (high < start or low > stop)]
        low = min([start, *(low for low, _ in joined)])
        high = max([stop, *(high for _, high in joined)])
        self.ranges = sorted([*apart, (low, high)])

    def place(self, position: int) -> int:
        """The number of the ``position``-th sample (from 0) that is not left out."""
        for start, stop in self.ranges:
            if position < start:
                break
            position += stop - start
        return position

    def count(self, start: int, stop: int) -> int:
        """How many of the samples ``start`` ... ``stop - 1`` are left out."""
        return sum(max(0, min(stop, high) - max(start, low)) for low, high in self.ranges)
