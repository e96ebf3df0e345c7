"""Sums over ranks that enter the update do not depend on the order in which a reduction adds."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from parallel.reduce import sum_in_one_collective, sum_in_rank_order
from tests.support.pool import pool

LARGE = 2.0**60
OF_RANKS = [LARGE, 1.0, -LARGE, 3.0]  # by rank 3.0; in other orders up to 4.0


def summed() -> tuple[list[float], list[float]]:
    rank = dist.get_rank()
    numbers, others = sum_in_one_collective(torch.tensor([OF_RANKS[rank], float(rank)]), torch.full((2, 1), 0.5))
    return numbers.tolist(), others.flatten().tolist()


def test_sums_follow_rank_order() -> None:
    assert pool(4).run(summed) == [([3.0, 6.0], [2.0, 2.0])] * 4


@pytest.mark.parametrize("rows", [1, 2, 1000])
@pytest.mark.parametrize("columns", [1, 2, 7, 40])
def test_rows_are_added_one_after_the_other(rows: int, columns: int) -> None:
    """Bit for bit, where a reduction over one column may add in pairs."""
    draw = torch.Generator().manual_seed(rows + columns)
    values = torch.randn(rows, columns, dtype=torch.float64, generator=draw)
    values *= 10.0 ** torch.randint(-8, 8, values.shape, generator=draw)
    values[:, -1] *= 0.0  # zeros of both signs
    total = torch.zeros(columns, dtype=torch.float64)
    for row in values:
        total += row
    assert torch.equal(sum_in_rank_order(values).view(torch.int64), total.view(torch.int64))


def not_a_number() -> list[float]:
    value = float("nan") if dist.get_rank() == 1 else 1.0
    return sum_in_one_collective(torch.tensor([value, 1.0]))[0].tolist()


def test_nan_stays_in_its_element() -> None:
    for first, second in pool(4).run(not_a_number):
        assert first != first
        assert second == 4.0
