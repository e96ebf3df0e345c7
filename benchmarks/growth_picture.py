"""The picture of benchmarks/growth.py: loss by tokens and by FLOPs, loss spikes after growth, final differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.growth_runs import METHODS, MOMENTS, GrowthRun, Outcome
from train.report.theme import PALETTE_LIGHT

BLUE, ORANGE, GREEN = PALETTE_LIGHT[:3]
PITCH = 1.8  # between groups of bars
INK, SOFT, GRID = "#191d22", "#5a636e", "#edeff2"
COLOURS = {"full": INK, "half": SOFT, "stack": BLUE, "interpose": ORANGE}
LABELS = {"full": "full depth from scratch", "half": "half depth", "stack": "stacked", "interpose": "interposed"}
STYLE = {
    "font.family": "sans-serif", "font.size": 9, "text.color": INK, "axes.edgecolor": "#c9cfd6",
    "axes.labelcolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT, "axes.grid": True, "grid.color": GRID,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.axisbelow": True, "legend.frameon": False, "xtick.major.size": 0,
    "ytick.major.size": 0,
}  # fmt: skip


def draw(folder: Path, found: list[Outcome], target: Path) -> None:
    """Draw the runs found in ``folder`` into a PNG."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    runs = [GrowthRun(name, folder) for name in ["full", *(one.name for one in found)]]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(10, 7.2), layout="constrained")
        curves(axes[0][0], runs, "tokens", 1e6, "million tokens")
        curves(axes[0][1], runs, "spent", 1e12, "TFLOPs of training, the shallow run's included")
        axes[0][0].set_title("Validation loss by tokens")
        axes[0][1].set_title("Validation loss by compute")
        rise(axes[1][0], folder, found)
        differences(axes[1][1], found)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=130)
        plt.close(figure)
    few_colours(target)


def few_colours(path: Path) -> None:
    """Make a PNG small: lines on white need no more than 256 colours."""
    from PIL import Image

    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def curves(axis: Any, runs: list[GrowthRun], key: str, unit: float, label: str) -> None:
    """Validation losses over ``key``; a dot where a run has grown."""
    named = set()
    lowest = float("inf")
    for run in runs:
        steps = [step for step in run.steps_from_scratch() if step.get("val_loss") is not None]
        steps = [step for step in steps if step["step"] >= run.moment]
        x, y = [step[key] / unit for step in steps], [step["val_loss"] for step in steps]
        colour = COLOURS[run.method]
        name = None if run.method in named else LABELS[run.method]
        named.add(run.method)
        width, order = (2.0, 3) if run.method == "full" else (1.3, 2)
        axis.plot(x, y, color=colour, linewidth=width, zorder=order, label=name)
        if run.moment:
            axis.plot(x[:1], y[:1], "o", color=colour, markersize=4, zorder=4)
        lowest = min(lowest, *y)
    axis.set_xlabel(label)
    axis.set_ylabel("nats per token")
    axis.set_ylim(lowest - 0.05, lowest + 1.2)


def rise(axis: Any, folder: Path, found: list[Outcome]) -> None:
    """Training loss of grown runs minus the shallow run's on the same batches, by steps since the growth."""
    shallow = {step["step"]: step["loss"] for step in GrowthRun("half", folder).own_steps()}
    for run in (GrowthRun(one.name, folder) for one in found if one.rise is not None):
        own = [step for step in run.own_steps() if step["step"] in shallow and step["step"] <= run.moment + 80]
        x = [step["step"] - run.moment for step in own]
        y = [step["loss"] - shallow[step["step"]] for step in own]
        strength = 0.35 + 0.3 * MOMENTS.index(run.moment)
        axis.plot(x, y, color=COLOURS[run.method], alpha=strength, linewidth=1.3)
    axis.axhline(0, color=SOFT, linewidth=1)
    axis.set_xlim(0, 80)
    axis.set_title("Rise and recovery")
    axis.set_xlabel("steps since the growth (paler = grown earlier)")
    axis.set_ylabel("training loss minus half depth's, nats")


def differences(axis: Any, found: list[Outcome]) -> None:
    """Bars for each run: validation loss minus that of the run from scratch, at equal tokens and at equal FLOPs."""
    by_name = {one.name: one for one in found}
    moments = [moment for moment in MOMENTS if any(f"{method}-{moment}" in by_name for method in METHODS)]
    ticks = []
    for group, (kind, words) in enumerate((("equal_tokens", "equal tokens"), ("equal_flops", "equal compute"))):
        left = group * (PITCH * len(moments) + 2)
        places = {"half": left - PITCH}
        ticks.append((left - PITCH, "never"))
        for number, moment in enumerate(moments):
            middle = left + PITCH * number
            places |= {f"{method}-{moment}": middle + (k - 0.5) * 0.8 for k, method in enumerate(METHODS)}
            ticks.append((middle, f"{moment}"))
        for name, place in places.items():
            value = getattr(by_name.get(name), kind, None)
            if value is not None:
                bar(axis, place, value, COLOURS[name.partition("-")[0]])
        axis.text(
            left + PITCH * (len(moments) - 2) / 2,
            1.0,
            words,
            transform=axis.get_xaxis_transform(),
            ha="center",
            va="top",
            color=INK,
        )
    axis.axhline(0, color=INK, linewidth=1)
    axis.set_xticks([place for place, _ in ticks], [text for _, text in ticks])
    axis.grid(axis="x", visible=False)
    axis.margins(y=0.2)
    axis.set_title("Against full depth from scratch")
    axis.set_xlabel("step at which it grew (never = half depth)")
    axis.set_ylabel("validation loss minus full depth's, nats")


def bar(axis: Any, place: float, value: float, colour: str) -> None:
    """A bar with its value at its end."""
    axis.bar(place, value, 0.6, color=colour)
    axis.annotate(
        f"{value:+.2f}".replace("-", "\N{MINUS SIGN}").replace("0.", "."),
        (place, value),
        xytext=(0, 3 if value >= 0 else -3),
        textcoords="offset points",
        ha="center",
        va="bottom" if value >= 0 else "top",
        fontsize=6.5,
        color=SOFT,
    )
