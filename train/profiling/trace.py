"""A profiled step in the Chrome trace format, which Perfetto reads: torch's events, sorted into named lanes."""

# Times of events are in microseconds; those of spans and journeys in seconds of `time.monotonic`

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.profiling.recorder import COMPUTE, LANES, PIPELINE, CommSpan, Slice
from train.profiling.timeline import Operator

Event = dict[str, Any]
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
ROWS = 1000  # numbers of threads for one lane: exchanges that overlap lie in rows of their own


@dataclass
class TorchEvents:
    """What torch's profiler saw. Times are already the lanes' own."""

    compute: list[Event]  # the main thread's operators, on a GPU the kernels of its compute stream
    others: dict[str, list[Event]]  # by thread or stream

    @property
    def operators(self) -> list[Operator]:
        """Those that compute, with autograd's numbers."""
        made = []
        for event in self.compute:
            if event["cat"] in ("cpu_op", *ON_DEVICE):
                start, number = event["ts"] / 1e6, event.get("args", {}).get("Sequence number")
                made.append(Operator(event["name"], start, start + event["dur"] / 1e6, number))
        return made


def read_torch(path: Path, marks: list[float], mark_name: str, main_thread: int) -> TorchEvents:
    """Read what torch exported.

    ``marks`` are the lanes' times inside each of the annotations ``mark_name``: the shortest of these tells how far
    torch's clock is from ours.
    """
    found = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]
    seen = [event for event in found if event["name"] == mark_name and event["cat"] == "user_annotation"]
    best = min(zip(seen, marks, strict=True), key=lambda pair: pair[0]["dur"])
    shift = 1e6 * best[1] - (best[0]["ts"] + best[0]["dur"] / 2)
    threads: dict[tuple[bool, Any], list[Event]] = {}
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


def rank_events(
    rank: int, spans: list[Slice], journeys: list[CommSpan], sent: list[tuple[float, str, int]], seen: TorchEvents
) -> list[Event]:
    """All events of one rank, as one process of the trace; times in microseconds of `time.monotonic`."""
    compute = [_kept(event) for event in seen.compute]
    lanes: dict[str, list[list[Event]]] = {lane: [] for lane in LANES}  # slices that stay together, the outer one first
    for span in spans:
        lanes[span.lane].append([_slice(span.name, "phase", span.start, span.end)])
    for journey in journeys:
        lanes[journey.lane].append(exchange_slices(journey))
        if journey.blocked is not None:
            compute.append(_slice(f"blocked: {journey.name}", "blocked", *journey.blocked))
    compute += [event for group in lanes.pop(COMPUTE) for event in group]
    threads = [(COMPUTE, [nested(compute)])] + [(lane, rows_of(groups)) for lane, groups in lanes.items() if groups]
    threads += [(name, [nested([_kept(event) for event in found])]) for name, found in sorted(seen.others.items())]
    events = [_about("process_name", rank, 0, name=f"rank {rank}")]
    events.append(_about("process_sort_index", rank, 0, sort_index=rank))
    for number, (lane, rows) in enumerate(threads):
        for row, slices in enumerate(rows):
            thread = 1 + ROWS * number + row
            events.append(_about("thread_name", rank, thread, name=lane if row == 0 else f"{lane} ({row + 1})"))
            events.append(_about("thread_sort_index", rank, thread, sort_index=thread))
            events += [event | {"pid": rank, "tid": thread} for event in slices]
            if lane == PIPELINE and row == 0:
                events += [_instant(rank, thread, *one) for one in sent]
    return events


def exchange_slices(journey: CommSpan) -> list[Event]:
    """The exchange from start to completion, and inside it what of it this rank stood still for."""
    assert journey.end is not None
    whole = _slice(journey.name, "exchange", journey.start, journey.end)
    whole["args"] = {"started in": journey.around, "blocked ms": round(1e3 * journey.exposed, 3)}
    if journey.num_bytes:
        whole["args"]["bytes sent"] = journey.num_bytes
    if journey.blocked is None or journey.blocked[0] >= journey.end:
        return [whole]
    return [whole, _slice("blocked", "blocked", max(journey.start, journey.blocked[0]), journey.end)]


def rows_of(groups: list[list[Event]]) -> list[list[Event]]:
    """Spread groups of slices, in each the outer one first, over rows so that those of a row lie apart."""
    rows: list[list[Event]] = []
    ends: list[float] = []
    for group in sorted(groups, key=lambda group: group[0]["ts"]):
        start, end = group[0]["ts"], group[0]["ts"] + group[0]["dur"]
        row = next((place for place, last in enumerate(ends) if last <= start), len(rows))
        if row == len(rows):
            rows.append([])
            ends.append(end)
        rows[row] += group
        ends[row] = end
    return rows


def nested(slices: list[Event]) -> list[Event]:
    """The slices of one thread; one that outlasts what it began in (clocks differ by a microsecond) is cut there."""
    ends: list[float] = []
    out = []
    for event in sorted(slices, key=lambda event: (event["ts"], -event["dur"])):
        while ends and ends[-1] <= event["ts"]:
            ends.pop()
        end = min([event["ts"] + event["dur"], *ends[-1:]])
        ends.append(end)
        out.append(event | {"dur": max(0.0, end - event["ts"])})
    return out


def moved(events: list[Event], origin: float) -> list[Event]:
    """The events with times from ``origin`` (microseconds) on."""
    return [event | {"ts": round(event["ts"] - origin, 3)} if "ts" in event else event for event in events]


def _kept(event: Event) -> Event:
    kept = {key: event[key] for key in ("ph", "name", "cat", "ts", "dur")}
    args = {key: value for key, value in event.get("args", {}).items() if key in ("Sequence number", "stream")}
    return kept | {"args": args} if args else kept


def _slice(name: str, kind: str, start: float, end: float) -> Event:
    colour: Event = {"cname": "terrible"} if kind == "blocked" else {}
    return {"ph": "X", "name": name, "cat": kind, "ts": 1e6 * start, "dur": max(0.0, 1e6 * (end - start)), **colour}


def _instant(rank: int, thread: int, time: float, name: str, num_bytes: int) -> Event:
    event = {"ph": "i", "s": "t", "name": name, "cat": "send", "ts": 1e6 * time, "pid": rank, "tid": thread}
    return event | {"args": {"bytes sent": num_bytes}}


def _about(kind: str, rank: int, thread: int, **args: Any) -> Event:
    return {"ph": "M", "name": kind, "pid": rank, "tid": thread, "args": args}


def writer(step: int) -> Callable[[list[Event]], str]:
    """Events → the text of a trace file."""
    about = {"program": "longcat", "step": step}
    return lambda events: json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": about})
