"""The planner's peaks against allocator bytes of real ranks, and what it refuses."""

from __future__ import annotations

import pytest

from launch.plan.trace import trace
from longcat.errors import ConfigError
from tests.launch.plan.allocations import real_peak, traced
from tests.support.distributed import run_ranks
from train.compose import compose


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ["parallel.recompute=full"]),
        (2, ["parallel.fsdp=2"]),
        (2, ["parallel.ep=2", "parallel.recompute=selective"]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "-".join(value).replace("parallel.", ""),
)
def test_peak_is_the_allocators(ranks: int, overrides: list[str]) -> None:
    real = max(run_ranks(real_peak, ranks, overrides))
    (planned,) = run_ranks(traced, 1, overrides, ranks)
    assert 0.98 * real <= planned.peak <= 1.05 * real


def test_imbalance_takes_memory() -> None:
    overrides = ["parallel.ep=2", "model.num_layers=1"]
    even, uneven = (run_ranks(traced, 1, overrides, 2, factor)[0] for factor in (1.0, 2.0))
    assert uneven.state == even.state
    assert uneven.peak > even.peak


@pytest.mark.parametrize(
    "override", ["parallel.pp=2", "parallel.sharding=zero1", "parallel.compile=true", "train.elastic_bits=2"]
)
def test_what_cannot_be_traced_is_refused(override: str) -> None:
    config = compose(["model=debug", "train.dtype=bfloat16", "train.global_batch_size=8", override])
    with pytest.raises(ConfigError, match="cannot trace it yet; plan with"):
        trace(config, 2)
