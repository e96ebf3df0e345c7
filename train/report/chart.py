"""A line chart as HTML: curves in an SVG that scales, text around it that does not.

The picture is drawn without matplotlib: strokes keep their width and letters their size at every width of the page,
colours follow the reader's scheme, and labels can be selected and read aloud. Where things go is decided here, for a
linear and a logarithmic vertical axis and for every horizontal one; the page's script only moves them there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from html import escape

import numpy as np

from longcat.json_text import dumps
from train.report.axes import Axes
from train.report.curves import BUCKETS, Curve, downsample
from train.report.labels import spread
from train.report.reading import Array
from train.report.scale import HEIGHT, WIDTH, Scale, line_across, linear_scale, log_scale, numbers_up, path

LABEL_PIXELS = 15  # between two labels
DOTS_ALONE = 3  # `Series.dashes` of dots without a line between them
NARROW, WIDE = 220, 300  # least heights of a picture, pixels


@dataclass(frozen=True)
class Series:
    """One named curve over the steps of a run.

    `colour` is a number of the palette; `points` draws dots, `exact` forbids smoothing, `end` is the text at the
    curve's right end (its label without) and `value` the number that the text says, which is where it goes (the
    curve's last without). `mix` from 0 to 1 takes a colour between the palette's first and second instead.
    """

    label: str
    steps: Array
    y: Array
    colour: int = 0
    points: bool = False
    exact: bool = False
    dashes: int = 0
    end: str = ""
    value: float = math.nan
    run: int = 0
    named: bool = True
    mix: float | None = None

    @property
    def style(self) -> str:
        if self.mix is None:
            return ""
        return f' style="--c:color-mix(in oklab,var(--c1) {100 * self.mix:.0f}%,var(--c0))"'


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
    unit: str = ""
    envelopes: bool = True
    range_from: float = 0.0  # share of the horizontal axis from which on the curves set the vertical range
    buckets: int = BUCKETS


@dataclass(frozen=True)
class Label:
    """A name at the right edge."""

    text: str
    value: float
    attributes: str


class Page:
    """Draws charts on the page's axes and collects what its script needs."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.charts: list[dict[str, object]] = []

    def render(self, chart: Chart) -> str:
        """Return the chart as an HTML figure, empty where no curve has two finite points."""
        series = [s for s in chart.series if len(s.steps) > (0 if s.points else 1)]
        if not any(len(s.steps) > 1 for s in series):
            return ""
        curves = [downsample(s.steps, s.y, chart.buckets, exact=s.exact or s.points) for s in series]
        labels = end_labels(chart, series, curves)
        pixels = frame_height(chart, labels)
        linear, log = vertical_scales(chart, curves, series)
        up = log if log and chart.log else linear
        scales = [scale for scale in (linear, log) if scale]
        sides = {"log" if scale.log else "linear": around(chart, scale, labels, pixels) for scale in scales}
        number = len(self.charts)
        self.charts.append({"up": sides, "curves": [_data(*pair) for pair in zip(series, curves, strict=True)]})
        shown = sides["log" if up.log else "linear"]
        lines = "".join(self._lines(chart, *pair, up) for pair in zip(series, curves, strict=True))
        back = f'<g class=back>{shown["back"]}</g><path class="mark" d="{self.axes.mark_lines()}"/>'
        frame = (
            f'<div class="frame{" labelled" if labels else ""}" style=--h:{pixels}px>'
            f"<div class=top>{_scale_button(up, log is not None)}{self.axes.mark_numbers()}</div>"
            f"<div class=up>{shown['numbers']}</div>"
            f"<div class=plot>{svg(back + lines, chart.sentence)}<i class=cursor></i></div>"
            f"<div class=across>{self.axes.across()}</div><div class=ends>{shown['ends']}</div></div>"
        )
        return (
            f'<figure class="chart{" wide" if chart.wide else ""}" data-chart={number}>'
            f"<figcaption><h3>{escape(chart.title)}</h3>"
            f"<b class=value>{escape(chart.value)}</b><p>{escape(chart.sentence)}</p></figcaption>"
            f"{frame}</figure>"
        )

    def _lines(self, chart: Chart, series: Series, curve: Curve, up: Scale) -> str:
        x, y = self.axes.share(curve.x, series.run), up.share(curve.mean)
        out = ""
        if curve.has_envelope and chart.envelopes:
            outline = path(
                np.concatenate([x, x[::-1]]), np.concatenate([up.share(curve.high), up.share(curve.low)[::-1]])
            )
            out += f'<path class="envelope" d="{outline}Z"/>'
        out += f'<path class="curve d{series.dashes}" d="{path(x, y)}"/>'
        if series.points:
            dots = "".join(f"M{round(a * WIDTH)} {round((1 - b) * HEIGHT)}h0" for a, b in zip(x, y, strict=True))
            out += f'<path class="dots" d="{dots}"/>'
        return f'<g class="c{series.colour}" data-run={series.run}{series.style}>{out}</g>'

    def script_data(self) -> str:
        """Return the page's data as the content of a script element."""
        if not self.charts:
            return ""
        data = self.axes.data() | {"charts": self.charts, "width": WIDTH, "height": HEIGHT}
        text = dumps(data, separators=(",", ":")).replace("<", "\\u003c")
        return f'<script type="application/json" id="data">{text}</script>'


def svg(drawing: str, label: str) -> str:
    """Wrap paths into the scaled picture; `label` is for screen readers."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}">{drawing}</svg>'
    )


def vertical_scales(chart: Chart, curves: list[Curve], series: list[Series]) -> tuple[Scale, Scale | None]:
    """Choose the ranges, linear and (where all is positive) logarithmic.

    They hold all means, guides and the band and nearly all extremes from `range_from` on; spikes may leave the frame.
    """
    late = [
        (s.y[len(s.y) - 1 - int((1 - chart.range_from) * (len(s.y) - 1)) :], c)
        for s, c in zip(series, curves, strict=True)
    ]
    values = np.concatenate(
        [np.quantile(y, [0.005, 0.995]) for y, _ in late]
        + [c.mean[int(chart.range_from * len(c.mean)) :] for _, c in late]
    )
    values = np.concatenate([values, [g.value for g in chart.guides] + list(chart.band or ())])
    useful = chart.log or bool((values > 0).all())
    return linear_scale(values, chart.from_zero), log_scale(values) if useful else None


def around(chart: Chart, up: Scale, labels: list[Label], pixels: int) -> dict[str, object]:
    """Return what depends on the vertical scale: its ends, numbers, lines behind the curves, names at the right."""
    back = ""
    if chart.band is not None:
        top, bottom = (round((1 - float(up.share(v))) * HEIGHT) for v in (chart.band[1], chart.band[0]))
        back += f'<rect class="target" x="0" y="{top}" width="{WIDTH}" height="{bottom - top}"/>'
    back += f'<path class="grid" d="{"".join(line_across(up, tick) for tick in up.ticks())}"/>'
    back += "".join(f'<path class="guide" d="{line_across(up, guide.value)}"/>' for guide in chart.guides)
    numbers, ends = numbers_up(up, unit=chart.unit), place_labels(labels, up, pixels)
    return {"low": up.low, "high": up.high, "log": up.log, "numbers": numbers, "back": back, "ends": ends}


def end_labels(chart: Chart, series: list[Series], curves: list[Curve]) -> list[Label]:
    """Names of the guides, and of the curves if there are several."""
    labels = [Label(guide.label, guide.value, "class=guide") for guide in chart.guides]
    if len(series) < 2:
        return labels
    for one, curve in zip(series, curves, strict=True):
        if one.named:
            value = one.value if math.isfinite(one.value) else float(curve.mean[-1])
            labels.append(Label(one.end or one.label, value, f"class=c{one.colour} data-run={one.run}{one.style}"))
    return labels


def frame_height(chart: Chart, labels: list[Label]) -> int:
    """Pixels of the picture's height: as many as its labels need, at least the usual."""
    return max(WIDE if chart.wide else NARROW, LABEL_PIXELS * (len(labels) + 1))


def place_labels(labels: list[Label], up: Scale, pixels: int) -> str:
    """Return names at the right edge, in the order of their values and apart, with lines to where they belong."""
    wanted = [(1 - min(1.0, max(0.0, float(up.share(label.value))))) * pixels for label in labels]
    half = LABEL_PIXELS / 2
    tops = spread(wanted, LABEL_PIXELS, half, pixels - half)
    spans = "".join(
        f"<span {label.attributes} style=top:{top:.0f}px>{escape(label.text)}</span>"
        if 'style="' not in label.attributes
        else f'<span {label.attributes[:-1]};top:{top:.0f}px">{escape(label.text)}</span>'
        for label, top in zip(labels, tops, strict=True)
    )
    leaders = "".join(
        f'<path d="M0 {1000 * at / pixels:.0f}L10 {1000 * top / pixels:.0f}"/>'
        for at, top in zip(wanted, tops, strict=True)
        if abs(at - top) > 2
    )
    lines = (
        f'<svg viewBox="0 0 10 1000" preserveAspectRatio="none" aria-hidden="true">{leaders}</svg>' if leaders else ""
    )
    return lines + spans


def _scale_button(up: Scale, can_switch: bool) -> str:
    title = 'title="scale of the vertical axis: logarithmic or linear"'
    return f"<button class=scale type=button {title}>{'log' if up.log else 'linear'}</button>" if can_switch else ""


def _data(series: Series, curve: Curve) -> dict[str, object]:
    """What the script needs of a curve: positions and values without smoothing."""
    smoothed = not (series.exact or series.points)
    return {
        "name": series.label,
        "colour": series.colour,
        "run": series.run,
        "smooth": smoothed,
        "x": [round(float(x), 1) for x in curve.x],
        "y": _short(curve.raw),
        **({"low": _short(curve.low), "high": _short(curve.high)} if curve.has_envelope else {}),
    }


def _short(values: Array) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
