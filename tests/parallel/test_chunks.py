"""The number of chunks from a layer's measured times."""

from __future__ import annotations

import pytest

from parallel.chunks import (
    LayerTimes,
    backward_of,
    both_seconds,
    choose_chunks,
    exposed_share,
    layer_seconds,
    line,
    waiting_seconds,
)

#            message, per message, experts, per call, before, after → chunks
CASES = {
    "nothing to send": (LayerTimes(0.0, 0.0, 4.0, 0.0, 1.0, 1.0), 1),
    "messages hidden behind compute": (LayerTimes(1.0, 0.0, 4.0, 0.1, 2.0, 2.0), 1),
    "messages as long as experts": (LayerTimes(4.0, 0.0, 4.0, 0.05, 1.0, 1.0), 2),
    "short messages around long experts": (LayerTimes(2.0, 0.0, 8.0, 0.1, 0.0, 0.0), 4),
    "the same, and chunks cost nothing": (LayerTimes(2.0, 0.0, 8.0, 0.0, 0.0, 0.0), 8),
    "each chunk costs more than it hides": (LayerTimes(1.0, 2.0, 1.0, 2.0, 1.0, 1.0), 1),
    "2 beat 1 by 4 %, 4 beat 2 by 1 %": (LayerTimes(4.6, 0.0, 0.4, 0.15, 3.1, 0.7), 2),
    "the backward loses what the forward gains": (LayerTimes(1.83, 0.0, 0.32, 0.32, 5.64, 0.57), 1),
    "no experts to hide behind": (LayerTimes(9.0, 0.0, 0.0, 0.0, 0.0, 0.0), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_choice_by_the_times_of_a_layer(name: str) -> None:
    times, expected = CASES[name]
    assert choose_chunks(times, num_tokens=1024) == expected
    best = min(both_seconds(count, times) for count in (1, 2, 4, 8))
    assert both_seconds(expected, times) <= best / 0.95, "far from the best prediction"


def test_no_more_chunks_than_tokens() -> None:
    assert choose_chunks(LayerTimes(4.0, 0.0, 4.0, 0.0, 1.0, 1.0), num_tokens=3) == 2


def test_layer_of_two_chunks_by_hand() -> None:
    """Rows at 2 and 4; experts 2 to 3 and 4 to 5; results 4 to 6 (the link is free) and 6 to 8; 5 + 1 of compute."""
    times = LayerTimes(message=4.0, per_message=0.0, experts=2.0, per_call=0.0, before=1.0, after=1.0)
    assert layer_seconds(1, times) == 10.0
    assert layer_seconds(2, times) == 8.0
    assert waiting_seconds(2, times) == pytest.approx(4.0)


def test_backward_of_two_chunks_by_hand() -> None:
    """Gradients at 2 and 4, what ran last until 6; experts 6 to 8 and 8 to 10; their gradients 8 to 10 and 10 to 12."""
    times = LayerTimes(message=4.0, per_message=0.0, experts=2.0, per_call=0.0, before=1.0, after=3.0)
    assert backward_of(times) == LayerTimes(
        message=4.0, per_message=0.0, experts=4.0, per_call=0.0, before=6.0, after=2.0
    )
    assert layer_seconds(2, backward_of(times)) == 12.0
    assert layer_seconds(2, times) == 8.0  # the forward: experts 2 to 3 and 4 to 5, results 4 to 6 and 6 to 8; 5 + 3
    assert both_seconds(2, times) == 20.0
    assert exposed_share(2, times) == pytest.approx((8 - 6 + 12 - 12) / 20)


def test_fixed_cost_and_rate_from_two_measurements() -> None:
    assert line(800, 9.0, 100, 2.0) == pytest.approx((8.0, 1.0))
    assert line(800, 1.0, 100, 2.0) == pytest.approx((0.0, 1.0)), "a small message that was slower has no rate"
    assert line(100, 2.0, 100, 1.0) == (2.0, 0.0)
