"""The timeline of a profiled step as the report reads it: tracks of slices, and which layer to show enlarged."""

# Times are in microseconds after the first rank's start of the step

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.watchdog.events import ACTIONS, Event, SpanKind, Track, layer_text
from train.checkpoint.files import read_text
from train.report.timeline_v1 import is_version_1, upgrade

# Colours of compute; a kind that is not listed has that of REST
COLOUR_GROUPS = {
    SpanKind.ATTENTION: "attention",
    SpanKind.DENSE_FFN: "dense FFN",
    SpanKind.EXPERTS: "experts",
    SpanKind.HEAD: "head, embedding, MTP",
    SpanKind.EMBEDDING: "head, embedding, MTP",
    SpanKind.MTP: "head, embedding, MTP",
    SpanKind.WEIGHT_GRADIENTS: "weight gradients",
}
REST = "other"
BLOCKED = "blocked"
DIRECTIONS = (
    (SpanKind.FORWARD,),
    (SpanKind.BACKWARD, SpanKind.INPUT_GRADIENTS),
)


@dataclass(frozen=True)
class TrackSlice:
    """An interval of a track. ``colour`` is a key of `timeline.COLOURS`."""

    colour: str
    event: Event
    text: str
    start: float
    end: float
    phase: Event | None = None  # in which communication was launched

    @property
    def label(self) -> str:
        """A few words to write on it: `F2`, `attention 0`."""
        if self.colour in ACTIONS.values():
            return f"{self.colour}{self.event.micro_batch}"
        sublayer = "" if self.event.sublayer is None else f" {self.event.sublayer}"
        return f"{self.event.kind.label}{sublayer}"


@dataclass(frozen=True)
class RankTimeline:
    """One rank's step."""

    rank: int
    start: float
    end: float
    exposed_share: float
    tracks: dict[Track, list[TrackSlice]]  # a track's blocked slices come after those that they cover
    waits: dict[Track, float]  # blocked microseconds

    @property
    def duration(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class StepTimeline:
    """A profiled step."""

    step: int
    world_size: int
    ranks: list[RankTimeline]


@dataclass(frozen=True)
class Window:
    """A part of a step to show enlarged."""

    title: str
    rank: int
    start: float
    end: float


def read_timeline(folder: Path, notes: list[str]) -> StepTimeline | None:
    """The last profiled step of a run folder; None without one. A file that cannot be read adds a line to ``notes``."""
    files = sorted((folder / "traces").glob("timeline-*.json"))
    if not files:
        return None
    try:
        found = json.loads(read_text(files[-1]))
        ranks = [_rank(upgrade(row) if is_version_1(row) else row) for row in found["ranks"]]
        if not ranks or any(rank.duration <= 0 for rank in ranks):
            raise ValueError("no rank")
        return StepTimeline(int(found["step"]), int(found["world_size"]), ranks)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        notes.append(f"{files[-1].name} is left out: it is no timeline of a step.")
        return None


def _rank(row: dict[str, Any]) -> RankTimeline:
    tracks: dict[Track, list[TrackSlice]] = {track: [] for track in Track}
    waits: dict[Track, float] = defaultdict(float)
    for one in row["compute"]:
        event = Event.parse(one)
        colour = COLOUR_GROUPS.get(event.kind, REST)
        tracks[Track.COMPUTE].append(TrackSlice(colour, event, event.text, float(one["start"]), float(one["end"])))
    for one in row["actions"]:
        event = Event.parse(one)
        action = TrackSlice(ACTIONS[event.kind], event, str(event.action), float(one["start"]), float(one["end"]))
        tracks[Track.PIPELINE].append(action)
    blocked: dict[Track, list[TrackSlice]] = defaultdict(list)
    for one in row["communication"]:
        event, track, phase = Event.parse(one), Track(one["track"]), one["phase"]
        text = one.get("text", event.text)
        if track != Track.PIPELINE:  # a transfer between stages is complete when its wait ends
            tracks[track].append(_communication(one, event, text, None if phase is None else Event.parse(phase)))
        if one["blocked"] is not None:
            start, end = map(float, one["blocked"])
            waits[track] += end - start
            wait = TrackSlice(BLOCKED, event, f"blocked: {text}", start, end)
            blocked[track].append(wait)
            blocked[Track.COMPUTE].append(wait)
    for track, found in blocked.items():
        tracks[track] += found
    share = float(row["exposed_share"])
    return RankTimeline(int(row["rank"]), float(row["start"]), float(row["end"]), share, tracks, dict(waits))


def _communication(row: dict[str, Any], event: Event, text: str, phase: Event | None) -> TrackSlice:
    text += f": {size(row['bytes'])} sent" if row["bytes"] else ""
    text += "" if phase is None else f", in {phase.text}"
    return TrackSlice(row["track"], event, text, float(row["start"]), float(row["end"]), phase)


def size(num_bytes: float) -> str:
    """`141 kB`."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def close_ups(found: StepTimeline) -> list[Window]:
    """A layer's forward and backward on the first rank: from its first attention to its last dense FFN.

    Of all micro-batches and layers it is the one whose experts' communication is blocked for the median time.
    """
    rank = found.ranks[0]
    windows = []
    for kinds in DIRECTIONS:
        layers = sorted(_expert_layers(rank, kinds), key=lambda one: one[:1] + one[3:])
        if not layers:
            continue
        _, layer, phase, start, end = layers[len(layers) // 2]
        length, is_forward = end - start, SpanKind.FORWARD in kinds
        # A backward begins with communication, a forward with its first attention
        first = Event(SpanKind.ATTENTION, layer, 0) if is_forward else None
        last = Event(SpanKind.DENSE_FFN, layer, 1) if is_forward else Event(SpanKind.ATTENTION, layer, 0)
        before = [one.start for one in _computed(rank, first) if start - length <= one.start < start]
        after = [one.end for one in _computed(rank, last) if end <= one.end <= end + length]
        start = min([start, *before])
        if after:  # the forward's last FFN follows directly; a later one may be of its backward
            end = min(after) if is_forward else max(after)
        margin = 0.02 * (end - start)
        title = f"{layer_text(layer).capitalize()}, {phase.text}"
        windows.append(Window(title, rank.rank, start - margin, end + margin))
    return windows


def _computed(rank: RankTimeline, event: Event | None) -> list[TrackSlice]:
    return [one for one in rank.tracks[Track.COMPUTE] if one.event == event]


def _expert_layers(rank: RankTimeline, phases: Iterable[SpanKind]) -> list[tuple[float, int, Event, float, float]]:
    """(blocked µs, layer, phase, first start, last end) of each layer's dispatch and combine in these phases."""
    slices = rank.tracks[Track.DISPATCH] + rank.tracks[Track.COMBINE]
    groups: dict[tuple[int, Event], list[TrackSlice]] = defaultdict(list)
    for one in slices:
        if one.colour != BLOCKED and one.phase is not None and one.phase.kind in phases and one.event.layer is not None:
            groups[one.event.layer, one.phase].append(one)
    found = []
    for (layer, phase), members in groups.items():
        if {SpanKind.EXPERT_DISPATCH, SpanKind.EXPERT_COMBINE} <= {one.event.kind for one in members}:
            start, end = min(one.start for one in members), max(one.end for one in members)
            waits = [one for one in slices if one.colour == BLOCKED and one.start >= start and one.end <= end + 1]
            found.append((sum(one.end - one.start for one in waits), layer, phase, start, end))
    return found
