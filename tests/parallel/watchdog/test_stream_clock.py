"""Blocked seconds of a GPU are those of its compute stream."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import SPANS, begin_step, take_blocked_seconds, wait_span
from parallel.watchdog.stream_clock import count_stream_waits

DISPATCH = Event(SpanKind.EXPERT_DISPATCH, layer=0)


class Counted:
    """A fake device clock that records its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def enter(self) -> None:
        self.calls.append("enter")

    def leave(self) -> None:
        self.calls.append("leave")

    def take(self) -> float:
        self.calls.append("take")
        return 1.5


@pytest.fixture(autouse=True)
def _host_clock() -> Iterator[None]:
    yield
    SPANS.stream_clock = None


def test_device_clock_is_read_once_per_outermost_wait() -> None:
    SPANS.stream_clock = clock = Counted()
    begin_step(1)
    with wait_span(DISPATCH), wait_span(DISPATCH):
        pass
    assert take_blocked_seconds() == 1.5 and clock.calls == ["take", "enter", "leave", "take"]


@pytest.mark.alone
def test_cpu_uses_the_host_clock() -> None:
    count_stream_waits(torch.device("cpu"))
    begin_step(1)
    with wait_span(DISPATCH):
        pass
    assert SPANS.stream_clock is None and 0 < take_blocked_seconds() < 0.1


@pytest.mark.gpu
def test_only_waits_of_the_compute_stream_count() -> None:
    device, side = torch.device("cuda"), torch.cuda.Stream()
    count_stream_waits(device)
    begin_step(1)
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
    with wait_span(DISPATCH):
        torch.cuda.current_stream().wait_stream(side)
    waited = take_blocked_seconds()
    assert waited > 0.02
    with torch.cuda.stream(side), wait_span(DISPATCH):
        torch.cuda._sleep(200_000_000)
    assert take_blocked_seconds() == 0.0
