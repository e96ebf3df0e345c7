"""Process groups of a mesh by backend, counted at 8, 512 and 8,192 ranks; nothing of NCCL or of a GPU is there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import device_mesh

from parallel.config import ParallelConfig
from parallel.mesh import background_group, make_topology
from parallel.sizes import resolve_sizes
from parallel.torch_internals import start_fake_world

WORLDS = {
    8: ParallelConfig(fsdp=2, tp=2, cp=2, ep=4),
    512: ParallelConfig(pp=4, dp=2, fsdp=-1, tp=8, ep=64),
    8192: ParallelConfig(pp=8, fsdp=-1, tp=8, ep=64),
}


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> Iterator[Counter[str]]:
    """A fake world; calls that make groups, by backend, are counted and make fake groups."""
    made: Counter[str] = Counter()
    new_group, start = dist.new_group, start_fake_world

    def fake_group(ranks: Any = None, **options: Any) -> Any:
        made[f"new {options.get('backend')}"] += 1
        assert ranks is None or rank in ranks, "a rank took part in the making of a group that it is not in"
        kept = {key: options[key] for key in ("group_desc", "use_local_synchronization") if key in options}
        return new_group(ranks, backend="fake", **kept)

    start(rank, world)
    default = dist.group.WORLD
    assert default is not None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Options, raising=False)
    for module in (device_mesh, dist):
        monkeypatch.setattr(module, "new_group", fake_group)
    try:
        yield made
    finally:
        monkeypatch.undo()
        dist.destroy_process_group()


class Options:
    """In place of NCCL's class, which a build for CPUs lacks."""

    def __init__(self, is_high_priority_stream: bool = False) -> None:
        self._timeout = None

    Options: Any


Options.Options = Options


@pytest.mark.parametrize("world", WORLDS)
def test_axes_have_nccl_alone(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    """As many calls at 8,192 ranks as at 8, each by the group's members; gloo is for a thread's group alone."""
    sizes = resolve_sizes(WORLDS[world], world)
    with counting(monkeypatch, world // 2, world) as made:
        make_topology(sizes, world // 2, world, torch.device("cuda", 0))
        assert set(made) == {"new nccl"}
        assert made["new nccl"] <= 12  # five axes, three foldings, efsdp and ep, two second groups
        background_group(60)
        assert made["new gloo"] == 1


def test_cpu_axes_keep_the_default_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = resolve_sizes(WORLDS[8], 8)
    with counting(monkeypatch, 5, 8) as made:
        make_topology(sizes, 5, 8, torch.device("cpu"))
    assert set(made) == {"new None", "new gloo"}  # the second groups ask for gloo
    assert made["new gloo"] == 2
