"""The timeline of a profiled step as a picture: tracks as rows, with waits for other ranks in a warning colour.

Rows are stretched pictures; names and times are text beside them, as in the line charts.
"""

from __future__ import annotations

from html import escape

from parallel.watchdog.events import Track
from train.report.numbers import linear_ticks, tick_formatter
from train.report.reading import RunData
from train.report.timeline_data import (
    BLOCKED,
    REST,
    RankTimeline,
    StepTimeline,
    TrackSlice,
    Window,
    close_ups,
    read_timeline,
)

WIDTH = 4000  # units of a stretched row
SHOWN_RANKS = 4
LABELLED = 0.055  # share of the width from which a slice has space for its label
LABELLED_ACTION = 0.022  # for `F1`
ACTION_NAMES = {"F": "forward", "B": "backward", "W": "weight gradients"}
COMMUNICATION = {
    Track.DISPATCH: "dispatch: tokens to their experts",
    Track.COMBINE: "combine: results back",
    Track.GRADIENTS: "gradients and weights",
    Track.SEQUENCE: "context, sequence and tensor parallelism",
}
COLOURS = {
    "attention": "c0",
    "dense FFN": "c2",
    "experts": "c3",
    "head, embedding, MTP": "c4",
    "weight gradients": "c7",
    REST: "rest",
    "dispatch": "c1",
    "combine": "c1",
    "gradients": "c6",
    "sequence": "c5",
    "F": "c0",
    "B": "c2",
    "W": "c7",
    BLOCKED: "blocked",
}


def timeline_section(run: RunData) -> str:
    """Return the pictures of the last profiled step, empty where none was profiled."""
    found = read_timeline(run.path, run.notes)
    if found is None:
        return ""
    return legend(found) + whole_step(found) + "".join(close_up(found, window) for window in close_ups(found))


def legend(found: StepTimeline) -> str:
    """Return every colour that occurs, with its name: of compute, of communication, of a pipeline's actions."""
    seen = {track: {one.colour for rank in found.ranks for one in rank.tracks[track]} for track in Track}
    compute = [name for name in COLOURS if name in seen[Track.COMPUTE] and name not in (BLOCKED, *ACTION_NAMES)]
    communication = [(COLOURS[track], text) for track, text in COMMUNICATION.items() if track in seen[track]]
    actions = [(COLOURS[one], f"{one}: {ACTION_NAMES[one]}") for one in ACTION_NAMES if one in seen[Track.PIPELINE]]
    lines = {
        "compute": [(COLOURS[name], name) for name in compute],
        "communication": communication,
        "pipeline": actions,
        "any track": [("blocked", "blocked: waits for other ranks")],
    }
    return "".join(_legend_line(name, keys) for name, keys in lines.items() if keys)


def _legend_line(name: str, keys: list[tuple[str, str]]) -> str:
    spans = "".join(f"<span><i class={colour}></i>{escape(text)}</span>" for colour, text in keys)
    return f'<p class="keys"><b>{name}</b>{spans}</p>'


def whole_step(found: StepTimeline) -> str:
    """Return the picture of all tracks of the first ranks."""
    ranks = found.ranks[:SHOWN_RANKS]
    share = sum(rank.exposed_share for rank in found.ranks) / len(found.ranks)
    start, end = min(rank.start for rank in ranks), max(rank.end for rank in ranks)
    blocks = "".join(
        f"<h4>Rank {rank.rank}<small>{share_of(rank.exposed_share)} exposed</small></h4>{rows(rank, start, end)}"
        for rank in ranks
    )
    sentence = (
        f"{share_of(share)} of step {found.step} is exposed communication, the mean over {ranks_of(found)}. "
        f"{costliest(found)} A step is slower while it is profiled."
    )
    return figure(f"Step {found.step}", share_of(share), sentence, blocks + axis(start, end))


def close_up(found: StepTimeline, window: Window) -> str:
    """Return a part of the step, with labels on the slices."""
    rank = next(rank for rank in found.ranks if rank.rank == window.rank)
    waits = [one for one in rank.tracks[Track.COMPUTE] if one.colour == BLOCKED]
    blocked = sum(max(0.0, min(one.end, window.end) - max(one.start, window.start)) for one in waits)
    share = blocked / (window.end - window.start)
    experts = [one for one in rank.tracks[Track.DISPATCH] + rank.tracks[Track.COMBINE] if inside(one, window)]
    in_flight = union_length([one for one in experts if one.colour != BLOCKED])
    exposed = union_length([one for one in experts if one.colour == BLOCKED])
    sentence = (
        f"The experts' communication of rank {rank.rank} is in flight for {milliseconds(in_flight)}, and exposed for "
        f"{milliseconds(exposed)}; compute overlaps the rest."
    )
    body = rows(rank, window.start, window.end, names=True) + axis(window.start, window.end, from_zero=True)
    return figure(window.title, f"{share_of(share)} exposed", sentence, body)


def inside(one: TrackSlice, window: Window) -> bool:
    return one.end > window.start and one.start < window.end


def union_length(slices: list[TrackSlice]) -> float:
    """Return the length of the union of slices, microseconds."""
    length, reached = 0.0, float("-inf")
    for one in sorted(slices, key=lambda one: one.start):
        length += max(0.0, one.end - max(one.start, reached))
        reached = max(reached, one.end)
    return length


def rows(rank: RankTimeline, start: float, end: float, names: bool = False) -> str:
    """Return a row for each track that has a slice between start and end."""
    text = ""
    for track in Track:
        slices = [one for one in rank.tracks[track] if one.end > start and one.start < end]
        if slices:
            has_labels = names or track == Track.PIPELINE
            labels = "".join(label(one, start, end) for one in slices) if has_labels else ""
            picture = drawing(track, slices, start, end, names)
            text += f"<span class=name>{track}</span><div class=track>{picture}{labels}</div>"
    return f"<div class=tracks>{text}</div>"


def drawing(track: Track, slices: list[TrackSlice], start: float, end: float, names: bool) -> str:
    """Return one row as a stretched picture; with ``names`` each slice has a tool tip."""
    shapes = ""
    for key, colour in COLOURS.items():
        placed = [
            (units(one.start, start, end), units(one.end, start, end), one) for one in slices if one.colour == key
        ]
        if names:
            for left, right, one in placed:
                tip = f"{one.text}: {milliseconds(one.end - one.start)}"
                shapes += f'<g><title>{escape(tip)}</title><path class="{colour}" d="{bar(left, right)}"/></g>'
        elif placed:
            bars = "".join(bar(left, right) for left, right in merged([(left, right) for left, right, _ in placed]))
            shapes += f'<path class="{colour}" d="{bars}"/>'
    return f'<svg viewBox="0 0 {WIDTH} 10" preserveAspectRatio="none" role="img" aria-label="{track}">{shapes}</svg>'


def units(time: float, start: float, end: float) -> int:
    return round(WIDTH * min(1.0, max(0.0, (time - start) / (end - start))))


def bar(left: int, right: int) -> str:
    return f"M{left} 0H{max(right, left + 1)}V10H{left}Z"


def merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the spans in order, with those that touch merged: they cannot be told apart."""
    out: list[tuple[int, int]] = []
    for left, right in sorted(spans):
        if out and left <= out[-1][1] + 1:
            out[-1] = out[-1][0], max(out[-1][1], right)
        else:
            out.append((left, right))
    return out


def label(one: TrackSlice, start: float, end: float) -> str:
    """Return the label of a slice that is wide enough for one."""
    left, right = (units(time, start, end) / WIDTH for time in (one.start, one.end))
    is_action = one.colour in ACTION_NAMES
    if one.colour in (BLOCKED, REST) or right - left < (LABELLED_ACTION if is_action else LABELLED):
        return ""
    short = " class=short" if is_action else ""
    return f'<b{short} style="left:{100 * left:.2f}%;width:{100 * (right - left):.2f}%">{escape(one.label)}</b>'


def axis(start: float, end: float, from_zero: bool = False) -> str:
    """Return the times under the rows, in milliseconds."""
    offset = start if from_zero else 0.0
    ticks = linear_ticks((start - offset) / 1e3, (end - offset) / 1e3, 5)
    write = tick_formatter(ticks)
    spans = ""
    for tick in ticks:
        share = (1e3 * tick + offset - start) / (end - start)
        side = " class=last" if share > 0.94 else (" class=first" if share < 0.04 else "")
        spans += f"<span{side} style=left:{100 * share:.2f}%>{write(tick)}</span>"
    return f"<div class=times><em>ms</em><div class=across>{spans}</div></div>"


def figure(title: str, value: str, sentence: str, body: str) -> str:
    return (
        f'<figure class="chart wide timeline"><figcaption><h3>{escape(title)}</h3><b class=value>{escape(value)}</b>'
        f"<p>{escape(sentence)}</p></figcaption>{body}</figure>"
    )


def ranks_of(found: StepTimeline) -> str:
    """Return which ranks the mean is over."""
    if len(found.ranks) == found.world_size:
        return "all ranks" if found.world_size > 1 else "the one rank"
    return f"the first {len(found.ranks)} of {found.world_size:,} ranks"


def costliest(found: StepTimeline) -> str:
    """Return a sentence with the exposed share of each track, the largest first."""
    length = sum(rank.duration for rank in found.ranks)
    waits = {track: sum(rank.waits.get(track, 0.0) for rank in found.ranks) / length for track in Track}
    most = sorted((track for track in waits if waits[track] > 0), key=lambda track: -waits[track])
    return f"By track: {', '.join(f'{track} {share_of(waits[track])}' for track in most)}." if most else ""


def share_of(share: float) -> str:
    """Return a share as text, to a tenth of a percent."""
    return f"{100 * share:.1f}\u202f%"


def milliseconds(duration: float) -> str:
    """Return microseconds as text."""
    return f"{duration / 1e3:.2f}\u202fms"
