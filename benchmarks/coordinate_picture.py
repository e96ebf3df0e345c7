"""The picture of benchmarks/coordinate_check.py: scales over width by module, and their slopes at each step."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.growth_picture import BLUE, ORANGE, SOFT, STYLE, few_colours

COLOURS = (ORANGE, BLUE)  # of the arms
ROWS = (("values", (0, -1)), ("changes", (1, -1)))  # what is drawn over the width, and at which steps


def draw(
    found: dict[tuple[str, int, int], Any],
    arms: Sequence[str],
    factors: Sequence[int],
    modules: Sequence[str],
    by_step: dict[str, Any],
    target: Path,
) -> None:
    """Draw a column for each module into a PNG: values over width, changes over width, slopes of changes over steps.

    ``found`` and ``by_step`` are those of `benchmarks.coordinate_check`. Scales are means over seeds, as multiples of
    the narrowest width's.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    size = (1.55 * len(modules) + 0.8, 6.6)
    with plt.rc_context({**STYLE, "axes.titlesize": 9.5}):
        figure, axes = plt.subplots(3, len(modules), figsize=size, layout="constrained", sharey="row")
        for column, module in enumerate(modules):
            axes[0][column].set_title(module)
            for row, (kind, steps) in enumerate(ROWS):
                for colour, arm in zip(COLOURS, arms, strict=True):
                    for step, pale in zip(steps, (True, False), strict=True):
                        scales = relative(found, arm, factors, kind, module, step)
                        style = {"linestyle": (0, (3, 2)), "alpha": 0.75} if pale else {}
                        axes[row][column].plot(factors, scales, color=colour, marker="o", markersize=2.5, **style)
                over_width(axes[row][column], factors)
            for colour, arm in zip(COLOURS, arms, strict=True):
                numbers = by_step[arm]["changes"][module]
                axes[2][column].plot(range(1, len(numbers) + 1), numbers, color=colour)
            axes[2][column].axhline(0, color=SOFT, linewidth=0.8)
            axes[2][column].set_xticks((1, 5, 10))
        labels(figure, axes, arms, plt.Line2D)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=130)
        plt.close(figure)
    few_colours(target)


def relative(found: Any, arm: str, factors: Sequence[int], kind: str, module: str, step: int) -> list[float]:
    """Geometric means over seeds at each width, over that of the narrowest."""
    seeds = sorted({seed for _, _, seed in found})
    means = [
        statistics.geometric_mean([found[arm, factor, seed][kind][module][step] for seed in seeds])
        for factor in factors
    ]
    return [mean / means[0] for mean in means]


def over_width(axis: Any, factors: Sequence[int]) -> None:
    """Logarithmic axes whose ticks are plain numbers."""
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(factors, [f"{factor}" for factor in factors])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axis.axhline(1, color=SOFT, linewidth=0.8)


def labels(figure: Any, axes: Any, arms: Sequence[str], line: Any) -> None:
    """Names of rows and axes, and the legend."""
    for row, name in enumerate(("RMS of activations", "RMS of their change", "slope of the change")):
        axes[row][0].set_ylabel(name)
    middle = axes.shape[1] // 2
    for row, name in enumerate(("width over the narrowest", "width over the narrowest", "step")):
        for axis in axes[row]:
            axis.set_xlabel(name if axis is axes[row][middle] else " ")
    figure.align_ylabels()
    handles = [line([], [], color=colour) for colour in COLOURS]
    handles += [line([], [], color=SOFT, linestyle=(0, (3, 2))), line([], [], color=SOFT)]
    names = [*arms, "before training, and after step 1", "after step 10"]
    figure.legend(handles, names, loc="outside upper left", ncols=4)
