"""Registered claims: their arms, what is compared, and what counts as shown; read from docs/evidence/claims/*.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from longcat.errors import ConfigError

FOLDER = Path("docs/evidence")
ROUTING_MEASURES = ("micro_batch_violation", "token_spread")


class Expectation(StrEnum):
    """What a comparison should show of the first arm's measure minus the second's."""

    below = "below"  # its interval lies under 0
    above = "above"  # its interval lies over 0
    equal = "equal"  # its interval lies within ± margin
    open = "open"  # nothing: the difference is reported without a verdict


@dataclass(frozen=True)
class Growth:
    """Where a grown arm comes from: a checkpoint of another arm's run with the same seed."""

    arm: str
    step: int
    factor: int = 2


@dataclass(frozen=True)
class Arm:
    """One kind of run: overrides on the experiment, and what configuration keys cannot express."""

    name: str
    what: str  # a few words for tables and legends
    overrides: tuple[str, ...] = ()
    variant: str = ""  # a function of benchmarks/evidence/variants.py that changes the model
    grown: Growth | None = None
    turn: int = 0  # rounds that its runs come later than others of the same seed


@dataclass(frozen=True)
class Comparison:
    """Two arms and the measure whose paired difference, seed by seed, is judged."""

    first: str
    second: str
    measure: str  # a function of benchmarks/evidence/measures.py
    expect: Expectation
    margin: float = 0.0  # for `equal`, in the measure's unit


@dataclass(frozen=True)
class Tuning:
    """A key that each arm gets at its own best value: the lowest final loss of one run each, with a seed of its own."""

    key: str
    values: tuple[float, ...]
    seed: int


@dataclass(frozen=True)
class Claim:
    """One registered claim. `least` seeds always run; more, up to `most`, while a comparison is undecided."""

    name: str
    title: str
    report: str
    experiment: str
    equal: str
    least: int
    most: int
    arms: dict[str, Arm]
    comparisons: tuple[Comparison, ...]
    tuning: Tuning | None = None
    notes: str = ""
    overrides: tuple[str, ...] = field(default=())

    @property
    def compares_routing(self) -> bool:
        """Whether a comparison is of what `benchmarks.evidence.routing` measures."""
        return any(one.measure in ROUTING_MEASURES for one in self.comparisons)


def parse(name: str, tree: dict[str, Any]) -> Claim:
    """A claim from its YAML mapping.

    Raises:
        ConfigError: a comparison names an arm that the file does not have.
    """
    arms = {
        key: Arm(
            key,
            arm["what"],
            tuple(arm.get("set", ())),
            arm.get("variant", ""),
            Growth(**arm["grown"]) if "grown" in arm else None,
        )
        for key, arm in tree["arms"].items()
    }
    comparisons = tuple(
        Comparison(*one["arms"], one["measure"], Expectation(one["expect"]), one.get("margin", 0.0))
        for one in tree["compare"]
    )
    named = {arm for one in comparisons for arm in (one.first, one.second)}
    named |= {arm.grown.arm for arm in arms.values() if arm.grown}
    if unknown := named - set(arms):
        raise ConfigError(f"{FOLDER}/claims/{name}.yaml compares {', '.join(sorted(unknown))}, which is no arm of it")
    tune = tree.get("tune")
    return Claim(
        name,
        tree["title"],
        tree["report"],
        tree["experiment"],
        tree["equal"],
        tree["seeds"]["least"],
        tree["seeds"]["most"],
        arms,
        comparisons,
        Tuning(tune["key"], tuple(tune["values"]), tune["seed"]) if tune else None,
        tree.get("notes", ""),
        tuple(tree.get("set", ())),
    )


@cache
def load() -> dict[str, Claim]:
    """All registered claims by name, in the order of their files."""
    paths = sorted((FOLDER / "claims").glob("*.yaml"))
    if not paths:
        raise ConfigError(f"{FOLDER / 'claims'} has no claims; run from the repository's root")
    return {path.stem: parse(path.stem, yaml.safe_load(path.read_text(encoding="utf-8"))) for path in paths}
