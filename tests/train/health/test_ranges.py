"""Positions of the data around ranges that are left out, against a list of what remains."""

from __future__ import annotations

import random

from train.health.ranges import SampleRanges


def test_place_counts_the_samples_that_remain() -> None:
    """1,000 sets of ranges, added in any order, overlapping or not."""
    draw = random.Random(0)
    for _ in range(1000):
        ranges, gone = SampleRanges(), set()
        for _ in range(draw.randrange(6)):
            start = draw.randrange(60)
            stop = start + draw.randrange(1, 12)
            ranges.add(start, stop)
            gone |= set(range(start, stop))
        remaining = [sample for sample in range(200) if sample not in gone]
        assert [ranges.place(position) for position in range(100)] == remaining[:100]
        assert ranges.ranges == sorted(ranges.ranges)
        assert all(low[1] < high[0] for low, high in zip(ranges.ranges, ranges.ranges[1:], strict=False))


def test_ranges_that_touch_become_one() -> None:
    ranges = SampleRanges([(8, 12), (20, 24)])
    ranges.add(12, 20)
    assert ranges.ranges == [(8, 24)]
    assert [ranges.place(position) for position in (7, 8, 9)] == [7, 24, 25]


def test_samples_left_out_are_counted_within_bounds() -> None:
    ranges = SampleRanges([(4, 8), (10, 12)])
    assert [ranges.count(*bounds) for bounds in ((0, 4), (0, 20), (5, 11), (8, 10), (11, 11))] == [0, 6, 4, 0, 0]
