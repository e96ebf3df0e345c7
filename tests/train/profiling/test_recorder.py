"""Blocked seconds, and what a recorder makes of spans: phases, communication with its end, waits."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import parallel
import train
from parallel.watchdog.events import Event, SpanKind, Track
from parallel.watchdog.spans import (
    SPANS,
    begin_step,
    record_launch,
    record_send,
    take_blocked_seconds,
    wait_span,
    work_span,
)
from train.profiling.recorder import CommSpan, StepRecorder

FORWARD = Event(SpanKind.FORWARD, micro_batch=2)
DISPATCH = Event(SpanKind.EXPERT_DISPATCH, layer=3)
REDUCTION = Event(SpanKind.GRADIENT_REDUCE_SCATTER, module="layers.0")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    SPANS.clear()
    yield
    SPANS.recorder = None
    SPANS.clear()


class FakeWork:
    """A collective that is complete when the test says so."""

    def __init__(self) -> None:
        self.callbacks: list[Callable[[Any], None]] = []

    def get_future(self) -> FakeWork:
        return self

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self.callbacks.append(callback)

    def complete(self) -> None:
        for callback in self.callbacks:
            callback(self)


@pytest.mark.alone
def test_outermost_waits_count_once_and_nothing_else() -> None:
    begin_step(1)
    with work_span(FORWARD):
        time.sleep(0.02)
        with wait_span(DISPATCH), wait_span(REDUCTION):
            time.sleep(0.01)
    with work_span(Event(SpanKind.PIPELINE)):
        time.sleep(0.02)
        with wait_span(DISPATCH):
            time.sleep(0.01)
    assert 0.02 <= take_blocked_seconds() < 0.035
    begin_step(2)
    assert take_blocked_seconds() == 0.0


def test_collective_spans_launch_to_completion() -> None:
    """It is exposed only while a rank is blocked in its wait."""
    recorder, early, late = StepRecorder(), FakeWork(), FakeWork()
    recorder.start()
    with work_span(FORWARD):
        for work in (early, late):
            record_launch(DISPATCH, 1000, work)
        early.complete()
        time.sleep(0.01)
        with wait_span(DISPATCH):
            pass
        with wait_span(DISPATCH):
            time.sleep(0.01)
            late.complete()
    recorder.finish()
    first, second = recorder.comm_spans
    assert {one.track for one in recorder.comm_spans} == {Track.DISPATCH}
    assert first.phase == FORWARD and first.num_bytes == 1000
    assert first.end is not None and first.end - first.start < 0.008 and first.exposed < 0.005
    assert second.end is not None and second.end - second.start >= 0.02 and second.exposed >= 0.01
    assert [one.event for one in recorder.phases] == [FORWARD]


def test_blocking_collective_is_exposed_throughout() -> None:
    recorder = StepRecorder()
    recorder.start()
    with wait_span(REDUCTION):
        time.sleep(0.005)
    recorder.finish()
    (one,) = recorder.comm_spans
    assert one.track == Track.GRADIENTS and one.blocked == (one.start, one.end) and one.exposed >= 0.005
    with wait_span(DISPATCH):
        pass
    assert len(recorder.comm_spans) == 1


def test_collective_without_completion_ends_with_its_wait() -> None:
    one = CommSpan(DISPATCH, None, 1.0, blocked=(2.0, 3.0))
    one.close(9.0)
    assert one.end == 3.0
    never = CommSpan(DISPATCH, None, 1.0)
    never.close(9.0)
    assert never.end == 9.0


def test_pipeline_actions_have_short_names() -> None:
    assert Event(SpanKind.FORWARD, micro_batch=2, layers=(0, 1)).action == "F2, layers 0 to 1"
    assert Event(SpanKind.INPUT_GRADIENTS, micro_batch=3, layers=(4, 4)).action == "B3, layer 4"
    assert Event(SpanKind.WEIGHT_GRADIENTS, micro_batch=1, layers=(0, 1)).action == "W1, layers 0 to 1"
    assert FORWARD.action is None and Event(SpanKind.OPTIMIZER).action is None


def test_an_event_is_put_into_words_from_its_fields() -> None:
    assert FORWARD.text == "forward of micro-batch 2" and DISPATCH.text == "expert dispatch, layer 3"
    assert Event(SpanKind.ATTENTION, layer=3, sublayer=1).text == "attention 1, layer 3"
    assert REDUCTION.text == "gradient reduce-scatter, layers.0"
    assert Event(SpanKind.OUTCOME, of=SpanKind.CHECKPOINT_HASH).text == "outcome of hashing the checkpoint"
    received = Event(SpanKind.RECEIVE_GRADIENTS, micro_batch=1, layers=(0, 0))
    sent = Event(SpanKind.SEND_HIDDEN_STATES, micro_batch=2, layers=(0, 1), others=(received,))
    words = "hidden states of micro-batch 2 out of layers 0 to 1 and gradients of micro-batch 1 into layer 0"
    assert sent.text == words


@pytest.mark.parametrize("kind", SpanKind)
def test_an_event_of_each_kind_is_read_as_it_was_written(kind: SpanKind) -> None:
    event = Event(kind, 3, 1, 2, (0, 1), "layers.3", SpanKind.CHECKPOINT_HASH, (DISPATCH,))
    for one in (event, Event(kind)):
        assert Event.parse(json.loads(json.dumps(one.fields()))) == one and one.text


def test_a_launch_meets_the_wait_of_an_equal_event_only() -> None:
    recorder = StepRecorder()
    recorder.start()
    record_launch(DISPATCH, 1000, FakeWork())
    record_send(FORWARD, 5, peer=1)
    with wait_span(DISPATCH._replace(layer=4)):
        pass
    recorder.finish()
    launched, waited = recorder.comm_spans
    assert launched.blocked is None and waited.blocked is not None and waited.num_bytes == 0
    assert [one[1:] for one in recorder.sends] == [(FORWARD, 5, 1)]


def test_every_wait_has_a_communication_track() -> None:
    """The kinds of all wait spans and collectives, as the sources name them."""
    pattern = re.compile(
        r"(?:wait_span|waits|AllGather|AllToAll|ReduceScatter)\(\s*(?:Event|self\._event)\(SpanKind\.(\w+)"
    )
    sources = [path.read_text() for package in (parallel, train) for path in Path(package.__path__[0]).rglob("*.py")]
    kinds = {SpanKind[name] for source in sources for name in pattern.findall(source)}
    assert len(kinds) > 15
    assert not {kind for kind in kinds if kind.track == Track.COMPUTE}
