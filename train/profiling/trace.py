"""A profiled step in the Chrome trace format, which Perfetto reads: torch's events, sorted into named tracks."""

# Times of trace events are in microseconds; those of slices and comm spans in seconds of `time.monotonic`

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longcat.json_text import dumps
from parallel.watchdog.events import Event, Track
from train.profiling.recorder import CommSpan, Send, StepRecorder
from train.profiling.timeline import Operator

TraceEvent = dict[str, Any]
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
ROWS = 1000  # thread numbers for one track: comm spans that overlap are in rows of their own


@dataclass
class TorchEvents:
    """What torch's profiler recorded, with times of the tracks' clock."""

    compute: list[TraceEvent]  # the main thread's operators, on a GPU the kernels of its compute stream
    others: dict[str, list[TraceEvent]]  # by thread or stream

    @property
    def operators(self) -> list[Operator]:
        """The events of operators, with autograd's sequence numbers."""
        made = []
        for event in self.compute:
            if event["cat"] in ("cpu_op", *ON_DEVICE):
                start, number = event["ts"] / 1e6, event.get("args", {}).get("Sequence number")
                made.append(Operator(event["name"], start, start + event["dur"] / 1e6, number))
        return made


def read_torch(path: Path, marks: list[float], mark_name: str, main_thread: int) -> TorchEvents:
    """Read what torch exported.

    ``marks`` are the tracks' times inside each of the annotations ``mark_name``: the shortest of these gives the offset
    of torch's clock.
    """
    found = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]
    seen = [event for event in found if event["name"] == mark_name and event["cat"] == "user_annotation"]
    best = min(zip(seen, marks, strict=True), key=lambda pair: pair[0]["dur"])
    shift = 1e6 * best[1] - (best[0]["ts"] + best[0]["dur"] / 2)
    threads: dict[tuple[bool, Any], list[TraceEvent]] = {}
    for event in found:
        if event["name"] != mark_name and event["cat"] in ("cpu_op", "user_annotation", *ON_DEVICE):
            key = event["cat"] in ON_DEVICE, event["tid"]
            threads.setdefault(key, []).append(event | {"ts": event["ts"] + shift})
    streams = [key for key in threads if key[0]]
    main: tuple[bool, Any] = (False, main_thread)
    if streams:
        main = max(streams, key=lambda key: sum(e["dur"] for e in threads[key] if "nccl" not in e["name"]))
    others = {
        f"stream {thread}" if device else "host" if thread == main_thread else f"thread {thread}": events
        for (device, thread), events in threads.items()
        if (device, thread) != main
    }
    return TorchEvents(threads.get(main, []), others)


def rank_events(rank: int, recorder: StepRecorder, seen: TorchEvents) -> list[TraceEvent]:
    """All events of one rank, as one process of the trace; times in microseconds of `time.monotonic`."""
    compute = [_kept(event) for event in seen.compute]
    # Slices that stay together, the outer one first
    tracks: dict[str, list[list[TraceEvent]]] = {track: [] for track in Track if track != Track.COMPUTE}
    for one in (*recorder.phases, *recorder.modules):
        compute.append(_slice(one.event, "phase", one.start, one.end))
    for one in recorder.phases:
        if one.event.action is not None:
            action = _slice(one.event, "phase", one.start, one.end) | {"name": one.event.action}
            tracks[Track.PIPELINE].append([action])
    for comm_span in recorder.comm_spans:
        tracks[comm_span.track].append(communication_slices(comm_span))
        if comm_span.blocked is not None:
            compute.append(_blocked(f"blocked: {comm_span.event.text}", *comm_span.blocked))
    threads = [(str(Track.COMPUTE), [nested(compute)])]
    threads += [(track, rows_of(groups)) for track, groups in tracks.items() if groups]
    threads += [(name, [nested([_kept(event) for event in found])]) for name, found in sorted(seen.others.items())]
    events = [_metadata("process_name", rank, 0, name=f"rank {rank}")]
    events.append(_metadata("process_sort_index", rank, 0, sort_index=rank))
    for number, (track, rows) in enumerate(threads):
        for row, slices in enumerate(rows):
            thread = 1 + ROWS * number + row
            events.append(_metadata("thread_name", rank, thread, name=track if row == 0 else f"{track} ({row + 1})"))
            events.append(_metadata("thread_sort_index", rank, thread, sort_index=thread))
            events += [event | {"pid": rank, "tid": thread} for event in slices]
            if track == Track.PIPELINE and row == 0:
                events += [_instant(rank, thread, send) for send in recorder.sends]
    return events


def communication_slices(comm_span: CommSpan) -> list[TraceEvent]:
    """The comm span from launch to completion, and inside it the part that this rank waited."""
    assert comm_span.end is not None
    outer = _slice(comm_span.event, "communication", comm_span.start, comm_span.end)
    outer["args"]["blocked ms"] = round(1e3 * comm_span.exposed, 3)
    if comm_span.phase is not None:
        outer["args"]["launched in"] = comm_span.phase.text
    if comm_span.num_bytes:
        outer["args"]["bytes sent"] = comm_span.num_bytes
    if comm_span.blocked is None or comm_span.blocked[0] >= comm_span.end:
        return [outer]
    return [outer, _blocked("blocked", max(comm_span.start, comm_span.blocked[0]), comm_span.end)]


def rows_of(groups: list[list[TraceEvent]]) -> list[list[TraceEvent]]:
    """Distribute groups of slices, in each the outer one first, over rows so that groups of a row do not overlap."""
    rows: list[list[TraceEvent]] = []
    ends: list[float] = []
    for group in sorted(groups, key=lambda group: group[0]["ts"]):
        start, end = group[0]["ts"], group[0]["ts"] + group[0]["dur"]
        row = next((number for number, last in enumerate(ends) if last <= start), len(rows))
        if row == len(rows):
            rows.append([])
            ends.append(end)
        rows[row] += group
        ends[row] = end
    return rows


def nested(slices: list[TraceEvent]) -> list[TraceEvent]:
    """The slices of one thread; one that outlasts the slice that it began in (clocks differ by 1 µs) is cut there."""
    ends: list[float] = []
    out = []
    for event in sorted(slices, key=lambda event: (event["ts"], -event["dur"])):
        while ends and ends[-1] <= event["ts"]:
            ends.pop()
        end = min([event["ts"] + event["dur"], *ends[-1:]])
        ends.append(end)
        out.append(event | {"dur": max(0.0, end - event["ts"])})
    return out


def moved(events: list[TraceEvent], origin: float) -> list[TraceEvent]:
    """The events with times from ``origin`` (microseconds) on."""
    return [event | {"ts": round(event["ts"] - origin, 3)} if "ts" in event else event for event in events]


def _kept(event: TraceEvent) -> TraceEvent:
    kept = {key: event[key] for key in ("ph", "name", "cat", "ts", "dur")}
    args = {key: value for key, value in event.get("args", {}).items() if key in ("Sequence number", "stream")}
    return kept | {"args": args} if args else kept


def _slice(event: Event, category: str, start: float, end: float) -> TraceEvent:
    args = {key: value for key, value in event.fields().items() if key != "others"}
    return _complete(event.text, category, start, end) | {"args": args}


def _blocked(name: str, start: float, end: float) -> TraceEvent:
    return _complete(name, "blocked", start, end) | {"cname": "terrible"}


def _complete(name: str, category: str, start: float, end: float) -> TraceEvent:
    return {"ph": "X", "name": name, "cat": category, "ts": 1e6 * start, "dur": max(0.0, 1e6 * (end - start))}


def _instant(rank: int, thread: int, send: Send) -> TraceEvent:
    args = {"bytes sent": send.num_bytes, "to rank": send.peer}
    event = {"ph": "i", "s": "t", "name": send.event.text, "cat": "send", "ts": 1e6 * send.time, "args": args}
    return event | {"pid": rank, "tid": thread}


def _metadata(kind: str, rank: int, thread: int, **args: Any) -> TraceEvent:
    return {"ph": "M", "name": kind, "pid": rank, "tid": thread, "args": args}


def writer(step: int) -> Callable[[list[TraceEvent]], str]:
    """Events → the text of a trace file."""
    metadata = {"program": "longcat", "step": step}
    return lambda events: dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": metadata})
