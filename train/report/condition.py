"""The health of a run in plain words, for the report's first screen: findings and the figures that are watched."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from train.new_run import new_run
from train.report import starts
from train.report.numbers import duration, exact, exponent, percent, plain
from train.report.reading import RunData, tail_length

SHOWN = 4  # dead experts and parts that are named
RATIO_LIMIT = 0.1  # of the balance loss's gradient (section 9)
ALIKE = 0.5  # mean cosine of a router's rows from which it is marked
UNEVEN = 2.0  # load of the busiest expert over the mean from which it is marked
NEAR_EPS = 100.0  # gradient RMS over ε below which it is marked
GROWTH = 10.0  # of the hidden norm over the second half of the run from which it is marked


@dataclass(frozen=True)
class HealthRemark:
    """One sentence, and whether somebody should look."""

    text: str
    alarms: bool = False


def condition(run: RunData) -> str:
    """The list of findings as HTML; empty where nothing is known."""
    found = [finding for look in LOOKS if (finding := look(run)) is not None]
    items = "".join(f"<li{' class=alarm' if one.alarms else ''}>{escape(one.text)}</li>" for one in found)
    return f'<ul class=health aria-label="health of the run">{items}</ul>' if items else ""


def spikes(run: RunData) -> HealthRemark | None:
    if run.events is None:
        return None
    found = [event for event in run.events if event["event"] == "spike"]
    if not found:
        return HealthRemark("No spike of the loss or of the gradient norm.")
    names = {"report": "reported only", "skip": "skipped", "rollback": "rolled back", "stop": "which ended the run"}
    actions = [str(event.get("action")) for event in found]
    last = str(found[-1].get("text", ""))
    if len(found) == 1:
        return HealthRemark(f"1 spike, {names.get(actions[0], actions[0])}: {last}.", True)
    counts = ", ".join(f"{actions.count(key)} {name}" for key, name in names.items() if key in actions)
    return HealthRemark(f"{len(found)} spikes: {counts}. The last was {last}.", True)


def experts(run: RunData) -> HealthRemark | None:
    if run.events is None:
        return None
    dead: dict[tuple[Any, Any], Any] = {}
    revived = set()
    for event in run.events:
        place = event.get("layer"), event.get("expert")
        if event["event"] == "dead_expert":
            dead[place] = event.get("since")
        elif event["event"] == "expert_revived":
            dead.pop(place, None)
            revived.add(place)
    if dead:
        parts = [f"expert {expert} of layer {layer} since step {since}" for (layer, expert), since in dead.items()]
        parts[0] = parts[0].replace(" since", " has received no token since", 1)
        more = f", and {len(dead) - SHOWN} more" if len(dead) > SHOWN else ""
        return HealthRemark(_capital(", ".join(parts[:SHOWN]) + more + "."), True)
    if revived:
        number = "1 expert" if len(revived) == 1 else f"{len(revived)} experts"
        return HealthRemark(f"Every expert receives tokens; {number} had none for a time.")
    limit = run.number("health.dead_after")
    return HealthRemark(f"No expert went without a token for {limit:,.0f} steps.") if limit else None


def gradients(run: RunData) -> HealthRemark | None:
    prefix, eps = "grad_rms/", run.number("optim.eps")
    values = {key.removeprefix(prefix): run.last(key) for key in run.columns if key.startswith(prefix)}
    known = {part: value for part, value in values.items() if math.isfinite(value)}
    if not known or not eps:
        return None
    low, high = min(known, key=lambda part: known[part]), max(known, key=lambda part: known[part])
    times = known[low] / eps
    text = (
        f"Gradient RMS: {plain(known[low], 2)} ({_part(low)}) to {plain(known[high], 2)} ({_part(high)}); Adam's ε of "
        f"{exact(eps)} is "
    )
    if times >= NEAR_EPS:
        return HealthRemark(f"{text}{exponent(times)} times smaller or more.")
    return HealthRemark(f"{text}too near and shrinks the updates: {new_run('a lower optim.eps', 'optim.eps')}.", True)


def loads(run: RunData) -> HealthRemark | None:
    text, largest = _range(run, "expert_load_max_over_mean", lambda value: f"{value:.2f}")
    if not text:
        return None
    biases, _ = _range(run, "bias_range", lambda value: plain(value, 2))
    also = f"; selection biases span {biases}" if biases else ""
    return HealthRemark(f"The busiest expert has {text} times its layer's mean load{also}.", largest > UNEVEN)


def routers(run: RunData) -> HealthRemark | None:
    cosine, alike = _range(run, "router_similarity", lambda value: plain(value, 2))
    ratio, largest = _range(run, "router_grad_ratio", lambda value: plain(value, 2))
    if not cosine or not ratio:
        return None
    text = (
        f"Router: its rows have a mean cosine of {cosine}; the balance loss's gradient is {ratio} of the other losses' "
        f"(wanted: under {RATIO_LIMIT})."
    )
    return HealthRemark(text, alike > ALIKE or largest > RATIO_LIMIT)


def hidden(run: RunData) -> HealthRemark | None:
    values = run.series("hidden_norm")[1]
    if len(values) < 2:
        return None
    few = tail_length(len(values))
    middle = len(values) // 2
    before, now = float(np.median(values[middle : middle + few])), float(np.median(values[-few:]))
    growth = now / before if before else math.inf
    trend = "steady since half-way" if 0.9 < growth < 1.1 else f"{plain(growth, 2)} times its value half-way"
    return HealthRemark(f"Hidden norm: {plain(now)}, {trend}.", growth >= GROWTH)


def restarts(run: RunData) -> HealthRemark | None:
    found = starts.totals(run.starts)
    share = starts.availability(found)
    if share is None:
        return None
    faults = int(found["faults"])
    text = f"{faults} {'fault' if faults == 1 else 'faults'} ended the ranks" if faults else "No fault ended the ranks"
    return HealthRemark(f"{text}; availability {percent(share)} of {duration(found['wall_seconds'])}.", faults > 0)


def stragglers(run: RunData) -> HealthRemark | None:
    found = [event for event in run.events or () if event["event"] == "straggler"]
    if not found:
        return None
    last = str(found[-1].get("text", ""))
    return HealthRemark(f"{'1 straggler' if len(found) == 1 else f'{len(found)} times a straggler'}: {last}.", True)


def corpora(run: RunData) -> HealthRemark | None:
    worse: dict[str, dict[str, Any]] = {}
    for event in run.events or ():
        if event["event"] == "corpus_worse":
            worse[str(event.get("corpus"))] = event
        elif event["event"] == "corpus_recovered":
            worse.pop(str(event.get("corpus")), None)
    if not worse:
        return None
    parts = [f"{name} since step {event['step']:,}" for name, event in worse.items()]
    return HealthRemark(f"The validation loss is above its lowest on {', '.join(parts)}.", True)


LOOKS: Sequence[Callable[[RunData], HealthRemark | None]] = (
    restarts,
    stragglers,
    spikes,
    corpora,
    experts,
    gradients,
    loads,
    routers,
    hidden,
)


def _range(run: RunData, key: str, write: Callable[[float], str]) -> tuple[str, float]:
    """The least and the largest value of a figure by layer at the end, in words, and the largest."""
    prefix = f"{key}/layer_"
    names = [name for name in run.columns if name.startswith(prefix) and name.removeprefix(prefix).isdecimal()]
    values = {int(name.removeprefix(prefix)): run.final(name) for name in names}
    known = {layer: value for layer, value in values.items() if math.isfinite(value)}
    if not known:
        total = run.final(key)
        return (f"at most {write(total)}", total) if math.isfinite(total) else ("", math.nan)
    low, high = min(known, key=lambda layer: known[layer]), max(known, key=lambda layer: known[layer])
    if low == high:
        return f"{write(known[low])}", known[low]
    return f"{write(known[low])} (layer {low}) to {write(known[high])} (layer {high})", known[high]


def _part(name: str) -> str:
    return {"mtp": "MTP"}.get(name, name.replace("_", " "))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
