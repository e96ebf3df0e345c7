"""The picture of benchmarks/context_extension.py: loss over position, right after the border and later."""

from __future__ import annotations

from pathlib import Path

from benchmarks.growth_picture import BLUE, ORANGE, SOFT, STYLE, few_colours

COLOURS = ("#7a7a7a", ORANGE, BLUE)  # of the arms


def draw(curves: dict[str, dict[str, list[float]]], bucket: int, short: int, target: Path) -> None:
    """Draw a panel for each time after the border into a PNG.

    ``curves``: arm → when → mean loss by ``bucket`` positions; ``short`` is the first stage's sequence length.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    times = [when for when in next(iter(curves.values())) if when != "before"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(times), figsize=(8.4, 3.4), layout="constrained", sharey=True)
        for axis, when in zip(axes, times, strict=True):
            for colour, (arm, by_time) in zip(COLOURS, curves.items(), strict=True):
                middles = [(number + 0.5) * bucket for number in range(len(by_time[when]))]
                if arm == next(iter(curves)):
                    axis.plot(middles, by_time["before"], color=SOFT, linestyle=(0, (3, 2)), label="before")
                axis.plot(middles, by_time[when], color=colour, label=arm)
            axis.axvline(short, color=SOFT, linewidth=0.8)
            axis.set_title(when)
            axis.set_xlabel("position")
        axes[0].set_ylabel("nats per token")
        axes[-1].legend(frameon=False)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=130)
        plt.close(figure)
    few_colours(target)
