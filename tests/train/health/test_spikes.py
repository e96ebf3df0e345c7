"""The spike detector: its logarithm, its warm-up, planted spikes, and no false alarm on clean curves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from train.health.spikes import LEAST_OF_LOSS, LEAST_OF_NORM, deviation, logarithm, push

SIZE, SIGMAS = 128, 6.0


def test_logarithm_is_exact_to_its_last_bits() -> None:
    values = [1e-300, 1e-7, 0.1, 0.999, 1.0, 1.5, math.e, 7.3, 1e4, 1e300]
    for value in values:
        assert logarithm(value) == pytest.approx(math.log(value), rel=1e-15, abs=1e-15)
    assert logarithm(0.0) == logarithm(1e-300)


def alarms(values: np.ndarray, least: float) -> list[int]:
    """The positions at which a curve spikes."""
    window: list[float] = []
    found = []
    for position, value in enumerate(values):
        sigmas = deviation(window, logarithm(float(value)), SIZE, least)
        if sigmas is not None and sigmas > SIGMAS:
            found.append(position)
        push(window, logarithm(float(value)), SIZE)
    return found


def clean_loss(seed: int, steps: int = 1500) -> np.ndarray:
    """As in the quick start: from 8.3 to below 4, each batch 3 % off, with other data from a third on."""
    draw = np.random.default_rng(seed)
    step = np.arange(steps)
    curve = 3.3 + 5.0 * np.exp(-step / 60) + 0.7 * np.exp(-step / 500)
    curve[steps // 3 :] += 0.1  # another mixture
    return np.asarray(curve * np.exp(draw.normal(0, 0.03, steps)))


def clean_norm(seed: int, steps: int = 1500) -> np.ndarray:
    """Rises after the warm-up and has a long tail above (Student's t with 9 degrees of freedom, 6 % of the norm)."""
    draw = np.random.default_rng(seed)
    step = np.arange(steps)
    curve = 1.0 - 0.5 * np.exp(-step / 300) + 0.8 * np.exp(-step / 30)
    return np.asarray(curve * np.exp(0.06 * draw.standard_t(9, steps)))


def test_clean_curves_raise_no_alarm() -> None:
    """20 curves of 1,500 steps."""
    for seed in range(20):
        assert alarms(clean_loss(seed), LEAST_OF_LOSS) == []
        assert alarms(clean_norm(seed), LEAST_OF_NORM) == []


@pytest.mark.parametrize("at", [70, 200, 333, 1499])
def test_planted_spikes_are_found_at_their_step(at: int) -> None:
    loss, norm = clean_loss(at), clean_norm(at)
    loss[at] *= 1.5
    norm[at] *= 4.0
    assert alarms(loss, LEAST_OF_LOSS) == [at]
    assert alarms(norm, LEAST_OF_NORM) == [at]


def test_ten_spikes_in_a_window_hide_none_of_them() -> None:
    """Mean and standard deviation would grow with each; median and distance from it do not."""
    loss = clean_loss(0)
    places = list(range(700, 800, 10))
    loss[places] *= 2.0
    assert alarms(loss, LEAST_OF_LOSS) == places


def test_falling_values_are_no_spike() -> None:
    loss = clean_loss(1)
    loss[900:] *= 0.5
    assert alarms(loss, LEAST_OF_LOSS) == []


def test_a_lasting_rise_becomes_the_new_normal() -> None:
    """An eighth of a window after a jump the detector compares with the new level."""
    loss = clean_loss(2)
    loss[900:] *= 1.6
    found = alarms(loss, LEAST_OF_LOSS)
    assert found[0] == 900
    assert found[-1] < 900 + SIZE // 8 + 4


def test_nothing_is_judged_before_half_a_window() -> None:
    values = [1.0] * (SIZE // 2 - 1) + [100.0]
    assert alarms(np.array(values), LEAST_OF_LOSS) == []
    assert alarms(np.array([1.0, *values]), LEAST_OF_LOSS) == [SIZE // 2]


def test_constant_values_have_a_least_spread() -> None:
    window = [logarithm(2.0)] * SIZE
    assert deviation(window, logarithm(2.1), SIZE, LEAST_OF_LOSS) == pytest.approx(math.log(1.05) / LEAST_OF_LOSS)
