"""Pictures: all differences in loss; of one claim each arm's loss over training and the paired differences."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

from benchmarks.evidence.claims import Claim, Expectation
from benchmarks.evidence.jobs import COLUMNS
from benchmarks.evidence.looks import FINAL, differences, judged_job, level, look, seeds_wanted
from benchmarks.evidence.measures import MEASURES, Verdict, interval
from benchmarks.evidence.token_kinds import KINDS, Registered
from benchmarks.evidence.widths import PARAMETERISATIONS, TABLE, Sweep
from benchmarks.growth_picture import INK, SOFT, STYLE, few_colours
from train.report.theme import PALETTE_LIGHT

ACROSS = 4  # charts side by side
LINES = ("-", "--", ":")  # the second and third time through the colours
TINT = "#e9eef5"  # the margin within which a difference counts as none
MARGIN = 0.01  # nats: the size of the effects that the report counts as gains
COLOURS = {
    Verdict.SHOWN: PALETTE_LIGHT[2],
    Verdict.NOT_SHOWN: SOFT,
    Verdict.REFUTED: PALETTE_LIGHT[1],
    Verdict.UNFINISHED: "#c3c8d0",
}


def draw_claim(claim: Claim, seeds: int, target: Path) -> bool:
    """Draw the claim into a PNG; False where it has no comparison with two seeds yet."""
    measures = list(dict.fromkeys(one.measure for one in claim.comparisons))
    numbers = {one: differences(claim, one.first, one.second, one.measure, seeds) for one in claim.comparisons}
    finite = {one: [each for each in found if math.isfinite(each)] for one, found in numbers.items()}
    if not any(len(found) > 1 for found in finite.values()):
        return False
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = max(sum(one.measure == name for one in claim.comparisons) for name in measures)
    columns = min(1 + len(measures), ACROSS)
    lines = math.ceil((1 + len(measures)) / columns)
    size = (0.2 + 3.0 * columns, (2.2 + 0.3 * rows) * lines)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
        axes = list(grid.flat)
        curves(axes[0], claim, seeds)
        pairs: list[tuple[str, str]] = []
        for place, (axis, name) in enumerate(zip(axes[1:], measures, strict=False), start=1):
            chosen = [one for one in claim.comparisons if one.measure == name]
            differences_chart(axis, claim, [(one, finite[one]) for one in chosen], name)
            if place % columns and pairs == [(one.first, one.second) for one in chosen]:
                axis.set_yticklabels([])  # as in the chart to its left
            pairs = [(one.first, one.second) for one in chosen]
        for axis in axes[1 + len(measures) :]:
            axis.set_axis_off()
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=130)
        plt.close(figure)
    few_colours(target)
    return True


def draw_overview(claims: list[Claim], target: Path) -> bool:
    """Every judged difference in loss, one under another; False where none has two seeds yet."""
    rows = []
    for claim in claims:
        for one, (bounds, verdict) in zip(claim.comparisons, look(claim, seeds_wanted(claim)), strict=True):
            if one.measure == FINAL and one.expect != Expectation.open and not math.isnan(bounds.low):
                rows.append((claim, one, bounds, verdict))
    if not rows:
        return False
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8.4, 1.1 + 0.36 * len(rows)), layout="constrained")
        axis.axvspan(-MARGIN, MARGIN, color=TINT, zorder=0)
        axis.axvline(0, color=SOFT, linewidth=1)
        for place, (_, _, bounds, verdict) in enumerate(rows):
            colour = COLOURS[verdict]
            axis.plot([bounds.low, bounds.high], [place, place], color=colour, linewidth=2)
            axis.plot([bounds.mean], [place], "D", color=colour, markersize=6)
        axis.set_yticks(range(len(rows)), [f"{claim.title}:  {one.first} − {one.second}" for claim, one, _, _ in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel(f"difference in loss, nats per token (tinted: ±{MARGIN})")
        found = {verdict for *_, verdict in rows}
        handles = [axis.plot([], [], "D-", color=COLOURS[one], label=one)[0] for one in COLOURS if one in found]
        figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize=8)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=130)
        plt.close(figure)
    few_colours(target)
    return True


def curves(axis: Any, claim: Claim, seeds: int) -> None:
    """Mean validation loss of each compared arm over counted FLOPs."""
    compared = list(dict.fromkeys(arm for one in claim.comparisons for arm in (one.second, one.first)))
    for number, arm in enumerate(compared):
        points: dict[int, list[tuple[float, float]]] = {}
        for seed in range(1, seeds + 1):
            job = judged_job(claim, arm, seed)
            for row in job.result.curve if job and job.result else []:
                step, flops, loss = row[0], row[COLUMNS.index("flops")], row[COLUMNS.index("val_loss")]
                if step is not None and flops is not None and loss is not None:
                    points.setdefault(int(step), []).append((flops / 1e12, loss))
        means = [tuple(sum(part) / len(part) for part in zip(*each, strict=True)) for each in points.values()]
        if means:
            x, y = zip(*means, strict=True)
            colour, style = PALETTE_LIGHT[number % len(PALETTE_LIGHT)], LINES[number // len(PALETTE_LIGHT) % len(LINES)]
            axis.plot(x, y, color=colour, linestyle=style, label=arm, marker="o", markersize=3)
    axis.set_title("Validation loss,\nmean over seeds")
    axis.set_xlabel("TFLOPs of training")
    axis.set_ylabel("nats per token")
    axis.legend(fontsize=7)


def differences_chart(axis: Any, claim: Claim, rows: list[tuple[Any, list[float]]], measure: str) -> None:
    """A dot for each seed, and the interval of the mean."""
    margin = max((one.margin for one, _ in rows if one.expect == Expectation.equal), default=0.0)
    if margin:
        axis.axvspan(-margin, margin, color=TINT, zorder=0)
    axis.axvline(0, color=SOFT, linewidth=1)
    for place, (_, found) in enumerate(rows):
        axis.plot(found, [place] * len(found), "o", color=PALETTE_LIGHT[0], alpha=0.5, markersize=4)
        bounds = interval(found, level(claim))
        if not math.isnan(bounds.low):
            axis.plot([bounds.low, bounds.high], [place, place], color=INK, linewidth=2)
            axis.plot([bounds.mean], [place], "D", color=INK, markersize=5)
    axis.set_yticks(range(len(rows)), [f"{one.first} − {one.second}" for one, _ in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)
    axis.set_title(textwrap.fill(f"Difference in {MEASURES[measure].title}", 28))
    axis.set_xlabel(MEASURES[measure].unit)


def draw_widths(sweep: Sweep, target: Path) -> bool:
    """Loss over rate, a line for each width, without and with Table 1; False before three rates of a width are done."""
    lines = {
        (kind, width): {rate: loss for rate, loss in sweep.losses(kind, width).items() if math.isfinite(loss)}
        for kind in PARAMETERISATIONS
        for width in sweep.widths
    }
    if all(len(losses) < 3 for losses in lines.values()):
        return False
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.6), sharey=True, layout="constrained")
        for axis, (kind, title) in zip(axes, PARAMETERISATIONS.items(), strict=True):
            for number, width in enumerate(sweep.widths):
                losses = lines[kind, width]
                colour = PALETTE_LIGHT[number]
                axis.plot(list(losses), list(losses.values()), "o-", color=colour, label=str(width), markersize=3)
                best = sweep.best(kind, width)
                if best:
                    axis.plot([best], [losses[best]], "D", color=colour, markersize=7)
            axis.set_xscale("log", base=2)
            axis.set_xticks(sweep.rates, [f"{rate:g}" for rate in sweep.rates], rotation=45)
            axis.set_title(textwrap.fill(title[0].upper() + title[1:], 40))
            axis.set_xlabel("learning rate at the proxy's width" if kind == TABLE else "learning rate")
        axes[0].set_ylabel("validation loss, nats per token")
        axes[0].legend(title="width")
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=130)
        plt.close(figure)
    few_colours(target)
    return True


def draw_kinds(claim: Registered, target: Path) -> bool:
    """FFN experts of each kind of token: the mean over seeds, a dot a seed; False before the first is measured."""
    results = claim.results()
    if not results:
        return False
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    means = {kind: [one["kinds"][kind]["mean"] for one in results] for kind in KINDS}
    order = sorted(KINDS, key=lambda kind: sum(means[kind]))
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
        for place, kind in enumerate(order):
            axis.plot(means[kind], [place] * len(results), "o", color=PALETTE_LIGHT[0], alpha=0.5, markersize=4)
            axis.plot([sum(means[kind]) / len(results)], [place], "D", color=INK, markersize=6)
        axis.axvline(sum(one["all"]["mean"] for one in results) / len(results), color=SOFT, linewidth=1)
        axis.set_yticks(range(len(order)), order)
        axis.set_xlabel(f"FFN experts of {results[0]['chosen']} chosen (line: all tokens; dots: seeds)")
        axis.grid(axis="y", visible=False)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=130)
        plt.close(figure)
    few_colours(target)
    return True
