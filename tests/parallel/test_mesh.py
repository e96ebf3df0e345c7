"""Waits of a start without a watchdog, as `train.api` has: a rank that stays away ends them in `timeout_seconds`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import parallel.mesh
from parallel.config import ParallelConfig
from parallel.mesh import connect
from tests.support.distributed import run_ranks


def connect_without_rank_1(stop: Path) -> float:
    """Rank 1 meets the others and makes no groups → seconds until rank 0 has its error."""
    make_topology = parallel.mesh.make_topology

    def make(sizes: Any, rank: int, *others: Any) -> Any:
        while rank == 1 and not stop.exists():
            time.sleep(0.1)
        if rank == 1:
            raise RuntimeError("stayed away")
        return make_topology(sizes, rank, *others)

    parallel.mesh.make_topology = make
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        connect(ParallelConfig(timeout_seconds=2, fsdp=2, ep=2))
    stop.touch()
    return time.monotonic() - began


def test_a_rank_that_makes_no_groups_ends_the_wait(tmp_path: Path) -> None:
    """The groups came with torch's half an hour."""
    seconds, _ = run_ranks(connect_without_rank_1, 2, tmp_path / "stop", timeout=100)
    assert seconds < 60
