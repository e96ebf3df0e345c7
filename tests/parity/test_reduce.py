"""Sums over ranks that enter the update do not depend on the order in which a reduction adds."""

from __future__ import annotations

import torch
import torch.distributed as dist

from parallel.reduce import sum_in_one_collective
from tests.support.pool import pool

LARGE = 2.0**60
OF_RANKS = [LARGE, 1.0, -LARGE, 3.0]  # by rank 3.0; in other orders up to 4.0


def summed() -> tuple[list[float], list[float]]:
    rank = dist.get_rank()
    numbers, others = sum_in_one_collective(torch.tensor([OF_RANKS[rank], float(rank)]), torch.full((2, 1), 0.5))
    return numbers.tolist(), others.flatten().tolist()


def test_sums_follow_rank_order() -> None:
    assert pool(4).run(summed) == [([3.0, 6.0], [2.0, 2.0])] * 4


def not_a_number() -> list[float]:
    value = float("nan") if dist.get_rank() == 1 else 1.0
    return sum_in_one_collective(torch.tensor([value, 1.0]))[0].tolist()


def test_nan_stays_in_its_element() -> None:
    for first, second in pool(4).run(not_a_number):
        assert first != first
        assert second == 4.0
