"""Rates over widths, with and without Table 1: the registered grid, each width's best rate, regret and forecast."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import yaml

from benchmarks.evidence.claims import FOLDER, Arm, Claim
from benchmarks.evidence.jobs import COLUMNS, Job, Result
from benchmarks.evidence.measures import MEASURES, Verdict
from longcat.config import ModelConfig
from longcat.counts import active_parameters
from longcat.json_text import dumps
from train.compose import compose
from train.keys.dotted import flatten
from train.run_dir.folder import as_mapping
from train.transfer import PROPORTIONAL, scaled

NAME = "width_transfer"
FORECAST = FOLDER / "width_forecast.json"
PLAIN, TABLE = "plain", "table"
PARAMETERISATIONS = {PLAIN: "the same initial scales and rates at every width", TABLE: "Table 1 from the proxy's width"}
REGRET = 0.01  # registered: of the widest model's lowest loss
STEP = 2.0  # registered: one step of the grid


@dataclass(frozen=True)
class Sweep:
    """The registered grid of docs/evidence/width_transfer.yaml, as a claim whose arms are its points."""

    tree: dict[str, Any]
    claim: Claim

    @property
    def widths(self) -> list[int]:
        return list(self.tree["widths"])

    @property
    def rates(self) -> list[float]:
        return list(self.tree["rates"])

    @property
    def proxy(self) -> int:
        return int(self.tree["proxy"])

    def jobs(self, kind: str, width: int, rate: float) -> list[Job]:
        arm = self.claim.arms[arm_name(kind, width, rate)]
        return [Job(self.claim, arm, seed) for seed in range(1, self.claim.least + 1)]

    def losses(self, kind: str, width: int) -> dict[float, float]:
        """Rate → mean final loss over seeds, of the rates whose runs are all there."""
        found = {}
        for rate in self.rates:
            results = [job.result for job in self.jobs(kind, width, rate)]
            if all(results):
                numbers = [MEASURES["final_loss"].of(result) for result in results if result]
                found[rate] = sum(numbers) / len(numbers)
        return found

    def best(self, kind: str, width: int) -> float | None:
        """The rate with the lowest mean loss; None while runs are missing or none survived."""
        losses = self.losses(kind, width)
        if len(losses) < len(self.rates) or not any(map(math.isfinite, losses.values())):
            return None
        return min(losses, key=lambda rate: losses[rate])

    def regret(self, kind: str, width: int) -> float | None:
        """Loss at the proxy's best rate over this width's lowest one, minus 1."""
        transferred, own = self.best(TABLE, self.proxy), self.best(kind, width)
        if transferred is None or own is None:
            return None
        losses = self.losses(kind, width)
        return losses[transferred] / losses[own] - 1

    def seeds_of_regret(self, kind: str, width: int) -> list[tuple[Result, Result]]:
        """By seed, this width's runs at the proxy's best rate and at its own; empty while runs are missing."""
        transferred, own = self.best(TABLE, self.proxy), self.best(kind, width)
        if transferred is None or own is None:
            return []
        pairs = zip(self.jobs(kind, width, transferred), self.jobs(kind, width, own), strict=True)
        return [(first.result, second.result) for first, second in pairs if first.result and second.result]

    def active(self, width: int) -> float:
        """Active parameters at the expected FFN experts."""
        config = self.jobs(PLAIN, width, self.rates[0])[0].config.model
        return active_parameters(config, config.expected_ffn_experts)

    @cached_property
    def widest(self) -> int:
        return max(self.widths)


def lost_compute(transferred: Result, own: Result) -> float:
    """The share of its FLOPs that the run at the best rate had left when it was as low as the other one ends.

    Interpolated between validations.
    """
    rows = [(row[COLUMNS.index("flops")], row[COLUMNS.index("val_loss")]) for row in own.curve]
    flops, losses = np.array([row for row in rows if row[1] is not None], dtype=float).T
    reached = np.interp(-MEASURES["final_loss"].of(transferred), -np.minimum.accumulate(losses), flops)
    return float(1 - reached / flops[-1])


def arm_name(kind: str, width: int, rate: float) -> str:
    return f"{kind}-{width}-{rate:g}"


@cache
def load() -> Sweep:
    """The registered grid."""
    tree = yaml.safe_load((FOLDER / f"{NAME}.yaml").read_text(encoding="utf-8"))
    base, seeds = [f"experiment={tree['experiment']}", *tree["set"]], tree["seeds"]
    model = compose(base).model
    proxy = flatten(as_mapping(compose([*base, *sizes(model, tree["proxy"])])))
    arms = {}
    for width in tree["widths"]:
        carried = [f"{key}={one.value!r}" for key, one in scaled(proxy, width / tree["proxy"]).items()]
        for kind, what in PARAMETERISATIONS.items():
            for rate in tree["rates"]:
                own = [*sizes(model, width), *(carried if kind == TABLE else []), f"optim.lr={rate!r}"]
                name = arm_name(kind, width, rate)
                late = seeds if width == max(tree["widths"]) else 0  # its loss is forecast before
                arms[name] = Arm(name, f"width {width}, rate {rate:g}, {what}", tuple(own), turn=late)
    title, report, equal = tree["title"], tree["report"], tree["equal"]
    claim = Claim(NAME, title, report, tree["experiment"], equal, seeds, seeds, arms, (), overrides=tuple(tree["set"]))
    return Sweep(tree, claim)


def sizes(model: ModelConfig, width: int) -> list[str]:
    """Overrides that make ``model`` so wide: the sizes that grow with the width."""
    keys = {name: getattr(model, name) * width for name in PROPORTIONAL}
    if uneven := [name for name, size in keys.items() if size % model.hidden_size]:
        raise ValueError(f"width {width} does not divide {uneven}")
    return [f"model.hidden_size={width}", *(f"model.{name}={size // model.hidden_size}" for name, size in keys.items())]


def forecast() -> dict[str, float] | None:
    """The widest model's loss at the proxy's best rate under Table 1, from the narrower ones by loss = a·N^-b.

    None while runs of narrower widths are missing.
    """
    sweep = load()
    rate = sweep.best(TABLE, sweep.proxy)
    narrower = [width for width in sweep.widths if width != sweep.widest]
    losses = [sweep.losses(TABLE, width) for width in narrower]
    if rate is None or any(rate not in one or not math.isfinite(one[rate]) for one in losses):
        return None
    x = np.log([sweep.active(width) for width in narrower])
    slope, offset = np.polyfit(x, np.log([one[rate] for one in losses]), 1)
    value = math.exp(offset + slope * math.log(sweep.active(sweep.widest)))
    return {"rate": rate, "exponent": -float(slope), "loss": value}


def register_forecast() -> None:
    """Write the forecast once, as soon as the narrower widths are done: the widest one's runs come after them."""
    found = None if FORECAST.exists() else forecast()
    if found:
        FORECAST.write_text(dumps(found, indent=1) + "\n", encoding="utf-8")


def registered_forecast() -> dict[str, float] | None:
    return json.loads(FORECAST.read_text(encoding="utf-8")) if FORECAST.exists() else None


def verdict() -> str:
    """The registered rule: best rates within a grid step under Table 1 and beyond it without, and a small regret."""
    sweep = load()
    best = {(kind, width): sweep.best(kind, width) for kind in PARAMETERISATIONS for width in sweep.widths}
    if any(rate is None for rate in best.values()):
        return Verdict.UNFINISHED
    steps = {
        place: abs(math.log(float(rate or 1) / float(best[TABLE, sweep.proxy] or 1), STEP))
        for place, rate in best.items()
    }
    regret = sweep.regret(TABLE, sweep.widest)
    holds = all(steps[TABLE, width] < 1.5 for width in sweep.widths) and regret is not None and regret <= REGRET
    if not holds:
        return Verdict.REFUTED
    return Verdict.SHOWN if steps[PLAIN, sweep.widest] > 1.5 else Verdict.NOT_SHOWN


def row(kind: str, width: int) -> str:
    """One width's line of the table: its best rate, and what the proxy's rate costs there."""
    sweep = load()
    best, regret, pairs = sweep.best(kind, width), sweep.regret(kind, width), sweep.seeds_of_regret(kind, width)
    jobs = [job for rate in sweep.rates for job in sweep.jobs(kind, width, rate)]
    cells = [PARAMETERISATIONS[kind], str(width)]
    if best is None or regret is None:
        cells += ["", "", "", ""]
    else:
        loss = MEASURES["final_loss"].of
        seeds = ", ".join(f"{loss(transferred) / loss(own) - 1:.2%}" for transferred, own in pairs)
        lost = np.mean([lost_compute(transferred, own) for transferred, own in pairs])
        cells += [f"{best:g}", f"{sweep.losses(kind, width)[best]:.4f}", f"{regret:.2%} ({seeds})", f"{lost:.0%}"]
    return f"| {' | '.join(cells)} | {sum(job.result is not None for job in jobs)} of {len(jobs)} |"


def section(drawn: bool) -> list[str]:
    """Lines of the page: each width's best rate and regret, and the forecast. ``drawn``: it has a picture."""
    sweep = load()
    lines = [f"## {sweep.claim.title}", ""]
    claim = sweep.claim
    lines += [f"**{verdict().capitalize()}.** In the report: {claim.report}. Equal here: {claim.equal.strip()}"]
    lines += ["", f"Shown if: {sweep.tree['shown'].strip()}", ""]
    if drawn:
        lines += [f"![Loss over rate by width, with and without Table 1](images/evidence/{NAME}.png)", ""]
    lines += [
        "| parameterisation | width | best rate | lowest loss | regret of the proxy's rate (seeds) | compute | runs |",
        "|---|---|---|---|---|---|---|",
        *(row(kind, width) for kind in PARAMETERISATIONS for width in sweep.widths),
        "",
        "Compute: what the regret is worth at least, the share of its FLOPs that a run at the width's best rate had "
        "left when it was as low, before its rate decayed, as one at the proxy's rate ends.",
    ]
    said = registered_forecast()
    if said:
        came = sweep.losses(TABLE, sweep.widest).get(said["rate"])
        text = (
            f"Forecast for width {sweep.widest} at rate {said['rate']:g}, written before its runs: {said['loss']:.4f}"
        )
        if came:
            text += f"; it came out at {came:.4f}, {abs(came / said['loss'] - 1):.1%} "
            text += "higher" if came > said["loss"] else "lower"
        lines += ["", f"{text}."]
    lines += ["", f"[Registered]({FOLDER.name}/{NAME}.yaml). `python -m benchmarks.evidence run {NAME}`", ""]
    return lines
