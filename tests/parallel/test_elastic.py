"""Parts of `train.elastic_bits`: micro-batches of virtual ranks, exact sums, updates of tails, refused settings."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longcat.errors import ConfigError
from longcat.moe import round_to
from parallel.collectives.point_to_point import tree_sum
from parallel.config import ParallelConfig
from parallel.elastic import VirtualRanks, exact_squares, sum_exactly, update_tails
from parallel.fsdp.collectives import TreeReduceScatter
from parallel.layout import check_elastic
from parallel.mesh import resolve_sizes
from parallel.watchdog.events import Event, SpanKind
from tests.support.pool import pool
from train.check import check_sizes
from train.checkpoint.compatibility import differences
from train.compose import compose
from train.optimizer import OptimConfig, make_adamw
from train.run_dir.folder import as_mapping


@pytest.fixture
def one_rank() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------ micro-batches


def groups_of(virtual: VirtualRanks, total: int) -> set[tuple[int, ...]]:
    """The micro-batches that each expert group sees at once."""
    ranks = [virtual.micro_batches(rank, total) for rank in range(virtual.data_ranks)]
    assert sorted(number for numbers in ranks for number in numbers) == list(range(total)), "each micro-batch once"
    starts = range(0, virtual.data_ranks, virtual.group)
    return {at_once for start in starts for at_once in zip(*ranks[start : start + virtual.group], strict=True)}


@pytest.mark.parametrize("group", [1, 2, 4])
def test_expert_groups_see_the_same_micro_batches(group: int) -> None:
    sizes = [size for size in (1, 2, 4, 8) if size >= group]
    seen = [groups_of(VirtualRanks(8, size, group), 32) for size in sizes]
    assert all(one == seen[0] for one in seen)


@pytest.mark.parametrize("data_ranks", [1, 2, 4, 8])
def test_a_turn_takes_neighbours_of_the_tree(data_ranks: int) -> None:
    """In each turn the ranks run the virtual ranks D·turn … D·(turn + 1) − 1, so their sum is a subtree."""
    virtual = VirtualRanks(8, data_ranks, 1)
    for turn in range(virtual.turns):
        at_once = [virtual.micro_batches(rank, 8)[turn] for rank in range(data_ranks)]
        assert at_once == list(range(turn * data_ranks, (turn + 1) * data_ranks))


# --------------------------------------------------------------------------------------------------------------- sums


def test_tree_sum_adds_runs_in_order_and_then_pairs() -> None:
    values = torch.rand(8, 100)
    a, b, c, d = (values[first] + values[first + 1] for first in (0, 2, 4, 6))
    assert torch.equal(tree_sum(list(values.clone()), 4), (a + b) + (c + d))
    in_order = values[0].clone()
    for value in values[1:]:
        in_order += value
    assert torch.equal(tree_sum(list(values.clone()), 1), in_order)


def scatter_on_rank(branches: int) -> Tensor:
    x = torch.rand(4, 10, generator=torch.Generator().manual_seed(dist.get_rank()))
    out = torch.empty(10)
    group = dist.group.WORLD
    assert group is not None
    event = Event(SpanKind.GRADIENT_REDUCE_SCATTER)
    TreeReduceScatter(event, branches)(out, x.flatten(), group, dist.ReduceOp.SUM)
    return out


def test_reduce_scatter_for_gpus_adds_the_same_tree() -> None:
    """It has an all-to-all and a local sum; here over gloo."""
    inputs = [torch.rand(4, 10, generator=torch.Generator().manual_seed(rank)) for rank in range(4)]
    found = pool(4).run(scatter_on_rank, 4)
    for rank, out in enumerate(found):
        assert torch.equal(out, (inputs[0][rank] + inputs[1][rank]) + (inputs[2][rank] + inputs[3][rank]))


def test_squares_are_exact_and_independent_of_order(one_rank: None) -> None:
    values = torch.randn(70_001, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.randint(-9, 3, (70_001,))
    exact = math.fsum(value * value for value in values.tolist())
    shuffled = values[torch.randperm(len(values))]
    cuts: list[list[Tensor]] = [[values], list(shuffled.split(1000)), list(values.split(12_345))]
    (whole,), *others = (exact_squares({0: members}, 1) for members in cuts)
    assert whole == pytest.approx(exact, rel=1e-9)
    assert others == [[whole], [whole]]


@pytest.mark.parametrize("largest", [1e-30, 1e-3, 1.0, 1e19, 3e38])
def test_squares_of_any_magnitude(largest: float, one_rank: None) -> None:
    values = (torch.rand(3_001, generator=torch.Generator().manual_seed(0)) * 2 - 1) * largest
    (found,) = exact_squares({0: [values]}, 1)
    assert found == pytest.approx(math.fsum(value * value for value in values.tolist()), rel=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_squares_of_what_is_not_finite_are_infinite(bad: float, one_rank: None) -> None:
    assert exact_squares({1: [torch.tensor([1.0, bad]), torch.ones(3)], 0: [torch.ones(5)]}, 3) == [5.0, math.inf, 0.0]


def sum_on_rank() -> list[float]:
    rows = torch.tensor([[1e16, 1.0], [-1e16, 1.0], [1.0, 1e-20]], dtype=torch.float64)
    return sum_exactly(rows[[dist.get_rank(), 2]]).tolist()  # type: ignore[no-any-return]


def test_loss_sums_are_correctly_rounded() -> None:
    """A sum of each rank's sum would lose a 1; the first rank has the result."""
    assert pool(2).run(sum_on_rank) == [[2.0, 2.0], [0.0, 0.0]]


def test_rounded_slopes_add_in_any_order() -> None:
    values = torch.randn(1000) * 10.0 ** torch.randint(-9, 2, (1000,))
    rounded = round_to(values, 2.0**-44)
    assert float(rounded.sum()) == float(rounded.flip(0).cumsum(0)[-1]) == math.fsum(rounded.tolist())
    assert torch.allclose(rounded, values.double(), atol=2.0**-45, rtol=0)


# -------------------------------------------------------------------------------------------------------------- AdamW


def adamw_of(shards: list[Tensor]) -> tuple[list[torch.nn.Parameter], torch.optim.AdamW]:
    parameters = [torch.nn.Parameter(shard.clone()) for shard in shards]
    optimizer = make_adamw([{"params": parameters, "role": "hidden"}], OptimConfig())
    for one in parameters:
        optimizer.state[one] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(one),
            "exp_avg_sq": one.detach() ** 2,
        }
    return parameters, optimizer


@pytest.mark.parametrize("length", [13, 16, 37])
def test_updates_do_not_depend_on_shards(length: int) -> None:
    """Three steps on a whole tensor of a multiple of 16 elements, which has no tail, and on its shards."""
    generator = torch.Generator().manual_seed(length)
    weight, grads = torch.randn(1_600, generator=generator), torch.randn(3, 1_600, generator=generator)
    (whole,), plain = adamw_of([weight])
    shards, cut = adamw_of(list(weight.split(length)))
    for grad in grads:
        whole.grad = grad.clone()
        plain.step()
        for shard, part in zip(shards, grad.split(length), strict=True):
            shard.grad = part.clone()
        update_tails(cut)
    for kind in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(torch.cat([cut.state[shard][kind] for shard in shards]), plain.state[whole][kind])
    assert torch.equal(torch.cat([shard.detach() for shard in shards]), whole.detach())
    assert all(float(cut.state[shard]["step"]) == 3 for shard in shards)


# ------------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("words", "world_size", "message"),
    [
        ("parallel.sharding=zero1", 2, "train.elastic_bits=8 needs parallel.sharding=fsdp"),
        ("train.elastic_bits=6", 2, "train.elastic_bits=6 must be a power of two"),
        ("train.global_batch_size=48", 3, "allows 1, 2, 4, … up to 8 data-parallel ranks, not parallel.dp×fsdp=3"),
        ("train.elastic_bits=2", 4, "up to 2 data-parallel ranks, not parallel.dp×fsdp=4"),
        ("train.global_batch_size=4", 2, "the 4 micro-batches of a step cannot be shared by 8 ranks"),
        ("parallel.ep=-1", 2, "parallel.ep=-1 follows the size"),
        ("parallel.fsdp=1 parallel.tp=-1", 2, "parallel.tp=-1 follows the size"),
        ("train.deterministic=false", 2, "needs train.deterministic=true"),
        ("train.elastic_bits=-1", 1, "must be the largest data-parallel size, or 0"),
    ],
)
def test_what_cannot_repeat_bits_is_refused(words: str, world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_sizes(
            compose(["model=debug", "train.elastic_bits=8", "train.micro_batch_size=1", *words.split()]), world_size
        )


def test_expert_groups_of_half_ranks_are_refused() -> None:
    parallel = ParallelConfig(fsdp=2, cp=2, tp=3, ep=4)
    with pytest.raises(ConfigError, match=r"parallel.ep=4 and the 6 ranks of cp×tp do not divide each other"):
        check_elastic(2, parallel, resolve_sizes(parallel, 12), 8)


def test_a_resume_keeps_what_decides_the_bits() -> None:
    """Sizes may change; elastic_bits may not, nor with it ep; a configuration of before had none."""
    stored = as_mapping(compose(["model=debug", "train.elastic_bits=4", "parallel.fsdp=4", "parallel.ep=2"]))

    def found(*words: str) -> list[str]:
        return differences(stored, as_mapping(compose(["model=debug", *words])))

    assert found("train.elastic_bits=4", "parallel.fsdp=2", "parallel.dp=2", "parallel.ep=2") == []
    assert found("train.elastic_bits=4") == ["parallel.ep was 2 and is now 1"]
    assert found("parallel.ep=4") == ["train.elastic_bits was 4 and is now 0"]
    del stored["train"]["elastic_bits"]
    assert found("parallel.ep=4") == []
