"""Ranks of a pipeline that share traces, imbalances between those that were traced, and state at 560B."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch

import parallel.parallelize
from launch.plan.cluster import PRESETS
from launch.plan.ranks import kind_of, summaries
from launch.plan.summary import Summary, between, peak_bytes, summarise
from launch.plan.trace import Scope, fake_topology, trace
from longcat.model import LongCat
from parallel.mesh import resolve_sizes
from tests.launch.plan.allocations import COMMON
from tests.support.distributed import run_ranks
from train.compose import compose
from train.config import ComputeDtype, Config
from train.run import build_state

LONG = 1200.0
AS_REPORTED = ["model=flash", "train.dtype=bfloat16", "train.sequence_length=8192", "parallel.ep=32", "parallel.cp=8"]
FLASH = {
    256: [*AS_REPORTED, "train.global_batch_size=32"],
    10240: [*AS_REPORTED, "train.global_batch_size=1280", "parallel.pp=10", "parallel.schedule=zbv"],
}


def test_ten_thousand_ranks_are_of_few_kinds() -> None:
    config = compose(FLASH[10240])
    sizes = resolve_sizes(config.parallel, 10240)
    kinds = [kind_of(config, sizes, place) for place in range(sizes.pp)]
    assert len(set(kinds)) <= 5
    assert kinds[0][0][1] and kinds[0][-1][2]  # zbv: the first rank has the embedding and the head
    assert not any(embedding or head for kind in kinds[1:] for _, embedding, head in kind)


def test_between_two_imbalances() -> None:
    low, high = (Summary({("state",): 5.0, ("peak", 0): peak}, (2,), 1) for peak in (10.0, 20.0))
    assert between(low, high, 0.25).numbers == {("state",): 5.0, ("peak", 0): 12.5}


class Built(Exception):
    """The models of a rank, before they have values."""

    def __init__(self, models: list[LongCat]) -> None:
        super().__init__()
        self.models = models


def stop(models: list[LongCat], *unused: Any) -> None:
    raise Built(models)


def module_bytes(config: Config, ranks: int, rank: int) -> int:
    """Bytes of the weights, moments and buffers of a rank's real modules, which are on the meta device."""
    sizes = resolve_sizes(config.parallel, ranks)
    with (
        fake_topology(sizes, rank, ranks) as topology,
        patch.object(parallel.parallelize, "materialise", lambda *_: None),
        patch.object(parallel.parallelize, "ShardedAdamW", stop),
        pytest.raises(Built) as caught,
    ):
        build_state(config, topology)
    assert isinstance(caught.value, Built)
    models = caught.value.models
    weights = [one.to_local() for model in models for one in model.parameters()]
    assert all(one.device.type == "meta" and one.dtype is torch.float32 for one in weights)
    buffers = sum(one.nbytes for model in models for one in model.buffers())
    return 3 * sum(one.nbytes for one in weights) + buffers


def states(ranks: int) -> list[tuple[float, list[int]]]:
    """(bytes that the plan gives, bytes of the modules of the stage's first and last rank) of each place."""
    config = compose(FLASH[ranks])
    config.train.dtype = ComputeDtype.bfloat16
    sizes = resolve_sizes(config.parallel, ranks)
    planned = summaries(config, ranks, sizes, PRESETS["h800"], False, (1.0,))[1.0]
    each, kinds, found = ranks // sizes.pp, set(), []
    for place, one in enumerate(planned):
        kind = kind_of(config, sizes, place)
        if kind not in kinds:
            kinds.add(kind)
            own = (place * each, (place + 1) * each - 1)
            found.append((one.of("state"), [module_bytes(config, ranks, rank) for rank in own]))
    return found


@pytest.mark.long
@pytest.mark.parametrize("ranks", FLASH)
def test_state_at_560b_is_the_modules(ranks: int) -> None:
    """Of each kind of rank; the first of a stage is traced, and none has more."""
    (found,) = run_ranks(states, 1, ranks, timeout=LONG)
    for planned, (first, last) in found:
        print(f"{ranks} ranks: planned {planned:,.0f}, modules {first:,} and {last:,}")
        assert planned == pytest.approx(first, rel=1e-3)
        assert last <= first


def of_a_kind() -> list[tuple[float, float]]:
    """(peak by the trace of a place of the same kind, by its own) of the places of a pipeline."""
    config = compose([*COMMON, "parallel.pp=4", "parallel.schedule=1f1b", "model.num_layers=7"])
    sizes, cluster = resolve_sizes(config.parallel, 4), PRESETS["h800"]
    shared = summaries(config, 4, sizes, cluster, True, (1.0,))[1.0]
    assert shared[2].place == 1
    hidden, count = 2.0 * 2 * 128 * config.model.hidden_size, 4
    found = []
    for place, one in enumerate(shared):
        own = trace(config, 4, Scope(rank=place, on_gpu=True))
        assert summarise(own, place).of("state") == one.of("state")
        found.append((peak_bytes(one, config.parallel, sizes, place, count, hidden), float(own.peak)))
    return found


@pytest.mark.long
def test_places_of_a_kind_share_a_trace() -> None:
    (found,) = run_ranks(of_a_kind, 1, timeout=LONG)
    for shared, own in found:
        assert shared == pytest.approx(own, rel=0.02)


def imbalances() -> list[tuple[float, float]]:
    """(number between those of 1 and 2, number of a trace) for each peak at 1.5."""
    config = compose([*COMMON, "parallel.ep=2", "train.global_batch_size=4"])
    sizes, cluster, factors = resolve_sizes(config.parallel, 2), PRESETS["h800"], (1.0, 1.5, 2.0)
    (straight,), (traced,) = (summaries(config, 2, sizes, cluster, exact, factors)[1.5] for exact in (False, True))
    return [(straight.of(*key), value) for key, value in traced.numbers.items() if key[0] == "peak"]


@pytest.mark.long
def test_imbalance_between_is_a_straight_line() -> None:
    (found,) = run_ranks(imbalances, 1, timeout=LONG)
    for straight, value in found:
        assert 0.999 * value <= straight <= 1.02 * value
