"""Profiles the steps of `profile.steps` and writes traces and timelines to the run's `traces/`."""

from __future__ import annotations

import gzip
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from longcat.model import LongCat
from parallel.mesh import Topology
from parallel.reduce import min_over_ranks, sum_over_ranks
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import work_span
from train.profiling.config import ProfileConfig, steps_of
from train.profiling.modules import module_hooks
from train.profiling.recorder import StepRecorder
from train.profiling.timeline import compute_slices, outermost, timeline
from train.profiling.trace import TorchEvents, TraceEvent, moved, rank_events, read_torch, writer

MERGED_RANKS = 8  # in the file of all ranks and in the report's picture; every rank has a file of its own
MARK, MARKS = "clock of the tracks", 8


class Profiler:
    """Profiles the configured steps; any other step costs nothing. ``models`` are this rank's parts."""

    def __init__(self, config: ProfileConfig, folder: Path, models: Sequence[LongCat], topology: Topology) -> None:
        self.steps = frozenset(steps_of(config.steps))
        self.folder, self.models, self.topology = folder / "traces", models, topology
        self.note = ""  # what was written last

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step; a collective of all ranks if the step is profiled."""
        self.note = ""
        if number not in self.steps:
            yield
            return
        recorder = StepRecorder()
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.topology.device.type == "cuda")
        torch_profile = profile(activities=activities)
        with silent():
            torch_profile.start()
        marks = _marks()
        recorder.start()
        start = time.monotonic()
        try:
            with module_hooks(self.models, recorder.module):
                yield
                end = time.monotonic()
        finally:
            recorder.finish()
            with silent():
                torch_profile.stop()
        with work_span(Event(SpanKind.PROFILE)):
            self._write(number, recorder, torch_profile, marks, (start, end))

    def _write(
        self, step: int, recorder: StepRecorder, seen: Any, marks: list[float], span: tuple[float, float]
    ) -> None:
        rank = torch.distributed.get_rank()
        self.folder.mkdir(parents=True, exist_ok=True)
        export = self.folder / f".step-{step:06}-rank-{rank:04}.torch.json"
        seen.export_chrome_trace(str(export))
        events = read_torch(export, marks, MARK, threading.get_native_id())
        export.unlink()
        events = within(events, span)
        to_wall = wall_offset()
        origin = min_over_ranks(span[0] + to_wall) - to_wall  # one clock for all ranks, seen from this one
        found = rank_events(rank, recorder, events)
        text = writer(step)(moved(found, 1e6 * origin))
        _put(self._file(step, rank), gzip.compress(text.encode(), compresslevel=3))
        if rank < MERGED_RANKS:
            compute = compute_slices(outermost(events.operators), events.operators, recorder.modules, recorder.phases)
            line = timeline(rank, compute, recorder.phases, recorder.comm_spans, span, origin)
            _put(self._part(step, rank), json.dumps(line).encode())
        sum_over_ranks(torch.zeros(1))  # all have written
        if self.topology.is_first:
            self._merge(step)

    def _merge(self, step: int) -> None:
        """One trace and one timeline of the first ranks."""
        ranks = range(min(MERGED_RANKS, self.topology.world_size))
        events: list[TraceEvent] = []
        for rank in ranks:
            events += json.loads(gzip.decompress(self._file(step, rank).read_bytes()))["traceEvents"]
        target = self.folder / f"step-{step:06}.json"
        _put(target, writer(step)(events).encode())
        lines = [json.loads(self._part(step, rank).read_text()) for rank in ranks]
        merged = {"step": step, "world_size": self.topology.world_size, "ranks": lines}
        _put(self.folder / f"timeline-{step:06}.json", json.dumps(merged).encode())
        for rank in ranks:
            self._part(step, rank).unlink()
        self.note = f"profile of step {step}: {target} (open it in ui.perfetto.dev)"

    def _file(self, step: int, rank: int) -> Path:
        return self.folder / f"step-{step:06}-rank-{rank:04}.json.gz"

    def _part(self, step: int, rank: int) -> Path:
        return self.folder / f".timeline-{step:06}-rank-{rank:04}.json"


def within(events: TorchEvents, span: tuple[float, float]) -> TorchEvents:
    """Only the events that began in the step."""

    def inside(found: list[TraceEvent]) -> list[TraceEvent]:
        return [event for event in found if 1e6 * span[0] <= event["ts"] <= 1e6 * span[1]]

    others = {name: inside(found) for name, found in events.others.items()}
    return TorchEvents(inside(events.compute), {name: found for name, found in others.items() if found})


@contextmanager
def silent() -> Iterator[None]:
    """Torch's profiler writes lines of its own about starting and stopping to standard error, past any logger."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _marks() -> list[float]:
    """Write marks into torch's profile → the time inside each."""
    times = []
    for _ in range(MARKS):
        with record_function(MARK):
            times.append(time.monotonic())
    return times


def wall_offset() -> float:
    """Seconds from `time.monotonic` to the time of day, which ranks on several machines share."""
    best, offset = float("inf"), 0.0
    for _ in range(20):
        before = time.monotonic()
        wall = time.time()
        after = time.monotonic()
        if after - before < best:
            best, offset = after - before, wall - (before + after) / 2
    return offset


def _put(path: Path, content: bytes) -> None:
    """Write and rename, so that a reader sees all of the file or none."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)
