"""Counts of rows that arrive with other bits end their rank at once, before a wrong exchange or allocation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longcat.dispatch import Routing
from longcat.errors import LocalCorruptionError
from longcat.faults import Place, install_hook
from parallel.collectives.streams import CURRENT_STREAM
from parallel.expert import split_sizes
from parallel.expert.dispatchers import AllToAllDispatcher
from parallel.expert.split_sizes import SplitSizes
from parallel.pipeline.engine import unwrapped_errors
from parallel.sdc.finding import Site
from parallel.sdc.inject import corrupt
from parallel.sdc.ledger import LEDGER
from parallel.sdc.spec import InjectedFault, Pattern
from tests.support.pool import close_pools, pool


@pytest.fixture(scope="module", autouse=True)
def _pools() -> Iterator[None]:
    yield
    close_pools()


def routings() -> list[Routing]:
    """Of four FFN and two identity experts, in two chunks."""
    chunks = [torch.tensor([[0, 4], [3, 1]]), torch.tensor([[2, 5], [2, 0]])]
    return [Routing(chunk, torch.ones(chunk.shape), 4, 6) for chunk in chunks]


def counted(strike: Callable[[Tensor], Any]) -> tuple[list[list[int]], dict[str, Any]]:
    """Rows from each rank in each of two chunks; rank 1's copy of the counts is struck. Or the finding."""
    rank = dist.get_rank()
    LEDGER.begin(rank, 7, recording=False)
    install_hook(lambda where, name, tensor: strike(tensor) if rank == 1 else None)
    try:
        assert dist.group.WORLD is not None
        return SplitSizes(routings(), dist.group.WORLD, CURRENT_STREAM, 3).received, {}
    except LocalCorruptionError as error:
        return [], error.details["finding"]
    finally:
        install_hook(None)


def received(place: tuple[int, int, int] | None, bit: int) -> tuple[list[list[int]], dict[str, Any]]:
    def flip(tensor: Tensor) -> None:
        if place is not None:
            tensor[place[1:]] ^= 1 << bit

    return counted(flip)


def received_struck(pattern: Pattern, seeds: range) -> list[tuple[int, int, bool]]:
    """(seed, elements changed, whether it is found) of faults in the counts that rank 1 receives."""
    found = []
    for seed in seeds:
        fault = InjectedFault(Place.payload, pattern, seed=seed, factor=(1.0625, 2.0, -1.0)[seed % 3])
        changed: list[int] = []
        _, finding = counted(lambda tensor: changed.append(corrupt(tensor, fault)))  # noqa: B023
        found.append((seed, sum(changed), bool(finding)))
    return found


def dispatched(wrong: list[int]) -> dict[str, Any]:
    """The finding of a dispatch whose ranks count their selections wrongly, by so much for each FFN expert."""
    LEDGER.begin(dist.get_rank(), 7, recording=False)
    assert dist.group.WORLD is not None
    plain = split_sizes.count_selections
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_sizes, "count_selections", lambda *given: plain(*given) + torch.tensor([*wrong, 0, 0]))
        try:
            AllToAllDispatcher(dist.group.WORLD, 3).start_dispatch([(torch.randn(2, 4), one) for one in routings()])
        except LocalCorruptionError as error:
            return dict(error.details["finding"])
    return {}


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


@pytest.mark.parametrize("pattern", Pattern)
def test_counts_struck_in_any_way_are_noticed(pattern: Pattern) -> None:
    """Also a row that another replaces, which agrees with its own check word."""
    _, trials = pool(2).run(received_struck, pattern, range(60))
    struck = [(seed, found) for seed, changed, found in trials if changed]
    assert len(struck) > 15 and all(found for _, found in struck), struck
    assert not any(found for _, changed, found in trials if not changed)


@pytest.mark.parametrize("bit", [0, 56])
@pytest.mark.parametrize("place", [(1, 0, 1), (1, 1, 2)], ids=["count", "check word"])
def test_struck_counts_end_their_rank(place: tuple[int, int, int], bit: int) -> None:
    sound, struck = pool(2).run(received, place, bit)
    assert sound == ([[2, 1], [2, 1]], {})
    assert (struck[1]["kind"], struck[1]["step"], struck[1]["layer"]) == ("message", 7, 3)
    assert [one["rank"] for one in struck[1]["suspects"]] == [0, 1]


@pytest.mark.parametrize("wrong", [[1, 0, 0, 0], [1, -1, 0, 0], [1 << 56, 0, 0, 0]], ids=str)
def test_counts_that_were_never_right_end_their_rank(wrong: list[int]) -> None:
    """Before it sends rows that its peers do not expect, or that they would take for those of other experts."""
    for rank, finding in enumerate(pool(2).run(dispatched, wrong)):
        assert [one["rank"] for one in finding["suspects"]] == [rank] and finding["layer"] == 3
