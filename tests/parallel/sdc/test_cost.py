"""The checks of a step take as many kernels, records and Python calls for 64 ranks of a group as for 2."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from parallel import checksum
from parallel.collectives.collective import AllGather, AllToAll
from parallel.sdc import gathered, ledger
from parallel.sdc.ledger import LEDGER
from parallel.torch_internals import start_fake_world
from parallel.watchdog.events import Event, SpanKind
from tests.support.gathered_units import gathered_unit

SHAPES = {"router": (64, 48), "up_proj": (640, 257), "down_proj": (1 << 11, 1 << 11)}
RANKS = (2, 8, 64)


class Kernels(TorchDispatchMode):
    """Counts the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def world(size: int) -> Iterator[None]:
    """Rank 0 of a world without its other ranks, in a step that is recorded."""
    start_fake_world(0, size)
    LEDGER.begin(0, 1, recording=True)
    try:
        yield
    finally:
        LEDGER.begin(0, 0, recording=False)
        dist.destroy_process_group()


def record_step(size: int) -> None:
    """Both releases of a unit's weights, and messages of equal, unequal and the same parts, at both ends."""
    weights, unit = gathered.GatheredWeights(), gathered_unit(SHAPES)
    group = dist.group.WORLD
    assert group is not None
    for _ in ("forward", "backward"):
        weights._release(unit)
    rows = [128 // size * 3 // 2 if rank % 2 else 128 // size // 2 for rank in range(size)]
    event, x = Event(SpanKind.EXPERT_DISPATCH, 0), torch.randn(128, 33)
    to_all, gathering = AllToAll(event, group, rows, rows), AllGather(event, group)
    number = LEDGER.send_parts("dispatch", group, *to_all.outgoing(x))
    LEDGER.receive_parts("dispatch", group, number, *to_all.incoming(x))
    number = LEDGER.send_parts("latents", group, *gathering.outgoing(x))
    LEDGER.receive_parts("latents", group, number, *gathering.incoming(torch.ones(size, *x.shape)))
    counts = torch.ones(size, 2, 5, dtype=torch.int64)
    LEDGER.receive_parts("counts", group, LEDGER.send_parts("counts", group, counts), counts)


def test_kernels_do_not_grow_with_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the checksums that GPUs take, here on CPU tensors."""
    monkeypatch.setattr(checksum, "ROWS_IN_CACHE", checksum.ROWS_ON_GPU)
    for module in (gathered, ledger):
        monkeypatch.setattr(module, "digest", partial(checksum.digest, as_on_gpu=True))
        monkeypatch.setattr(module, "digests", partial(checksum.digests, as_on_gpu=True))
    counts = {}
    for size in RANKS:
        checksum.keys.cache_clear()
        with world(size), Kernels() as kernels:
            record_step(size)
            counts[size] = kernels.count
    assert counts[2] == max(counts.values()), f"parts shorter than a row need fewer: {counts}"


def test_records_and_python_calls_do_not_grow_with_ranks() -> None:
    """On a CPU each part is hashed by a call into XXH3, which is no Python function."""
    counts = {}
    for size in RANKS:
        with world(size):
            calls = 0

            def count(_: FrameType, kind: str, __: Any) -> None:
                nonlocal calls
                calls += kind == "call"

            record_step(size)  # what is done once in a process is done
            LEDGER.begin(0, 1, recording=True)
            gc.collect()
            gc.disable()  # callbacks of a collection would count
            sys.setprofile(count)
            try:
                record_step(size)
                cells = LEDGER.cells(size)
            finally:
                sys.setprofile(None)
                gc.enable()
            counts[size] = len(LEDGER.records), calls
            assert cells.shape == (size, 2) and cells[1:].any()
    assert len({records for records, _ in counts.values()}) == 1, counts
    assert len({calls for _, calls in counts.values()}) == 1, counts
