"""The pipeline simulator agrees with the published formulas, and ZBV has the bubble it promises."""

from __future__ import annotations

import pytest

from parallel.pipeline.simulation import Simulation, planned, simulate, theory
from parallel.pipeline.stages import STAGES_PER_RANK


def run(schedule: str, pp: int, count: int, forward: float, inputs: float, weights: float) -> Simulation:
    """Simulate a schedule in which a rank's layers take these seconds per micro-batch."""
    halves = STAGES_PER_RANK[schedule]
    seconds = {"F": forward / halves, "I": inputs / halves, "W": weights / halves, "B": (inputs + weights) / halves}
    return simulate(schedule, planned(schedule, pp, count), lambda rank, action: seconds[action.kind])


@pytest.mark.parametrize("times", [(1.0, 1.0, 1.0), (1.0, 1.3, 0.8), (2.0, 2.5, 1.5)], ids=str)
@pytest.mark.parametrize("pp,count", [(2, 4), (4, 8), (4, 16), (6, 12)])
def test_simulated_equals_the_formula(pp: int, count: int, times: tuple[float, float, float]) -> None:
    for schedule in ("1f1b", "interleaved", "zbv"):
        found = run(schedule, pp, count, *times).idle
        assert found == pytest.approx(theory(schedule, pp, *times)), schedule
    assert run("dualpipev", pp, count, *times).idle <= theory("dualpipev", pp, *times) + 1e-9


@pytest.mark.parametrize("pp,count", [(2, 4), (4, 8), (8, 16)])
def test_zbv_bubble_is_a_sixth_of_1f1b_at_equal_memory(pp: int, count: int) -> None:
    """At equal times of forward, input and weight gradients; inside a rank's own span it is never idle."""
    plain, zero = (run(schedule, pp, count, 1.0, 1.0, 1.0) for schedule in ("1f1b", "zbv"))
    assert zero.idle <= plain.idle / 6 + 1e-9
    assert zero.idle_inside == pytest.approx(0, abs=1e-9)
    assert zero.live_micro_batches == plain.live_micro_batches == pp


def test_schedules_that_deadlock_are_named() -> None:
    order = planned("1f1b", 2, 2)
    order[1].reverse()
    with pytest.raises(RuntimeError, match="1f1b wait for each other"):
        simulate("1f1b", order, lambda rank, action: 1.0)
