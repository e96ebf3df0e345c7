"""The timeline of a profiled step as the report reads it: lanes of pieces, and which layer to look at closely."""

# Times are in microseconds after the first rank's start of the step

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LANES = ("compute", "dispatch", "combine", "gradients", "pipeline", "sequence")
# The first word of a piece of computing → its kind, which has a colour
KINDS = {
    "attention": "attention",
    "dense": "dense FFN",
    "experts": "experts",
    "head": "head, embedding, MTP",
    "embedding": "head, embedding, MTP",
    "MTP": "head, embedding, MTP",
    "weight": "weight gradients",
}
REST = "other"
BLOCKED = "blocked"


@dataclass(frozen=True)
class Piece:
    """A stretch of a lane. ``kind`` chooses the colour."""

    kind: str
    name: str
    start: float
    end: float


@dataclass(frozen=True)
class RankTimeline:
    """One rank's step."""

    rank: int
    start: float
    end: float
    exposed_share: float
    lanes: dict[str, list[Piece]]  # a lane's blocked stretches come after what they lie on
    waits: dict[str, float]  # lane → blocked microseconds

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
    """A part of a step to look at closely."""

    title: str
    rank: int
    start: float
    end: float


def read_timeline(folder: Path, notes: list[str]) -> StepTimeline | None:
    """The last profiled step of a run folder; None without one. What cannot be read is told in ``notes``."""
    files = sorted((folder / "traces").glob("timeline-*.json"))
    if not files:
        return None
    try:
        found = json.loads(files[-1].read_text())
        ranks = [_rank(row) for row in found["ranks"]]
        if not ranks or any(rank.duration <= 0 for rank in ranks):
            raise ValueError("no rank")
        return StepTimeline(int(found["step"]), int(found["world_size"]), ranks)
    except (OSError, ValueError, KeyError, TypeError):
        notes.append(f"{files[-1].name} is left out: it is no timeline of a step.")
        return None


def kind_of(name: str) -> str:
    return KINDS.get(name.split()[0].rstrip(","), REST) if name else REST


def _rank(row: dict[str, Any]) -> RankTimeline:
    lanes: dict[str, list[Piece]] = {lane: [] for lane in LANES}
    waits: dict[str, float] = defaultdict(float)
    lanes["compute"] = [Piece(kind_of(name), str(name), float(s), float(e)) for name, s, e in row["compute"]]
    lanes["pipeline"] = [Piece(str(name)[0], str(name), float(s), float(e)) for name, s, e in row["actions"]]
    blocked: dict[str, list[Piece]] = defaultdict(list)
    for one in row["exchanges"]:
        lane, name = one["lane"], str(one["name"])
        label = name if not one["bytes"] else f"{name}: {size(one['bytes'])} sent"
        if lane != "pipeline":  # an arrival there is no more than the wait for it
            lanes[lane].append(Piece(lane, f"{label}, in {one['around']}", float(one["start"]), float(one["end"])))
        if one["blocked"] is not None:
            start, end = map(float, one["blocked"])
            waits[lane] += end - start
            stretch = Piece(BLOCKED, f"blocked: {name}", start, end)
            blocked[lane].append(stretch)
            blocked["compute"].append(stretch)
    for lane, stretches in blocked.items():
        lanes[lane] += stretches
    share = float(row["exposed_share"])
    return RankTimeline(int(row["rank"]), float(row["start"]), float(row["end"]), share, lanes, dict(waits))


def size(num_bytes: float) -> str:
    """`141 kB`."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def close_ups(found: StepTimeline) -> list[Window]:
    """A layer's forward and backward from the first rank's step: from its first attention to its last dense FFN.

    Of all micro-batches and layers it is the one whose experts' exchanges are blocked for the middle length of time.
    """
    rank = found.ranks[0]
    windows = []
    for direction in ("forward", "backward"):
        layers = sorted(_expert_layers(rank, direction))
        if not layers:
            continue
        _, name, around, start, end = layers[len(layers) // 2]
        length = end - start
        first, last = ("attention 0", "dense FFN 1") if direction == "forward" else ("", "attention 0")
        # The exchange of a backward starts before all else of its layer, that of a forward after the first attention
        before = [p.start for p in _parts(rank, f"{first}, {name}") if start - length <= p.start < start]
        after = [p.end for p in _parts(rank, f"{last}, {name}") if end <= p.end <= end + length]
        start = min([start, *before])
        if after:  # the forward's last FFN comes at once; a backward follows it
            end = min(after) if direction == "forward" else max(after)
        margin = 0.02 * (end - start)
        windows.append(Window(f"{name.capitalize()}, {around}", rank.rank, start - margin, end + margin))
    return windows


def _parts(rank: RankTimeline, name: str) -> list[Piece]:
    return [piece for piece in rank.lanes["compute"] if piece.name == name]


def _expert_layers(rank: RankTimeline, direction: str) -> list[tuple[float, str, str, float, float]]:
    """(blocked µs, layer, phase, first start, last end) of each layer's dispatch and combine in a direction."""
    groups: dict[tuple[str, str], list[Piece]] = defaultdict(list)
    for lane in ("dispatch", "combine"):
        for piece in rank.lanes[lane]:
            if piece.kind != BLOCKED and (
                f", in {direction} " in piece.name or f", in input {direction} " in piece.name
            ):
                words, _, around = piece.name.partition(", in ")
                layer = words.partition(", ")[2].partition(":")[0]
                groups[layer, around].append(piece)
    found = []
    for (layer, around), pieces in groups.items():
        if any("combine" in p.name for p in pieces) and any("expert dispatch" in p.name for p in pieces):
            start, end = min(p.start for p in pieces), max(p.end for p in pieces)
            stretches = [p for p in rank.lanes["dispatch"] + rank.lanes["combine"] if p.kind == BLOCKED]
            blocked = sum(p.end - p.start for p in stretches if p.start >= start and p.end <= end + 1)
            found.append((blocked, layer, around, start, end))
    return found
