"""`longcat plan search`: of the layouts that a run would accept, the fastest that fit, for a number of GPUs."""

from __future__ import annotations

from dataclasses import dataclass

from launch.plan.candidates import estimate, layouts, least_bytes
from launch.plan.cluster import find_cluster
from launch.plan.nearest import accepted_near
from launch.plan.plan import Planned, PlanOptions, check, plan
from longcat.errors import ConfigError
from parallel.memory import mib
from train.config import Config


@dataclass(frozen=True)
class SearchResult:
    """The layouts that a search has tried."""

    fitting: list[Planned]  # the fastest first
    too_large: list[Planned]  # traced, and more than a GPU has
    accepted: int  # layouts that a run would accept
    refused: int
    refusal: str  # of the layout that was asked for, if it is refused, with what works; "" otherwise


def search(config: Config, options: PlanOptions) -> SearchResult:
    """Try the layouts of ``options.ranks`` GPUs; by formula first, then the best of them by their traces.

    Raises:
        ConfigError: no layout at all is accepted.
    """
    if options.ranks < 1:
        raise ConfigError("longcat plan search needs the number of GPUs; add plan.ranks=N")
    cluster, refused, refusal = find_cluster(options.cluster), 0, ""
    try:
        check(config, options.ranks)
    except ConfigError as error:
        refusal = str(error)
    candidates = []
    for layout in layouts(config, options.ranks):
        try:
            candidates.append(estimate(layout, options.ranks, cluster))
        except ConfigError as error:
            refused, why = refused + 1, error
    if not candidates:
        works = accepted_near(config, options.ranks)
        nearest = f"; the nearest layout that works: {works}" if works else ""
        raise ConfigError(f"none of {refused} layouts of {options.ranks} GPUs is possible; the last: {why}{nearest}")
    possible = [one for one in candidates if least_bytes(one) <= cluster.capacity]
    possible.sort(key=lambda one: one.seconds)
    traced: list[Planned] = []
    padding = None
    for one in possible:
        if sum(found.fits() for found in traced) >= options.candidates or len(traced) >= 3 * options.candidates:
            break
        traced.append(plan(one.config, options, with_knobs=False, factors=(1.0,), padding=padding))
        padding = traced[-1].padding
    order = sorted(traced, key=lambda found: found.times[1.0].seconds)
    fitting, too_large = ([found for found in order if found.fits() is fits] for fits in (True, False))
    return SearchResult(fitting, too_large, len(candidates), refused, refusal)


def lines(found: SearchResult, options: PlanOptions, memory: float) -> list[str]:
    """The table of a search."""
    rows = [
        f"{options.ranks:,} × {options.cluster}: {found.accepted:,} layouts are possible, {found.refused:,} refused."
    ]
    if found.refusal:
        rows += ["", f"The layout that was asked for is refused: {found.refusal}."]
    shown = found.fitting
    if not found.fitting:
        rows += ["", f"None of the {len(found.too_large)} that were traced fits in {mib(memory)}. The nearest:"]
        shown = sorted(found.too_large, key=lambda one: one.peak)[:3]
    rows += [
        "",
        f"{'pp':>4}{'fsdp':>7}{'cp':>4}{'tp':>4}{'ep':>5}  {'recompute':<10}{'needs':>12}{'step':>10}"
        f"{'tokens/s GPU':>14}{'MFU':>8}",
    ]
    for one in shown:
        sizes, times = one.sizes, one.times[1.0]
        rows.append(
            f"{sizes.pp:>4}{sizes.fsdp:>7,}{sizes.cp:>4}{sizes.tp:>4}{sizes.ep:>5}  {one.config.parallel.recompute:<10}"
            f"{mib(one.needed[1.0]):>12}{times.seconds:>8.3g} s{times.tokens_per_gpu:>14,.0f}{times.mfu:>8.1%}"
        )
    if found.fitting:
        sizes = found.fitting[0].sizes
        keys = " ".join(f"parallel.{axis}={getattr(sizes, axis)}" for axis in ("pp", "fsdp", "cp", "tp", "ep"))
        rows += ["", f"The fastest: {keys}", f"{'':13}parallel.recompute={found.fitting[0].config.parallel.recompute}"]
    return rows
