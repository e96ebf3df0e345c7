"""Asynchronous collectives: exact results, any order of waits, and FSDP2's collectives overlapped with compute."""

from __future__ import annotations

from datetime import timedelta
from time import monotonic
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives.point_to_point import Sum, all_gather, reduce_scatter
from parallel.mesh import connect
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import SPANS, Span
from tests.support.distributed import run_ranks
from tests.support.running import RandomSamples
from tests.support.three_steps import MODEL
from train.batches import BatchReader
from train.compose import compose
from train.run import build_state
from train.step import Stepper

RANKS = 3


def values(rank: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank))


def run_concurrent_collectives() -> dict[str, Tensor]:
    """Several in flight on one group, of different sizes; ranks wait for them in different orders."""
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    found = {
        "floats": torch.empty(RANKS, 5, 2),
        "integers": torch.empty(RANKS, 40_000, dtype=torch.int64),
        "in place": torch.full((RANKS, 3), float(rank)),
        "sum": torch.empty(4, 7),
        "large sum": torch.empty(300_000),
        "narrow sum": torch.empty(9, dtype=torch.bfloat16),
    }
    works = [
        all_gather(found["floats"], values(rank, 5, 2), group),
        reduce_scatter(found["sum"], values(rank, RANKS, 4, 7), group),
        all_gather(found["integers"], torch.arange(40_000) * rank, group),
        reduce_scatter(found["large sum"], values(rank, RANKS, 300_000), group),
        all_gather(found["in place"], found["in place"][rank], group),
        reduce_scatter(found["narrow sum"], values(rank, RANKS, 9).bfloat16(), group),
    ]
    for work in works[rank:] + works[:rank]:
        work.wait()
    works[1].wait()  # a second wait changes nothing
    dist.destroy_process_group()
    return found


def test_results_are_exact_and_sums_follow_rank_order() -> None:
    for rank, found in enumerate(run_ranks(run_concurrent_collectives, RANKS)):
        assert torch.equal(found["floats"], torch.stack([values(r, 5, 2) for r in range(RANKS)]))
        assert torch.equal(found["integers"], torch.stack([torch.arange(40_000) * r for r in range(RANKS)]))
        assert torch.equal(found["in place"], torch.arange(RANKS).float()[:, None].expand(-1, 3))
        for name, shape, dtype in (
            ("sum", (4, 7), torch.float32),
            ("large sum", (300_000,), torch.float32),
            ("narrow sum", (9,), torch.bfloat16),
        ):
            first, second, third = (values(r, RANKS, *shape).to(dtype)[rank] for r in range(RANKS))
            assert torch.equal(found[name], first + second + third), name


def start_mismatched(first: str) -> str:
    """The error on a rank whose first collective is not the other's."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=2))
    group = dist.group.WORLD
    assert group is not None
    like = torch.ones(2, 3)
    works = {
        "gather": lambda: all_gather(torch.empty(2, 3), like[0], group),
        "sum": lambda: reduce_scatter(torch.empty(3), like, group),
        "larger sum": lambda: reduce_scatter(torch.empty(4), torch.ones(2, 4), group),
    }
    work = works[first if dist.get_rank() == 0 else "sum"]()
    heard, start = [], monotonic()
    for _ in range(2):
        try:
            work.wait()
        except RuntimeError as error:
            heard.append(str(error))
    assert len(heard) == 2, "the mismatch raised no error"
    assert monotonic() - start < 3.5, "the second wait blocked again"
    return heard[0]


@pytest.mark.alone
@pytest.mark.parametrize("first", ["gather", "larger sum"])
def test_mismatched_collectives_time_out(first: str) -> None:
    """Messages must not match by accident, whether of equal or different sizes."""
    assert any("imed out" in heard for heard in run_ranks(start_mismatched, 2, first))


ROUTER = Event(SpanKind.ROUTER, layer=0)


class Events:
    """What spans report of FSDP2's collectives: (`launched` or `waited`, event)."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Event]] = []

    def launched(self, event: Event, num_bytes: int, work: Any) -> None:
        assert num_bytes > 0
        self._add("launched", event)

    def sent(self, event: Event, num_bytes: int, peer: int) -> None:
        pass

    def span_ended(self, span: Span, now: float) -> None:
        self._add("waited", span.event)

    def _add(self, what: str, event: Event) -> None:
        if event.kind in (SpanKind.WEIGHT_ALL_GATHER, SpanKind.GRADIENT_REDUCE_SCATTER):
            self.seen.append((what, event))


def train_a_step(overrides: list[str]) -> list[tuple[str, Event]]:
    begin = Sum.__init__

    def poisoned(self: Sum, group: dist.ProcessGroup, x: Tensor, out: Tensor, *more: Any) -> None:
        out.fill_(float("nan"))  # a read before the sum is complete makes the step unhealthy
        begin(self, group, x, out, *more)

    Sum.__init__ = poisoned  # type: ignore[method-assign]
    config = compose([*MODEL, *overrides])
    topology = connect(config.parallel)
    state = build_state(config, topology)
    reader = BatchReader(RandomSamples(16), config, topology)  # type: ignore[arg-type]
    stepper = Stepper(state, reader, config, topology)
    SPANS.recorder = events = Events()
    router = state.models[0].shortcut_layers()[0].mlp.router
    router.register_forward_hook(lambda *_: events.seen.append(("computed", ROUTER)))
    assert stepper.step().healthy
    SPANS.recorder = None
    dist.destroy_process_group()
    return events.seen


def test_fsdp_collectives_overlap_compute() -> None:
    """Weights are gathered while the layer before computes; gradients are summed while the next backward runs."""
    for seen in run_ranks(train_a_step, 2, ["train.micro_batch_size=2", "train.global_batch_size=4"]):

        def first(what: str, event: Event, seen: list[tuple[str, Event]] = seen) -> int:
            return seen.index((what, event))

        weights = Event(SpanKind.WEIGHT_ALL_GATHER, module="layers.1")
        assert first("launched", weights) < first("computed", ROUTER) < first("waited", weights)
        below, above = (Event(SpanKind.GRADIENT_REDUCE_SCATTER, module=f"layers.{number}") for number in range(2))
        assert first("launched", above) < first("launched", below) < first("waited", above)
        sums = [what for what, event in seen if event.kind == SpanKind.GRADIENT_REDUCE_SCATTER]
        assert sums.count("launched") == sums.count("waited") > 0
