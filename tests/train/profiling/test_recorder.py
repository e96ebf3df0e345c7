"""Blocked seconds, and what a recorder makes of crumbs: lanes, exchanges with their ends, waits."""

from __future__ import annotations

import ast
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import parallel
from parallel.watchdog.spans import SPANS, begin_step, blocked_seconds, record_launch, wait_span, work_span
from train.profiling import recorder
from train.profiling.recorder import CommSpan, StepRecorder, action_of, lane_of

PARALLEL = Path(parallel.__file__).parent


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    SPANS.clear()
    yield
    SPANS.recorder = None
    SPANS.clear()


class FakeWork:
    """An exchange that is complete when the test says so."""

    def __init__(self) -> None:
        self.callbacks: list[Callable[[Any], None]] = []

    def get_future(self) -> FakeWork:
        return self

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self.callbacks.append(callback)

    def complete(self) -> None:
        for callback in self.callbacks:
            callback(self)


def test_outermost_waits_count_once_and_nothing_else() -> None:
    begin_step(1)
    with work_span("forward of micro-batch 1"):
        time.sleep(0.02)
        with wait_span("expert dispatch, layer 0"), wait_span("inside it"):
            time.sleep(0.01)
    with work_span("the schedule of the pipeline"):
        time.sleep(0.02)
        with wait_span("hidden states"):
            time.sleep(0.01)
    assert 0.02 <= blocked_seconds() < 0.035
    begin_step(2)
    assert blocked_seconds() == 0.0


def test_collective_spans_launch_to_completion() -> None:
    """It is exposed only while a rank is blocked in its wait."""
    recorder, early, late = StepRecorder(), FakeWork(), FakeWork()
    recorder.start()
    with work_span("forward of micro-batch 2"):
        for work in (early, late):
            record_launch("expert dispatch, layer 3", 1000, work)
        early.complete()
        time.sleep(0.01)
        with wait_span("expert dispatch, layer 3"):
            pass
        with wait_span("expert dispatch, layer 3"):
            time.sleep(0.01)
            late.complete()
    recorder.finish()
    first, second = recorder.journeys
    assert {one.lane for one in recorder.journeys} == {"dispatch"}
    assert first.around == "forward of micro-batch 2" and first.num_bytes == 1000
    assert first.end is not None and first.end - first.start < 0.008 and first.exposed < 0.005
    assert second.end is not None and second.end - second.start >= 0.02 and second.exposed >= 0.01
    assert [span.name for span in recorder.spans] == ["forward of micro-batch 2"]


def test_blocking_collective_is_exposed_throughout() -> None:
    recorder = StepRecorder()
    recorder.start()
    with wait_span("summed gradients, layers.0", "fsdp"):
        time.sleep(0.005)
    recorder.finish()
    (one,) = recorder.journeys
    assert one.lane == "gradients" and one.blocked == (one.start, one.end) and one.exposed >= 0.005
    with wait_span("after the end"):
        pass
    assert len(recorder.journeys) == 1


def test_collective_without_completion_ends_with_its_wait() -> None:
    one = CommSpan("pipeline", "hidden states", "", 1.0, blocked=(2.0, 3.0))
    one.close(9.0)
    assert one.end == 3.0
    never = CommSpan("dispatch", "expert dispatch", "", 1.0)
    never.close(9.0)
    assert never.end == 9.0


def test_pipeline_actions_have_short_names() -> None:
    assert action_of("forward of micro-batch 2 in layers 0 to 1") == "F2, layers 0 to 1"
    assert action_of("input gradients of micro-batch 3 in layers 4 to 4") == "B3, layer 4"
    assert action_of("weight gradients of micro-batch 1 in layers 0 to 1") == "W1, layers 0 to 1"
    assert action_of("forward of micro-batch 2") is None and action_of("optimizer") is None


def test_every_collective_has_a_row_of_the_timeline() -> None:
    """Every crumb and exchange of the package, as its source spells it."""
    names = set()
    for path in PARALLEL.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            known = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            if known and node.func.id in ("crumb", "AllGather", "AllToAll", "ReduceScatter") and node.args:  # type: ignore[attr-defined]
                text = node.args[0]  # type: ignore[attr-defined]
                if isinstance(text, ast.JoinedStr):
                    text = text.values[0]
                if isinstance(text, ast.Constant):
                    names.add(str(text.value))
    names -= {"the schedule of the pipeline"}
    assert len(names) > 10
    without = {name for name in names if not any(name.startswith(known) for known in recorder._BEGINNINGS)}
    assert not without, "train/profiling/recorder.py names no lane for these"
    assert lane_of("something new", "pp") == "pipeline" and lane_of("something new") == "gradients"
