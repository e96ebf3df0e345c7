"""Counts of rows that arrive with other bits end their rank at once, before a wrong exchange or allocation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longcat.dispatch import Routing
from longcat.errors import LocalCorruptionError
from longcat.faults import Place, install_hook
from parallel.collectives.streams import CURRENT_STREAM
from parallel.expert.dispatchers import SplitSizes
from parallel.pipeline.engine import unwrapped_errors
from parallel.sdc.finding import Site
from parallel.sdc.ledger import LEDGER
from tests.support.pool import close_pools, pool


@pytest.fixture(scope="module", autouse=True)
def _pools() -> Iterator[None]:
    yield
    close_pools()


def received(place: tuple[int, int, int] | None, bit: int) -> tuple[list[list[int]], dict[str, Any]]:
    """Rows from each rank in each of two chunks; rank 1's copy of the counts is struck. Or the finding."""
    rank = dist.get_rank()
    LEDGER.begin(rank, 7, recording=False)

    def strike(where: Place, name: str, tensor: Tensor) -> None:
        if place is not None and rank == 1:
            tensor[place[1:]] ^= 1 << bit

    install_hook(strike)
    try:
        chunks = [torch.tensor([[0, 4], [3, 1]]), torch.tensor([[2, 5], [2, 0]])]
        routings = [Routing(chunk, torch.ones(chunk.shape), 4, 6) for chunk in chunks]
        assert dist.group.WORLD is not None
        sizes = SplitSizes(routings, dist.group.WORLD, CURRENT_STREAM, 3)
        return sizes.received, {}
    except LocalCorruptionError as error:
        return [], error.details["finding"]
    finally:
        install_hook(None)


def test_pipeline_raises_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's schedules wrap what a stage raises."""
    monkeypatch.setattr(LEDGER, "rank", 0)
    monkeypatch.setattr(LEDGER, "sites", [Site(0, "a", "cpu")])  # those of another run
    error = LEDGER.corrupt("expert counts, layer 0", 1)
    with pytest.raises(LocalCorruptionError, match="expert counts, layer 0 on rank 1 "), unwrapped_errors():
        raise RuntimeError("a stage failed to run forward") from error
    with pytest.raises(RuntimeError, match="another failure"), unwrapped_errors():
        raise RuntimeError("another failure")


def test_sound_counts_arrive() -> None:
    assert pool(2).run(received, None, 0) == [([[2, 1], [2, 1]], {}), ([[1, 2], [1, 2]], {})]


@pytest.mark.parametrize("bit", [0, 56])
@pytest.mark.parametrize("place", [(1, 0, 1), (1, 1, 2)], ids=["count", "check word"])
def test_struck_counts_end_their_rank(place: tuple[int, int, int], bit: int) -> None:
    sound, struck = pool(2).run(received, place, bit)
    assert sound == ([[2, 1], [2, 1]], {})
    assert (struck[1]["kind"], struck[1]["step"], struck[1]["layer"]) == ("message", 7, 3)
    assert [one["rank"] for one in struck[1]["suspects"]] == [0, 1]
