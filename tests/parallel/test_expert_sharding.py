"""Stacks of experts are sharded so that ranks hold equal parts, or refused; formula and FSDP2's shards agree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from longcat.errors import ConfigError
from longcat.model import LongCat
from parallel.config import DispatcherKind
from parallel.expert.placement import apply_expert_parallel
from parallel.expert.sharding import check_expert_shards, largest_share, shard_dim
from parallel.fsdp.sharding import apply_fsdp
from parallel.mesh import MeshSizes, Topology, make_topology
from parallel.torch_internals import local_shard
from train.compose import compose

FLASH = compose(["model=flash"]).model


@contextmanager
def fake_topology(sizes: MeshSizes, rank: int) -> Iterator[Topology]:
    """One of many ranks whose collectives send nothing."""
    world = sizes.pp * sizes.dp * sizes.dense_shards
    new_group = dist.new_group
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "new_group", lambda *args, **options: new_group(*args, **{**options, "backend": "fake"}))
        try:
            yield make_topology(sizes, rank, world, torch.device("cpu"))
        finally:
            dist.destroy_process_group()


@pytest.mark.parametrize(
    ("shape", "shards", "dim"),
    [
        ((16, 4096, 6144), 8, 0),
        ((16, 4096, 6144), 32, 1),
        ((16, 6145, 2048), 32, 2),
        ((16, 4096, 6144), 40, None),
        ((8, 128, 128), 3, 0),  # 3, 3 and 2
        ((8, 128, 128), 5, None),  # 2, 2, 2, 2 and 0
        ((16, 4096, 6144), 10, None),  # 2 on eight of them
        ((2, 90, 128), 3, 1),
    ],
)
def test_the_dimension_that_is_sharded(shape: tuple[int, ...], shards: int, dim: int | None) -> None:
    assert shard_dim(shape, shards) == dim


def test_flash_on_10240_ranks_is_refused_with_what_works() -> None:
    sizes = MeshSizes(pp=8, dp=1, fsdp=160, cp=8, tp=1, ep=32)
    with pytest.raises(ConfigError, match=r"16 experts .* over 40 .*; use parallel.fsdp=32 and parallel.dp=5"):
        check_expert_shards(FLASH, sizes)
    check_expert_shards(FLASH, replace(sizes, fsdp=32, dp=5))


def test_more_experts_than_ranks_may_leave_one_without() -> None:
    """FSDP2 would give 8 experts over 5 ranks as 2, 2, 2, 2 and 0."""
    config = replace(FLASH, num_experts=8, hidden_size=128, expert_hidden_size=64)
    sizes = MeshSizes(pp=1, dp=1, fsdp=5, cp=1, tp=1, ep=1)
    with pytest.raises(ConfigError, match=r"8 experts .* over 5 ranks .* get none.*; use parallel.fsdp=1 and .*dp=5"):
        check_expert_shards(config, sizes)
    check_expert_shards(config, replace(sizes, fsdp=1, dp=5))
    check_expert_shards(config, replace(sizes, fsdp=3))  # 3, 3 and 2


def test_a_larger_expert_group_where_replicas_do_not_help() -> None:
    sizes = MeshSizes(pp=1, dp=1, fsdp=1, cp=5, tp=1, ep=1)
    config = replace(FLASH, num_experts=4, hidden_size=64, expert_hidden_size=32)
    with pytest.raises(ConfigError, match="use another number of ranks"):
        check_expert_shards(config, sizes)
    with pytest.raises(ConfigError, match=r"use parallel.ep=3"):
        check_expert_shards(replace(config, num_experts=6, hidden_size=96), replace(sizes, cp=9))


@pytest.mark.parametrize(
    "sizes",
    [
        MeshSizes(pp=1, dp=5, fsdp=32, cp=8, tp=1, ep=32),  # whole experts
        MeshSizes(pp=1, dp=1, fsdp=128, cp=8, tp=1, ep=32),  # rows of each
        MeshSizes(pp=1, dp=1, fsdp=48, cp=8, tp=1, ep=32),  # 12 shards of 16: columns or rows
    ],
    ids=["experts", "rows", "columns"],
)
def test_flash_shards_are_those_of_the_formula(sizes: MeshSizes) -> None:
    config = replace(FLASH, num_layers=1, num_mtp_layers=0)
    with fake_topology(sizes, rank=0) as topology:
        with torch.device("meta"):
            model = LongCat(config)
        apply_expert_parallel(model, topology, DispatcherKind.all_to_all)
        apply_fsdp(model, topology, torch.bfloat16, reshard_after_forward=True)
        (layer,) = model.shortcut_layers()
        held = [one for one in layer.mlp.experts.parameters() if isinstance(one, DTensor)]
        assert len(held) == 2
        elements = 3 * config.num_experts * config.hidden_size * config.expert_hidden_size
        assert sum(local_shard(one).numel() for one in held) == round(elements * largest_share(config, sizes))
