"""A line chart as HTML: curves in an SVG that scales, text around it that does not.

The picture is drawn without matplotlib: strokes keep their width and letters their size at every width of the
page, colours follow the reader's scheme, and labels can be selected and read aloud.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from html import escape

import numpy as np

from train.report.curves import Curve, downsample
from train.report.numbers import compact, linear_ticks, log_ticks, tick_formatter
from train.report.reading import Array

WIDTH, HEIGHT = 2000, 1000  # units of the scaled picture, fine enough for integers
LABEL_PIXELS = 15


@dataclass(frozen=True)
class Series:
    """One named curve.

    `colour` is a number of the palette; `points` draws dots, `exact` forbids smoothing, `end` is the text at
    the curve's right end (its label without).
    """

    label: str
    x: Array
    y: Array
    colour: int = 0
    points: bool = False
    exact: bool = False
    dashed: bool = False
    end: str = ""


@dataclass(frozen=True)
class Guide:
    """A horizontal dashed line and the text that names it."""

    value: float
    label: str


@dataclass(frozen=True)
class Chart:
    """What a picture shows. `sentence` says what to look for, `value` is to the right of the title."""

    title: str
    sentence: str
    series: list[Series]
    value: str = ""
    guides: list[Guide] = field(default_factory=list)
    band: tuple[float, float] | None = None
    log: bool = False
    from_zero: bool = False
    wide: bool = False
    axis_name: str = "tokens"
    unit: str = ""


@dataclass(frozen=True)
class Scale:
    """Maps values to units of the picture, from `low` to `high`, logarithmic or not."""

    low: float
    high: float
    log: bool = False

    def share(self, values: Array | float) -> Array:
        """Return positions from 0 (low) to 1 (high), cut a little outside the frame."""
        ends = np.array([self.low, self.high])
        values = np.asarray(values, dtype=np.float64)
        if self.log:
            ends, values = np.log10(ends), np.log10(np.maximum(values, self.low * 1e-3))
        share: Array = np.clip((values - ends[0]) / (ends[1] - ends[0]), -0.05, 1.05)
        return share

    def ticks(self, target: int = 5) -> list[float]:
        """Return the round numbers to mark, about `target` of them where the axis is linear."""
        return log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high, target)


def render(chart: Chart) -> str:
    """Return the chart as an HTML figure, empty where no curve has two finite points."""
    series = [s for s in chart.series if len(s.x) > (0 if s.points else 1)]
    if not any(len(s.x) > 1 for s in series):
        return ""
    curves = [downsample(s.x, s.y, exact=s.exact or s.points) for s in series]
    across = horizontal_scale(np.concatenate([s.x for s in series]))
    up = vertical_scale(chart, curves, series)
    drawing = _band(chart, up) + _grid(up) + _guides(chart, up)
    drawing += "".join(_envelope(c, across, up, s) for s, c in zip(series, curves, strict=True))
    drawing += "".join(_stroke(c, across, up, s) for s, c in zip(series, curves, strict=True))
    labelled = len(series) > 1 or (chart.wide and bool(chart.guides))
    inner = "" if labelled else _inner_labels(chart, up)
    names = _end_labels(series, curves, up, chart) if labelled else ""
    frame = (
        f'<div class="frame{" labelled" if labelled else ""}{" tall" if chart.wide else ""}">'
        f"{axis_up(up, unit=chart.unit)}"
        f"<div class=plot>{svg(drawing, chart.sentence)}{inner}<i class=cursor></i></div>"
        f"{axis_across(across, chart.axis_name)}{names}</div>"
    )
    return (
        f'<figure class="chart{" wide" if chart.wide else ""}" '
        f'data-curves="{_hover(series, curves, across)}" data-axis="{escape(chart.axis_name)}">'
        f"<figcaption><h3>{escape(chart.title)}</h3>"
        f"<b class=value>{escape(chart.value)}</b><p>{escape(chart.sentence)}</p></figcaption>"
        f"{frame}</figure>"
    )


def svg(drawing: str, label: str) -> str:
    """Wrap paths into the scaled picture; `label` is for screen readers."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}">{drawing}</svg>'
    )


def path(x: Array, y: Array) -> str:
    """Return path data through positions given as shares of the frame (y upwards)."""
    across, down = np.rint(x * WIDTH).astype(int), np.rint((1 - y) * HEIGHT).astype(int)
    return "M" + "L".join(f"{a} {d}" for a, d in zip(across, down, strict=True))


def horizontal_scale(x: Array) -> Scale:
    """Choose the range along tokens or steps: from 0 unless the curve starts far to the right."""
    low, high = _extent(x)
    return Scale(0.0 if 0 < low < 0.25 * high else low, high)


def vertical_scale(chart: Chart, curves: list[Curve], series: list[Series]) -> Scale:
    """Choose the range: all means, guides and the band, nearly all extremes; spikes may leave the frame."""
    values = np.concatenate([np.quantile(s.y, [0.005, 0.995]) for s in series] + [c.mean for c in curves])
    extra = [g.value for g in chart.guides] + list(chart.band or ())
    values = np.concatenate([values, extra])
    log = chart.log and bool((values > 0).any())
    if log:
        values = values[values > 0]
        low, high = float(values.min()), float(values.max())
        margin = max(1.02, (high / low) ** 0.05)
        return Scale(low / margin, high * margin, True)
    low, high = _extent(values, relative=0.05)
    margin = 0.05 * (high - low)
    return Scale(0.0 if chart.from_zero and low >= 0 else low - margin, high + margin)


def _extent(values: Array, relative: float = 1e-9) -> tuple[float, float]:
    """Return smallest and largest value, separated where they are (nearly) equal."""
    low, high = float(values.min()), float(values.max())
    least = max(abs(low), abs(high), 1e-12) * relative
    if high - low < least:
        middle = (low + high) / 2
        low, high = middle - least / 2, middle + least / 2
    return low, high


def axis_up(scale: Scale, target: int = 5, unit: str = "") -> str:
    """Return the numbers left of the frame."""
    ticks = scale.ticks(target)
    write = tick_formatter(ticks)
    spans = [f"<span style=bottom:{100 * float(scale.share(t)):.2f}%>{write(t)}{unit}</span>" for t in ticks]
    return f"<div class=up>{''.join(spans)}</div>"


def axis_across(scale: Scale, name: str, target: int = 4) -> str:
    """Return the numbers under the frame; the axis names itself at its last number."""
    ticks = linear_ticks(scale.low, scale.high, target)
    spans = []
    for tick in ticks:
        share = float(scale.share(tick))
        side = " class=last" if share > 0.94 else (" class=first" if share < 0.04 else "")
        spans.append(f"<span{side} style=left:{100 * share:.2f}%>{compact(tick, 4)}</span>")
    return f"<div class=across>{''.join(spans)}<em>{escape(name)}</em></div>"


def _grid(up: Scale) -> str:
    rows = "".join(f"M0 {round((1 - float(up.share(t))) * HEIGHT)}H{WIDTH}" for t in up.ticks())
    return f'<path class="grid" d="{rows}"/>'


def _guides(chart: Chart, up: Scale) -> str:
    return "".join(
        f'<path class="guide" d="M0 {round((1 - float(up.share(g.value))) * HEIGHT)}H{WIDTH}"/>' for g in chart.guides
    )


def _band(chart: Chart, up: Scale) -> str:
    if chart.band is None:
        return ""
    top, bottom = (round((1 - float(up.share(v))) * HEIGHT) for v in (chart.band[1], chart.band[0]))
    return f'<rect class="target" x="0" y="{top}" width="{WIDTH}" height="{bottom - top}"/>'


def _envelope(curve: Curve, across: Scale, up: Scale, series: Series) -> str:
    if not curve.has_envelope:
        return ""
    x = across.share(curve.x)
    outline = path(np.concatenate([x, x[::-1]]), np.concatenate([up.share(curve.high), up.share(curve.low)[::-1]]))
    return f'<path class="envelope c{series.colour}" d="{outline}Z"/>'


def _stroke(curve: Curve, across: Scale, up: Scale, series: Series) -> str:
    x, y = across.share(curve.x), up.share(curve.mean)
    line = f'<path class="curve c{series.colour}{" dashed" if series.dashed else ""}" d="{path(x, y)}"/>'
    if not series.points:
        return line
    dots = "".join(f"M{round(a * WIDTH)} {round((1 - b) * HEIGHT)}h0" for a, b in zip(x, y, strict=True))
    return line + f'<path class="dots c{series.colour}" d="{dots}"/>'


def _inner_labels(chart: Chart, up: Scale) -> str:
    spans = (
        f"<span class=inner style=bottom:{100 * float(up.share(g.value)):.2f}%>{escape(g.label)}</span>"
        for g in chart.guides
    )
    return "".join(spans)


def _end_labels(series: list[Series], curves: list[Curve], up: Scale, chart: Chart) -> str:
    """Name each curve and guide at the right edge, moved apart so that no two names touch."""
    pixels = 300 if chart.wide else 220
    ends = [(g.value, g.label, "guide") for g in chart.guides]
    if len(series) > 1:
        for one, curve in zip(series, curves, strict=True):
            ends.append((float(curve.mean[-1]), one.end or one.label, f"c{one.colour}"))
    ends = sorted(ends, key=lambda end: -float(up.share(end[0])))
    tops = [(1 - min(1.0, max(0.0, float(up.share(value))))) * pixels for value, _, _ in ends]
    gap = min(LABEL_PIXELS, pixels / max(1, len(tops)))
    for index in range(1, len(tops)):
        tops[index] = max(tops[index], tops[index - 1] + gap)
    limit = float(pixels)
    for index in reversed(range(len(tops))):
        tops[index] = min(tops[index], limit)
        limit = tops[index] - gap
    spans = (
        f'<span class="{colour}" style=top:{top:.0f}px>{escape(label)}</span>'
        for top, (_, label, colour) in zip(tops, ends, strict=True)
    )
    return f"<div class=ends>{''.join(spans)}</div>"


def _hover(series: list[Series], curves: list[Curve], across: Scale) -> str:
    """Return the reading line's data: for each curve its name, colour, x as shares, x and y as text."""
    data = []
    for one, curve in zip(series, curves, strict=True):
        shares = [round(float(s), 4) for s in across.share(curve.x)]
        values = [float(f"{v:.4g}") if math.isfinite(v) else None for v in curve.mean]
        data.append([one.label, one.colour, shares, values])
    text = json.dumps({"low": across.low, "high": across.high, "curves": data}, separators=(",", ":"))
    return escape(text)
