"""The order in which the rows of all ranks are computed: by expert, then by rank, as a stable sort has it."""

from __future__ import annotations

import pytest
import torch

from parallel.expert.dispatchers import ReceiveOrder


@pytest.mark.parametrize(("ranks", "experts", "most"), [(1, 1, 5), (4, 3, 6), (3, 8, 1), (2, 5, 40), (3, 2, 0)])
def test_order_is_a_stable_sorts(ranks: int, experts: int, most: int) -> None:
    received = torch.randint(most + 1, (ranks, experts), generator=torch.Generator().manual_seed(ranks))
    expert = torch.arange(experts).repeat(ranks).repeat_interleave(received.flatten())
    wanted = expert.sort(stable=True).indices
    order, inverse = ReceiveOrder(received, len(expert), None).order
    assert torch.equal(order, wanted)
    assert torch.equal(inverse[wanted], torch.arange(len(expert)))
