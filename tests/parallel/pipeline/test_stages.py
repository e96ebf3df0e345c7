"""Stages of a pipeline: every layer once, the most expensive stage as cheap as possible, ranks as in the schedules."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from longcat.config import ModelConfig
from longcat.errors import ConfigError
from longcat.model import LongCat
from parallel.config import Schedule
from parallel.pipeline.simulation import planned, simulate
from parallel.pipeline.stages import (
    STAGES_PER_RANK,
    check_micro_batches,
    is_replica,
    num_stages,
    rank_of,
    split,
    stage_costs,
    stages_of,
)

SMALL = ModelConfig(vocab_size=50_000, num_mtp_layers=2)


def largest_cost(config: ModelConfig, sizes: list[int]) -> float:
    layer, last = stage_costs(config, 128)
    return max(size * layer + last * (place == len(sizes) - 1) for place, size in enumerate(sizes))


@pytest.mark.parametrize("num_layers,stages", [(4, 4), (5, 2), (7, 3), (9, 4), (12, 5), (28, 4)])
@pytest.mark.parametrize("vocab_size", [64, 4_096, 131_072])
def test_most_expensive_stage_is_as_cheap_as_possible(num_layers: int, stages: int, vocab_size: int) -> None:
    config = replace(SMALL, num_layers=num_layers, vocab_size=vocab_size)
    parts = split(config, stages, 128)
    sizes = [part.last - part.first for part in parts]
    assert parts[0].first == 0 and parts[-1].last == num_layers
    assert all(before.last == after.first for before, after in pairwise(parts))
    assert min(sizes) >= 1
    assert [part.embedding for part in parts] == [place == 0 for place in range(stages)]
    assert [part.head for part in parts] == [place == stages - 1 for place in range(stages)]
    best = min(
        largest_cost(config, [b - a for a, b in zip((0, *cuts), (*cuts, num_layers), strict=True)])
        for cuts in combinations(range(1, num_layers), stages - 1)
    )
    assert largest_cost(config, sizes) <= best * (1 + 1e-9)


def test_expensive_head_gives_the_last_stage_fewer_layers() -> None:
    sizes = [part.last - part.first for part in split(replace(SMALL, num_layers=12, num_mtp_layers=1), 3, 128)]
    assert sizes[2] < sizes[1] and abs(sizes[0] - sizes[1]) <= 1


def test_cheap_head_gives_even_stages() -> None:
    config = replace(SMALL, num_layers=12, vocab_size=8, num_mtp_layers=0)
    assert [part.last - part.first for part in split(config, 4, 128)] == [3, 3, 3, 3]


def test_too_few_layers_are_refused_with_a_cure() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.pp.*model\.num_layers=4.*1f1b"):
        split(replace(SMALL, num_layers=4), 8, 128)


@pytest.mark.parametrize("schedule", [schedule.value for schedule in Schedule])
@pytest.mark.parametrize("pp", [1, 2, 4, 5])
def test_each_stage_is_on_the_rank_on_which_torch_runs_it(schedule: str, pp: int) -> None:
    local_boxes = {rank: stages_of(schedule, pp, rank) for rank in range(pp)}
    assert sorted(stage for stages in local_boxes.values() for stage in stages) == list(range(num_stages(schedule, pp)))
    for rank, actions in planned(schedule, pp, 2 * pp).items():
        assert {action.stage for action in actions} == set(local_boxes[rank])
        assert all(rank_of(schedule, pp, action.stage) == rank for action in actions)


@pytest.mark.parametrize(
    "schedule,pp,refused",
    [("1f1b", 4, 3), ("dualpipev", 4, 7), ("interleaved", 4, 9), ("zbv", 4, 0)],
)
def test_too_few_micro_batches_are_refused_with_a_cure(schedule: str, pp: int, refused: int) -> None:
    with pytest.raises(ConfigError, match=rf"parallel\.schedule={schedule}.*train\.global_batch_size"):
        check_micro_batches(schedule, pp, refused)


@pytest.mark.parametrize("schedule", [schedule.value for schedule in Schedule])
@pytest.mark.parametrize("pp", [1, 2, 3, 4])
def test_accepted_micro_batch_counts_run_to_the_end(schedule: str, pp: int) -> None:
    ran = 0
    for count in range(1, 4 * pp):
        try:
            check_micro_batches(schedule, pp, count)
        except ConfigError:
            continue
        simulated = simulate(schedule, planned(schedule, pp, count), lambda rank, action: 1.0)
        done = [action for spans in simulated.spans.values() for action, _, _ in spans]
        assert len(done) == len(set(done))
        assert sum(action.kind == "F" for action in done) == count * pp * STAGES_PER_RANK[schedule]
        assert sum(action.kind in "IB" for action in done) == count * pp * STAGES_PER_RANK[schedule]
        ran += 1
    assert ran


def test_last_stage_holds_the_embedding_copy() -> None:
    config = ModelConfig(num_layers=2, num_mtp_layers=1)
    first, last = split(config, 2, 16)
    assert LongCat(config, part=last).embed_tokens is not None
    assert not is_replica(first, "embed_tokens.weight") and is_replica(last, "embed_tokens.weight")
    assert not is_replica(last, "lm_head.weight")
