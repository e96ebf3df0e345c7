"""The layout nearest to one that is refused or too large: fewest doublings of a size away, and accepted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

from launch.local import num_ranks
from launch.plan.candidates import Candidate, estimate, layouts, least_bytes
from launch.plan.cluster import Cluster
from launch.plan.plan import Planned, PlanOptions, check, plan
from longcat.errors import ConfigError
from parallel.memory import mib
from train.config import Config

AXES = ("pp", "cp", "tp", "ep")
MOST_TRACES = 4  # of near layouts, by formula small enough, to find one that fits
AROUND = 8  # numbers of ranks below and above that are tried
MORE_RANKS = (2, 4, 8, 16)


def plan_or_nearest(config: Config, options: PlanOptions) -> Planned:
    """`plan`, whose refusal of a layout ends with the nearest one that a run would accept."""
    ranks = options.ranks or num_ranks(config)
    try:
        check(config, ranks)
    except ConfigError as error:
        works = accepted_near(config, ranks)
        if not works:
            raise
        raise ConfigError(f"{error}; the nearest layout that works: {works}") from error
    return plan(config, options)


def accepted_near(config: Config, ranks: int) -> str:
    """Overrides of the nearest layout that a run would accept, on as many ranks, or on the nearest number of them."""
    near = range(max(1, ranks - AROUND), ranks + AROUND + 1)
    for count in sorted(near, key=lambda count: (abs(count - ranks), count)):
        for layout in _by_distance(config, count):
            try:
                check(layout, count)
            except ConfigError:
                continue
            return described(layout, config) if count == ranks else f"plan.ranks={count} {described(layout, config)}"
    return ""


def fitting_near(config: Config, options: PlanOptions, cluster: Cluster) -> str:
    """One sentence: the nearest layout that fits, on more ranks if it must be; "" where none was found."""
    for factor in (1, *MORE_RANKS):
        ranks = factor * options.ranks
        possible = _candidates(config, ranks, cluster, lambda one: least_bytes(one) <= cluster.capacity)
        for one in islice(possible, MOST_TRACES):
            found = plan(one.config, replace(options, ranks=ranks), with_knobs=False, factors=(1.0,))
            if found.fits():
                more = f"plan.ranks={ranks} " if factor > 1 else ""
                return f"The nearest that fits: {more}{described(one.config, config)} needs {mib(found.needed[1.0])}."
    return ""


def described(layout: Config, asked: Config) -> str:
    """A layout's sizes as overrides, and its recomputation if it is another."""
    words = [f"parallel.{axis}={getattr(layout.parallel, axis)}" for axis in AXES]
    words += ["parallel.dp=1", "parallel.fsdp=-1"]
    if layout.parallel.recompute != asked.parallel.recompute:
        words.append(f"parallel.recompute={layout.parallel.recompute}")
    return " ".join(words)


def distance(layout: Config, asked: Config) -> float:
    """Doublings and halvings of sizes; another recomputation is half a doubling."""
    sizes = ((getattr(layout.parallel, axis), getattr(asked.parallel, axis)) for axis in AXES)
    doublings = sum(abs(math.log2(size / max(other, 1))) for size, other in sizes)
    return doublings + (layout.parallel.recompute != asked.parallel.recompute) / 2


def _by_distance(config: Config, ranks: int) -> list[Config]:
    return sorted(layouts(config, ranks), key=lambda layout: distance(layout, config))


def _candidates(
    config: Config, ranks: int, cluster: Cluster, wanted: Callable[[Candidate], bool]
) -> Iterator[Candidate]:
    for layout in _by_distance(config, ranks):
        try:
            one = estimate(layout, ranks, cluster)
        except ConfigError:
            continue
        if wanted(one):
            yield one
