"""Which settings differ between runs, and the final loss against each of them."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from train.checkpoint.compatibility import CORPORA, TOKENIZER
from train.keys.dotted import flatten
from train.report.chart import Label, place_labels, svg
from train.report.numbers import exact, fixed
from train.report.page import show
from train.report.reading import RunData
from train.report.scale import Scale, extent, line_across, linear_scale, numbers_up, path

NOT_SETTINGS = ("run", "environment", "derived", CORPORA, TOKENIZER)
SEED = "train.seed"  # runs that differ in it alone are repetitions of one point
MAX_CHARTS, MAX_CHOICES, MAX_LINES = 6, 12, 8
PIXELS, WIDE_PIXELS = 240, 360
RATE = "optim.lr"
LOG_FROM = 8.0  # largest over smallest value of a setting, from which its axis is logarithmic
TICK_GAP = 0.14  # of the width, between two numbers
MANY_DIGITS = re.compile(r"-?\d*\.\d*[1-9]\d{5,}(e[-+]?\d+)?")


@dataclass(frozen=True)
class Contestant:
    """A run in its place of the comparison, 0 is the best. `link` is its report, or empty."""

    number: int
    run: RunData
    loss: float
    link: str


def letter(index: int) -> str:
    """Return A, B, … Z, AA: the short name of a run on this page."""
    return (letter(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def short(text: str) -> str:
    """A setting for people: a number with many digits, such as a search proposes, to four; others as they are."""
    return exact(float(text)) if MANY_DIGITS.fullmatch(text) else text


class Differences:
    """The settings that differ between runs.

    Args:
        trees: the settings of each run, nested or with dotted keys.
    """

    def __init__(self, trees: Sequence[Mapping[str, Any]]) -> None:
        self.flat = [flatten(tree) for tree in trees]
        self.settings = self.of(trees)

    @classmethod
    def of_runs(cls, runs: Sequence[RunData]) -> Differences:
        """Those of the configurations, without names and folders of the runs."""
        return cls([{key: value for key, value in run.config.items() if key not in NOT_SETTINGS} for run in runs])

    @staticmethod
    def of(trees: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
        """{dotted key: its value in each tree, as text} of the keys that are not the same in all."""
        flat = [flatten(tree) for tree in trees]
        keys = dict.fromkeys(key for one in flat for key in one)
        # A key that some run lacks is newer than the run, or of another version: no choice of a user
        columns = {key: [show(one[key]) for one in flat] for key in keys if all(key in one for one in flat)}
        return {key: values for key, values in columns.items() if len(set(values)) > 1}

    def numbers(self, key: str) -> list[float] | None:
        """The values of a setting as numbers; None where one is none."""
        values = [one.get(key) for one in self.flat]
        usable = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        return [float(value) for value in values if value is not None] if usable else None


def sweep_charts(runs: list[Contestant], differing: Differences, judged_by: str) -> str:
    """Return a picture of the final loss for each setting that differs; empty with fewer than three losses."""
    if sum(math.isfinite(one.loss) for one in runs) < 3:
        return ""
    keys = [key for key in differing.settings if key != SEED and _can_draw(differing, key)]
    keys = sorted(keys, key=lambda key: -len(set(differing.settings[key])))[:MAX_CHARTS]
    figures = "".join(_chart(runs, differing, key, judged_by) for key in keys)
    return f"<div class=grid>{figures}</div>" if figures else ""


def sweep_chart(runs: list[Contestant], differing: Differences, judged_by: str) -> tuple[str, dict[int, int]]:
    """One wide picture: the final loss over the swept rate, or else over the number with the most values.

    Returns also the number of the colour that each run's point and line have, by the run's index.
    """
    keys = [key for key in differing.settings if key != SEED and differing.numbers(key) is not None]
    if not keys:
        return sweep_charts(runs, differing, judged_by), {}
    key = max(keys, key=lambda key: (key.startswith(RATE), len(set(differing.settings[key]))))
    figure = _chart(runs, differing, key, judged_by, is_alone=True)
    return (f"<div class=grid>{figure}</div>", _colours(runs, differing, key)) if figure else ("", {})


def _can_draw(differing: Differences, key: str) -> bool:
    return differing.numbers(key) is not None or len(set(differing.settings[key])) <= MAX_CHOICES


def _chart(runs: list[Contestant], differing: Differences, key: str, judged_by: str, is_alone: bool = False) -> str:
    """The picture over one setting; one that is alone on its page takes its width and names each line's lowest."""
    texts, numbers = differing.settings[key], differing.numbers(key)
    choices = sorted(set(texts), key=_in_order) if numbers is None else []
    x = np.array([float(choices.index(text)) for text in texts] if numbers is None else numbers)
    losses = np.array([one.loss for one in runs])
    kept = np.isfinite(losses) & np.isfinite(x)
    if len(set(x[kept].tolist())) < 2:
        return ""
    across, up = _across(x[kept], numbers is None), _up(losses[kept])
    groups, colours = _groups(differing, key, kept), _colours(runs, differing, key)
    pixels = WIDE_PIXELS if is_alone else PIXELS
    lines, labels, lowest = _lines(groups, x, losses, across, up) if len(groups) <= MAX_LINES else ("", [], [])
    indices: list[int] = np.flatnonzero(kept).tolist()
    dots = "".join(_dot(runs[i], key, texts[i], float(x[i]), across, up, colours.get(i, 0)) for i in indices)
    best = indices[int(losses[kept].argmin())]
    sentence = (
        f"Final {judged_by} of each run; the lowest is {losses[best]:.3f} at {short(texts[best])} ({letter(best)})."
    )
    if labels:
        sentence += f" A line for each {' · '.join(other for other, _ in next(iter(groups)))}"
        sentence += f"; lowest at {', '.join(lowest)}." if is_alone else "."
    grid = f'<path class="grid" d="{"".join(line_across(up, tick) for tick in up.ticks())}"/>'
    numbers_below = _choices(choices, across) if numbers is None else _ticks(sorted(set(x[kept].tolist())), across)
    kind = "log axis" if across.log else ""
    return (
        f'<figure class="chart sweep{" wide" if is_alone else ""}"><figcaption><h3>{escape(key)}</h3>'
        f"<b class=value>{escape(short(texts[best]))}</b>"
        f'<p>{escape(sentence)}</p></figcaption><div class="frame{" labelled" if labels else ""}" style=--h:{pixels}px>'
        f"<div class=up>{numbers_up(up)}</div><div class=plot>{svg(grid + lines, sentence)}{dots}</div>"
        f"<div class=across>{numbers_below}</div><div class=ends>{place_labels(labels, up, pixels)}</div>"
        f"<p class=axis>{escape(key)}{f', {kind}' if kind else ''}</p></div></figure>"
    )


def _across(x: np.ndarray[Any, Any], is_choice: bool) -> Scale:
    low, high = extent(x)
    if not is_choice and low > 0 and high / low >= LOG_FROM:
        margin = (high / low) ** 0.06
        return Scale(low / margin, high * margin, True)
    margin = 0.6 if is_choice else 0.06 * (high - low)
    return Scale(low - margin, high + margin)


def _up(losses: np.ndarray[Any, Any]) -> Scale:
    """The range of the losses; runs that went far astray stay at the upper edge."""
    low, middle, high = (float(value) for value in np.quantile(losses, [0, 0.5, 1]))
    limit = middle + 4 * max(middle - low, 1e-9)
    return linear_scale(np.minimum(losses, limit if high > limit else high))


def _groups(
    differing: Differences, key: str, kept: np.ndarray[Any, Any]
) -> dict[tuple[tuple[str, str], ...], list[int]]:
    """Runs that differ in this setting alone, by their other settings; seeds do not count."""
    groups: dict[tuple[tuple[str, str], ...], list[int]] = defaultdict(list)
    for index in np.flatnonzero(kept):
        others = ((other, values[index]) for other, values in differing.settings.items() if other not in (key, SEED))
        groups[tuple(others)].append(int(index))
    return dict(sorted(groups.items(), key=lambda group: [_in_order(value) for _, value in group[0]]))


def _colours(runs: list[Contestant], differing: Differences, key: str) -> dict[int, int]:
    """{index of a run: number of its line's colour} of the runs with a loss."""
    kept = np.isfinite(np.array([one.loss for one in runs]))
    groups = _groups(differing, key, kept)
    return {index: number % 8 for number, members in enumerate(groups.values()) for index in members}


def _in_order(text: str) -> tuple[bool, float, list[tuple[str, int]]]:
    """Sorts numbers by size, before words; numbers in words by size too: w32, w64, w128."""
    try:
        return False, float(text.replace(",", "")), []
    except ValueError:
        return True, 0.0, [(word, int(digits or 0)) for word, digits in re.findall(r"([^0-9]*)([0-9]*)", text)]


def _lines(
    groups: dict[tuple[tuple[str, str], ...], list[int]],
    x: np.ndarray[Any, Any],
    losses: np.ndarray[Any, Any],
    across: Scale,
    up: Scale,
) -> tuple[str, list[Label], list[str]]:
    """A line for each group through the mean loss at each value, its name, and where its mean is lowest."""
    drawing, labels, lowest = "", [], []
    for number, (others, members) in enumerate(groups.items()):
        at = sorted({float(x[index]) for index in members})
        means = [float(np.mean([losses[index] for index in members if x[index] == value])) for value in at]
        if len(at) < 2:
            continue
        line = path(across.share(np.array(at)), up.share(np.array(means)))
        drawing += f'<path class="curve c{number % 8}" d="{line}"/>'
        if len(groups) > 1:
            text = " · ".join(short(value) for _, value in others)
            labels.append(Label(text, means[-1], f"class=c{number % 8}"))
            lowest.append(f"{exact(at[means.index(min(means))])} ({text})")
    return drawing, labels, lowest


def _dot(one: Contestant, key: str, text: str, x: float, across: Scale, up: Scale, colour: int) -> str:
    title = f"{letter(one.number)} {one.run.name}: {key}={text}, loss {fixed(3)(one.loss)}"
    left, bottom = 100 * float(across.share(x)), 100 * min(1.0, float(up.share(one.loss)))
    link = f' href="{escape(one.link)}"' if one.link else ""
    place = f"style=left:{left:.2f}%;bottom:{bottom:.2f}%"
    return f'<a class="dot c{colour}" data-run={one.number}{link} {place} title="{escape(title)}"></a>'


def _ticks(values: list[float], across: Scale) -> str:
    """The values that were tried; where they are close together some have no number, the ends always do."""
    shown = [values[-1]]
    for value in values[-2::-1]:
        gap = float(across.share(shown[-1])) - float(across.share(value))
        room = float(across.share(value)) - float(across.share(values[0]))
        if gap >= TICK_GAP and (value == values[0] or room >= TICK_GAP):
            shown.append(value)
    return "".join(f"<span style=left:{100 * float(across.share(value)):.2f}%>{exact(value)}</span>" for value in shown)


def _choices(choices: list[str], across: Scale) -> str:
    width = 100 / max(1, len(choices))
    return "".join(
        f'<span class=choice-name style="left:{100 * float(across.share(float(index))):.2f}%;max-width:{width:.0f}%" '
        f'title="{escape(choice)}">{escape(choice)}</span>'
        for index, choice in enumerate(choices)
    )
