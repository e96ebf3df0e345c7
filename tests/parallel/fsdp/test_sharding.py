"""FSDP2 and HSDP on gloo ranks compute what one process computes: losses, every gradient, the norm, weights, biases."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longcat.errors import ConfigError
from parallel.config import ParallelConfig
from parallel.mesh import resolve_sizes
from tests.support.distributed import run_ranks
from tests.support.three_steps import MODEL, train_three_steps


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return run_ranks(train_three_steps, 1, MODEL)[0]


@pytest.mark.parametrize(
    "layout,world_size",
    [
        (["parallel.fsdp=2"], 2),
        (["parallel.fsdp=2", "parallel.reshard_after_forward=false"], 2),
        (["parallel.dp=2", "parallel.fsdp=1"], 2),
        (["parallel.dp=2", "parallel.fsdp=2"], 4),
    ],
    ids=["fsdp2", "fsdp2-gathered", "dp2", "dp2-fsdp2"],
)
def test_training_equals_one_process(layout: list[str], world_size: int, alone: dict[str, Any]) -> None:
    ranks = run_ranks(train_three_steps, world_size, MODEL + layout)
    for found in ranks:
        assert found["hash"] == alone["hash"], "initial weights are not bitwise identical"
        for name, value in alone["initial"].items():
            assert torch.equal(found["initial"][name], value), name
        assert found["grads"].keys() == alone["grads"].keys()
        for name, reference in alone["grads"].items():
            error = torch.linalg.vector_norm(found["grads"][name] - reference)
            assert error <= 2e-6 * torch.linalg.vector_norm(reference) + 1e-12, name
        for mine, theirs in zip(found["metrics"], alone["metrics"], strict=True):
            for key, value in theirs.items():
                assert mine[key] == (None if value is None else pytest.approx(value, rel=1e-5)), key
        for mine_counts, their_counts in zip(found["counts"], alone["counts"], strict=True):
            assert torch.equal(mine_counts, their_counts)
        assert torch.equal(found["biases"], alone["biases"])
    assert len({str(found["metrics"]) for found in ranks}) == 1, "ranks disagree on the metrics"


def test_each_rank_holds_only_its_shard(alone: dict[str, Any]) -> None:
    """Two FSDP ranks hold about half each; two replicas hold everything."""
    halves = [found["held"] for found in run_ranks(train_three_steps, 2, [*MODEL, "parallel.fsdp=2"])]
    assert sum(halves) == alone["held"]
    assert max(halves) < 0.6 * alone["held"]


@pytest.mark.parametrize(
    "dp,fsdp,world,expected",
    [(1, -1, 8, (1, 8)), (-1, 2, 8, (4, 2)), (2, 4, 8, (2, 4)), (1, 1, 1, (1, 1))],
)
def test_missing_mesh_sizes_are_derived(dp: int, fsdp: int, world: int, expected: tuple[int, int]) -> None:
    sizes = resolve_sizes(ParallelConfig(dp=dp, fsdp=fsdp), world)
    assert (sizes.dp, sizes.fsdp) == expected


@pytest.mark.parametrize("dp,fsdp,world", [(3, -1, 8), (2, 2, 8), (-1, -1, 8), (0, 1, 1), (1, -2, 2)])
def test_impossible_mesh_sizes_are_refused(dp: int, fsdp: int, world: int) -> None:
    with pytest.raises(ConfigError, match="parallel"):
        resolve_sizes(ParallelConfig(dp=dp, fsdp=fsdp), world)
