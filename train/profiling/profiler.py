"""Profiles the steps of `profile.steps` and writes traces and timelines to the run's `traces/`."""

from __future__ import annotations

import gzip
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from longcat.json_text import dumps
from longcat.model import LongCat
from parallel.mesh import Topology
from parallel.reduce import all_gather_object, min_over_ranks
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import work_span
from train.checkpoint.failures import describe, first_failure
from train.profiling.config import ProfileConfig, steps_of
from train.profiling.modules import module_hooks
from train.profiling.recorder import StepRecorder
from train.profiling.timeline import compute_slices, outermost, timeline
from train.profiling.trace import TorchEvents, TraceEvent, moved, rank_events, read_torch, writer
from train.run_dir.files import remove_quietly

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
        """Write this rank's files; the first rank merges them. A failure on any rank is a note, and no file is left."""
        rank, to_wall = torch.distributed.get_rank(), wall_offset()
        origin = min_over_ranks(span[0] + to_wall) - to_wall  # one clock for all ranks, seen from this one
        failure = self._attempt(lambda: self._write_rank(step, rank, recorder, seen, marks, span, origin))
        failed = {at: text for at, text in enumerate(all_gather_object(failure)) if text}
        if self.topology.is_first and not failed and (failure := self._attempt(lambda: self._merge(step))):
            failed = {0: failure}
        if failed:
            for path in (self._export(step, rank), self._file(step, rank), self._part(step, rank)):
                remove_quietly(path)
                remove_quietly(partial_of(path))
            self.note = f"no profile of step {step}: {first_failure(failed)}; training continues"

    @staticmethod
    def _attempt(action: Callable[[], None]) -> str:
        """The reason why ``action`` could not write or read back a file; empty if it could."""
        try:
            action()
        except (
            OSError,
            ValueError,
            RuntimeError,
        ) as error:  # torch's export raises the last
            return describe(error)
        return ""

    def _write_rank(
        self,
        step: int,
        rank: int,
        recorder: StepRecorder,
        seen: Any,
        marks: list[float],
        span: tuple[float, float],
        origin: float,
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        export = self._export(step, rank)
        seen.export_chrome_trace(str(export))
        events = read_torch(export, marks, MARK, threading.get_native_id())
        export.unlink()
        events = within(events, span)
        found = rank_events(rank, recorder, events)
        text = writer(step)(moved(found, 1e6 * origin))
        _put(self._file(step, rank), gzip.compress(text.encode(), compresslevel=3))
        if rank < MERGED_RANKS:
            compute = compute_slices(outermost(events.operators), events.operators, recorder.modules, recorder.phases)
            line = timeline(rank, compute, recorder.phases, recorder.comm_spans, span, origin)
            _put(self._part(step, rank), dumps(line).encode())

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
        _put(self.folder / f"timeline-{step:06}.json", dumps(merged).encode())
        for rank in ranks:
            self._part(step, rank).unlink()
        self.note = f"profile of step {step}: {target} (open it in ui.perfetto.dev)"

    def _export(self, step: int, rank: int) -> Path:
        return self.folder / f".step-{step:06}-rank-{rank:04}.torch.json"

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
    partial = partial_of(path)
    partial.write_bytes(content)
    partial.replace(path)


def partial_of(path: Path) -> Path:
    """The name of a file until it is complete."""
    return path.with_name(f"{path.name}.partial")
