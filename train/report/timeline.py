"""The timeline of a profiled step as a picture: lanes as rows, and in a warning colour where a rank stood still.

Rows are pictures that stretch, names and times are text beside them, as in the line charts.
"""

from __future__ import annotations

from html import escape

from train.report.numbers import linear_ticks, tick_formatter
from train.report.reading import RunData
from train.report.timeline_data import (
    BLOCKED,
    LANES,
    REST,
    Piece,
    RankTimeline,
    StepTimeline,
    Window,
    close_ups,
    read_timeline,
)

WIDTH = 4000  # units of a stretched row
SHOWN_RANKS = 4
LABELLED = 0.055  # share of the width from which a piece has room for its name
LABELLED_ACTION = 0.022  # for `F1`
ACTIONS = {"F": "forward", "B": "backward", "W": "weight gradients"}
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
    """Return the colours of what occurs."""
    seen = {piece.kind for rank in found.ranks for piece in rank.lanes["compute"]}
    kinds = [kind for kind in COLOURS if kind in seen and kind != BLOCKED]
    keys = "".join(f"<span><i class={COLOURS[kind]}></i>{escape(kind)}</span>" for kind in kinds)
    done = {piece.kind for rank in found.ranks for piece in rank.lanes["pipeline"]}
    actions = [f"<span><i class={COLOURS[one]}></i>{one}: {ACTIONS[one]}</span>" for one in ACTIONS if one in done]
    if actions:
        keys += f"<span>in the pipeline</span>{''.join(actions)}"
    return f'<p class="keys">{keys}<span><i class=blocked></i>stands still, waiting for other ranks</span></p>'


def whole_step(found: StepTimeline) -> str:
    """Return the picture of all lanes of the first ranks."""
    ranks = found.ranks[:SHOWN_RANKS]
    share = sum(rank.exposed_share for rank in found.ranks) / len(found.ranks)
    start, end = min(rank.start for rank in ranks), max(rank.end for rank in ranks)
    blocks = "".join(
        f"<h4>Rank {rank.rank}<small>{share_of(rank.exposed_share)} uncovered</small></h4>{rows(rank, start, end)}"
        for rank in ranks
    )
    sentence = (
        f"{share_of(share)} of step {found.step} is communication that nothing covers, mean over {ranks_of(found)}. "
        f"{costliest(found)} A step is slower while it is profiled."
    )
    return figure(f"Step {found.step}", share_of(share), sentence, blocks + axis(start, end))


def close_up(found: StepTimeline, window: Window) -> str:
    """Return a part of the step, with names inside the pieces."""
    rank = next(rank for rank in found.ranks if rank.rank == window.rank)
    stretches = [piece for piece in rank.lanes["compute"] if piece.kind == BLOCKED]
    blocked = sum(max(0.0, min(p.end, window.end) - max(p.start, window.start)) for p in stretches)
    share = blocked / (window.end - window.start)
    exchanges = [p for lane in ("dispatch", "combine") for p in rank.lanes[lane] if inside(p, window)]
    under_way = covered_length([p for p in exchanges if p.kind != BLOCKED])
    stood = covered_length([p for p in exchanges if p.kind == BLOCKED])
    sentence = (
        f"Experts' exchanges of rank {rank.rank} are under way for {milliseconds(under_way)}, and it stands still for "
        f"{milliseconds(stood)} of them; the rest is covered by what stands above them."
    )
    body = rows(rank, window.start, window.end, names=True) + axis(window.start, window.end, from_zero=True)
    return figure(window.title, f"{share_of(share)} uncovered", sentence, body)


def inside(piece: Piece, window: Window) -> bool:
    return piece.end > window.start and piece.start < window.end


def covered_length(pieces: list[Piece]) -> float:
    """Return the length of the union of pieces, microseconds."""
    length, reached = 0.0, float("-inf")
    for piece in sorted(pieces, key=lambda piece: piece.start):
        length += max(0.0, piece.end - max(piece.start, reached))
        reached = max(reached, piece.end)
    return length


def rows(rank: RankTimeline, start: float, end: float, names: bool = False) -> str:
    """Return a row for each lane that has something between start and end."""
    text = ""
    for lane in LANES:
        pieces = [piece for piece in rank.lanes[lane] if piece.end > start and piece.start < end]
        if pieces:
            labels = "".join(label(piece, start, end) for piece in pieces) if names or lane == "pipeline" else ""
            picture = drawing(lane, pieces, start, end, names)
            text += f"<span class=name>{lane}</span><div class=lane>{picture}{labels}</div>"
    return f"<div class=lanes>{text}</div>"


def drawing(lane: str, pieces: list[Piece], start: float, end: float, names: bool) -> str:
    """Return one row as a stretched picture; with ``names`` each piece tells its own when pointed at."""
    shapes = ""
    for kind, colour in COLOURS.items():
        spans = [(units(p.start, start, end), units(p.end, start, end), p) for p in pieces if p.kind == kind]
        if names:
            for left, right, piece in spans:
                told = f"{piece.name}: {milliseconds(piece.end - piece.start)}"
                shapes += f'<g><title>{escape(told)}</title><path class="{colour}" d="{bar(left, right)}"/></g>'
        elif spans:
            bars = "".join(bar(left, right) for left, right in merged([(left, right) for left, right, _ in spans]))
            shapes += f'<path class="{colour}" d="{bars}"/>'
    return f'<svg viewBox="0 0 {WIDTH} 10" preserveAspectRatio="none" role="img" aria-label="{lane}">{shapes}</svg>'


def units(time: float, start: float, end: float) -> int:
    return round(WIDTH * min(1.0, max(0.0, (time - start) / (end - start))))


def bar(left: int, right: int) -> str:
    return f"M{left} 0H{max(right, left + 1)}V10H{left}Z"


def merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the spans in order, those together that touch: what no eye can tell apart."""
    out: list[tuple[int, int]] = []
    for left, right in sorted(spans):
        if out and left <= out[-1][1] + 1:
            out[-1] = out[-1][0], max(out[-1][1], right)
        else:
            out.append((left, right))
    return out


def label(piece: Piece, start: float, end: float) -> str:
    """Return the name of a wide piece, to lie upon it."""
    left, right = (units(time, start, end) / WIDTH for time in (piece.start, piece.end))
    least = LABELLED_ACTION if piece.kind in ACTIONS else LABELLED
    if piece.kind in (BLOCKED, REST) or right - left < least:
        return ""
    text = piece.name.partition(", in ")[0].partition(", layer")[0].removeprefix("expert ")
    short = " class=short" if piece.kind in ACTIONS else ""
    return f'<b{short} style="left:{100 * left:.2f}%;width:{100 * (right - left):.2f}%">{escape(text)}</b>'


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
    """Say which lanes were waited for longest."""
    length = sum(rank.duration for rank in found.ranks)
    waits = {lane: sum(rank.waits.get(lane, 0.0) for rank in found.ranks) / length for lane in LANES}
    most = sorted((lane for lane in waits if waits[lane] > 0), key=lambda lane: -waits[lane])
    return f"By lane: {', '.join(f'{lane} {share_of(waits[lane])}' for lane in most)}." if most else ""


def share_of(share: float) -> str:
    """Return a share as text, to a tenth of a percent."""
    return f"{100 * share:.1f}\u202f%"


def milliseconds(duration: float) -> str:
    """Return microseconds as text."""
    return f"{duration / 1e3:.2f}\u202fms"
