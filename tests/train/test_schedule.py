"""Learning-rate schedules."""

from __future__ import annotations

import pytest

from train.schedule import ScheduleConfig, rate_factor


def factors(config: ScheduleConfig, steps: int) -> list[float]:
    config.validate()
    return [rate_factor(config, step) for step in range(1, steps + 1)]


def test_wsd_warms_up_holds_and_decays_in_a_line() -> None:
    config = ScheduleConfig("wsd", warmup_steps=4, decay_start=8, decay_steps=4, final_factor=0.2)
    assert factors(config, 13) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])


def test_wsd_without_a_decay_holds_for_ever() -> None:
    assert factors(ScheduleConfig("wsd", warmup_steps=2), 100)[1:] == [1.0] * 99


def test_constant_schedule() -> None:
    assert factors(ScheduleConfig("constant", warmup_steps=0), 3) == [1.0, 1.0, 1.0]


def test_cosine_ends_at_the_final_factor_and_stays() -> None:
    config = ScheduleConfig("cosine", warmup_steps=2, decay_steps=8, final_factor=0.1)
    found = factors(config, 20)
    assert found[1] == 1.0
    assert found[5] == pytest.approx(0.55)
    assert found[9:] == pytest.approx([0.1] * 11)
    assert found[1:10] == sorted(found[1:10], reverse=True)
