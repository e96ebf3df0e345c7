"""Routing: FFN experts per token, expert load by layer, and the selection biases that control them."""

from __future__ import annotations

from html import escape

import numpy as np
from numpy.typing import NDArray

from train.report.axes import Axes
from train.report.chart import Chart, Guide, Series, svg
from train.report.curves import settled_from
from train.report.heatmap import GAP, picture, to_levels
from train.report.numbers import compact, exact, percent, plain, signed_percent
from train.report.reading import Array, RoutingHistory, RunData
from train.report.scale import Scale, line_across, numbers_up, path

MAP_COLUMNS, MAP_ROWS = 160, 64
PATH_LINES, PATH_POINTS = 32, 60
OCTAVES = 1.0  # the colours reach from half to twice the mean


def charts(run: RunData) -> list[Chart | None]:
    """Return the charts of this subject; None where there is no data."""
    return [experts_chart(run), balance_chart(run), spread_chart(run)]


def blocks(run: RunData, axes: Axes) -> list[str]:
    """Return one small chart per layer: load maps and bias paths."""
    return [load_maps(run), bias_paths(run, axes)]


def experts_chart(run: RunData) -> Chart | None:
    """Mean FFN experts per token against K_e with the ±1 % band."""
    x, y = run.series("ffn_experts_per_token")
    if not len(y):
        return None
    final, wanted = run.final("ffn_experts_per_token"), run.number("model.expected_ffn_experts")
    guides, band = [], None
    sentence = f"The mean over layers goes from {y[0]:.2f} to {final:.2f} FFN experts per token."
    value = f"{final:.2f}"
    if wanted:
        guides, band = [Guide(wanted, f"Kₑ = {exact(wanted)}")], (0.99 * wanted, 1.01 * wanted)
        target = f"Kₑ\u00a0=\u00a0{exact(wanted)}"
        since = settled_from(x, y, *band)
        where = f"has not settled within ±1 % of {target} (the band)"
        if since is not None:
            where = f"stays within ±1 % of {target} (the band) from {compact(since)} {_unit(run)} on"
        sentence = f"Starting at {y[0]:.2f}, the mean {where} and ends at {final:.2f} "
        sentence += f"({signed_percent(final / wanted - 1)})."
        value = f"{final:.2f} of {exact(wanted)}"
    series = [Series("FFN experts", *run.points("ffn_experts_per_token"), colour=2)]
    title = "FFN experts per token"
    return Chart(title, sentence, series, value, guides, band, wide=True)


def balance_chart(run: RunData) -> Chart | None:
    """Load of the busiest FFN expert over the mean."""
    y = run.series("expert_load_max_over_mean")[1]
    if not len(y):
        return None
    final = run.final("expert_load_max_over_mean")
    sentence = (
        f"The busiest FFN expert of any layer gets {final:.2f}× the mean load at the end, after a peak of "
        f"{plain(float(y.max()))}×; 1.0 is perfect balance."
    )
    series = [Series("max / mean", *run.points("expert_load_max_over_mean"), colour=1)]
    return Chart("Busiest expert", sentence, series, f"{final:.2f}×", log=True)


def spread_chart(run: RunData) -> Chart | None:
    """Largest minus smallest selection bias over all layers."""
    y = run.series("bias_range")[1]
    if not len(y):
        return None
    final = float(y[-1])
    growth = _growth(y)
    sentence = f"Largest minus smallest selection bias over all layers: {plain(final)} at the end, {growth}."
    series = [Series("range", *run.points("bias_range"), colour=3, exact=True)]
    return Chart("Bias range", sentence, series, plain(final), from_zero=True)


def _growth(y: Array) -> str:
    earlier = float(y[int(0.8 * len(y))]) if len(y) > 4 else float(y[0])
    if not earlier:
        return "up from zero"
    change = float(y[-1]) / earlier - 1
    return f"{signed_percent(change)} over the last fifth of the run; it should level off"


def load_maps(run: RunData) -> str:
    """One heat map per layer: colour is load / mean, the identity experts as a group below."""
    if run.routing is None:
        return ""
    routing, ffn = run.routing, num_ffn(run, run.routing)
    counts = _in_columns(routing.counts)  # [C, L, E]
    share = identity_share(run)
    panels = []
    for layer in range(counts.shape[1]):
        levels = layer_levels(counts[:, layer], ffn, share)
        image = picture(levels, f"load of the experts of layer {layer} over time")
        panels.append(f"<figure class=layer><figcaption>Layer {layer}</figcaption>{image}</figure>")
    has_identity = counts.shape[2] > ffn
    scale = '<span class="key"><i>½× or less</i><b class=diverging></b><i>2× or more</i></span>'
    rows = f"rows are FFN experts 0 to {ffn - 1}" + (", the strip below is the identity group" if has_identity else "")
    if ffn > MAP_ROWS:
        rows += f" (each row shows the most extreme of {-(-ffn // MAP_ROWS)})"
    return (
        f"<div class=block><h3>Expert load by layer</h3><p>{escape(load_sentence(run, counts[-1], ffn))}</p>"
        f"<p class=legend>{scale} of the layer's mean; time runs to the right; {escape(rows)}.</p>"
        f"<div class=layers>{''.join(panels)}</div></div>"
    )


def load_sentence(run: RunData, counts: Array, ffn: int) -> str:
    """Say how even the last column is: the extremes of load / mean and the identity experts' share."""
    means = np.maximum(counts[:, :ffn].mean(axis=1, keepdims=True), 1e-12)
    ratio = counts[:, :ffn] / means
    hot, cold = np.unravel_index(ratio.argmax(), ratio.shape), np.unravel_index(ratio.argmin(), ratio.shape)
    text = (
        f"An even load has no colour. At the end the busiest expert is {hot[1]} of layer {hot[0]} "
        f"with {ratio.max():.2f}× its layer's mean, the idlest {cold[1]} of layer {cold[0]} "
        f"with {ratio.min():.2f}×"
    )
    if counts.shape[1] > ffn:
        actual = counts[:, ffn:].sum() / max(counts.sum(), 1)
        text += f"; identity experts take {percent(float(actual), 3)} of all selections"
        share = identity_share(run)
        text += f" ({percent(share, 3)} expected)" if share else ""
    return text + "."


def layer_levels(counts: Array, ffn: int, identity: float | None) -> NDArray[np.uint8]:
    """Return palette numbers [rows, columns] of one layer from its counts [columns, experts]."""
    load = counts[:, :ffn]
    ratio = (load / np.maximum(load.mean(axis=1, keepdims=True), 1e-12)).T
    levels = _most_extreme(to_levels(ratio, OCTAVES), MAP_ROWS)
    if counts.shape[1] == ffn:
        return levels
    share = counts[:, ffn:].sum(axis=1) / np.maximum(counts.sum(axis=1), 1)
    expected = identity or float(share.mean()) or 1.0
    height = max(1, round(levels.shape[0] / 10))
    strip = np.repeat(to_levels(share[None] / expected, OCTAVES), height, axis=0)
    gap = np.full((max(1, round(levels.shape[0] / 30)), levels.shape[1]), GAP, dtype=np.uint8)
    return np.vstack([levels, gap, strip])


def _most_extreme(levels: NDArray[np.uint8], rows: int) -> NDArray[np.uint8]:
    """Reduce rows, keeping of each bin the level farthest from neutral: no hot expert is averaged away."""
    size = -(-levels.shape[0] // rows)
    if size == 1:
        return levels
    bins = [levels[start : start + size].astype(int) for start in range(0, levels.shape[0], size)]
    middle = int(to_levels(np.ones(1))[0])
    chosen = [np.take_along_axis(b, np.abs(b - middle).argmax(axis=0)[None], axis=0)[0] for b in bins]
    return np.array(chosen, dtype=np.uint8)


def _in_columns(counts: Array) -> Array:
    """Sum neighbouring rows of [S, L, E] into at most MAP_COLUMNS (fewer for very many experts)."""
    columns = min(MAP_COLUMNS, max(40, 320_000 // (counts.shape[1] * min(counts.shape[2], MAP_ROWS))))
    if len(counts) <= columns:
        return counts
    starts = np.linspace(0, len(counts), columns + 1).astype(int)[:-1]
    return np.add.reduceat(counts, starts, axis=0)


def bias_paths(run: RunData, axes: Axes) -> str:
    """One panel per layer with the path of each expert's selection bias, all on one scale."""
    if run.routing is None or not np.isfinite(run.routing.bias).all():
        return ""
    routing, ffn = run.routing, num_ffn(run, run.routing)
    rows = np.unique(np.linspace(0, len(routing.steps) - 1, PATH_POINTS).astype(int))
    steps, bias = routing.steps[rows], routing.bias[rows]
    if not (bias != 0).any() or steps[-1] <= steps[0] or not axes.all:
        return ""
    low, high = min(0.0, float(bias.min())), max(0.0, float(bias.max()))
    up = Scale(low - 0.05 * (high - low), high + 0.05 * (high - low))
    panels = [_bias_panel(bias[:, layer], layer, ffn, steps, axes, up) for layer in range(bias.shape[1])]
    final = bias[-1, :, :ffn]
    top, bottom = np.unravel_index(final.argmax(), final.shape), np.unravel_index(final.argmin(), final.shape)
    sentence = (
        "One line per expert; lines that level off mean that the router is balanced. At the end the "
        f"biases reach from {plain(float(final.min()))} (layer {bottom[0]}, expert {bottom[1]}) "
        f"to {plain(float(final.max()))} (layer {top[0]}, expert {top[1]})."
    )
    return (
        f"<div class=block><h3>Selection bias by layer</h3><p>{escape(sentence)}</p>"
        f'<div class="layers paths">{"".join(panels)}</div></div>'
    )


def _bias_panel(bias: Array, layer: int, ffn: int, steps: Array, axes: Axes, up: Scale) -> str:
    """Draw up to PATH_LINES experts of one layer, chosen evenly by final bias, within the envelope of all."""
    order = np.argsort(bias[-1, :ffn], kind="stable")
    chosen = order[np.unique(np.linspace(0, ffn - 1, min(ffn, PATH_LINES)).astype(int))]
    at = axes.share(steps)
    lines = "".join(path(at, up.share(bias[:, expert])) for expert in chosen)
    drawing = f'<path class="grid" d="{line_across(up, 0.0)}"/>'
    if len(chosen) < ffn:
        low, high = up.share(bias[:, :ffn].min(axis=1)), up.share(bias[:, :ffn].max(axis=1))
        outline = path(np.concatenate([at, at[::-1]]), np.concatenate([high, low[::-1]]))
        drawing += f'<path class="envelope c0" d="{outline}Z"/>'
    drawing += f'<path class="bundle c0" d="{lines}"/>'
    if bias.shape[1] > ffn and (bias[:, ffn:] != 0).any():
        drawing += f'<path class="bundle c1" d="{path(at, up.share(bias[:, ffn:].mean(axis=1)))}"/>'
    return (
        f"<figure class=layer><figcaption>Layer {layer}</figcaption><div class=frame>"
        f"<div class=up>{numbers_up(up, 4)}</div>"
        f"<div class=plot>{svg(drawing, f'bias paths of layer {layer}')}</div>"
        f"<div class=across>{axes.across(target=2)}</div></div></figure>"
    )


def num_ffn(run: RunData, routing: RoutingHistory) -> int:
    """Return the number of FFN experts: the model's setting where it fits the width of routing.jsonl."""
    experts = routing.counts.shape[2]
    declared = run.number("model.num_experts")
    return int(declared) if declared and 0 < declared <= experts else experts


def identity_share(run: RunData) -> float | None:
    """Return (K − K_e) / K, the identity experts' expected share of selections; None when unknown or 0."""
    top_k, wanted = run.number("model.top_k"), run.number("model.expected_ffn_experts")
    return (top_k - wanted) / top_k if top_k and wanted and wanted < top_k else None


def _unit(run: RunData) -> str:
    return "tokens" if run.axis_name == "tokens" else "steps"
