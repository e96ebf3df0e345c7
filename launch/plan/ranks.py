"""Summaries of one rank for each place in the pipeline, from as few traces as tell them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from launch.plan.cluster import Cluster
from launch.plan.summary import FEW, Summary, between, extend, summarise
from launch.plan.trace import Scope, trace
from longcat.garbage import no_collections
from parallel.mesh import MeshSizes
from parallel.pipeline.stages import num_stages, split, stages_of
from train.config import Config

Kind = tuple[tuple[int, bool, bool], ...]  # of each stage of a rank: layers, and whether it has embedding and head


def summaries(
    config: Config, ranks: int, sizes: MeshSizes, cluster: Cluster, exact: bool, factors: Sequence[float]
) -> dict[float, list[Summary]]:
    """By imbalance, of one rank for each place in the pipeline.

    Places whose stages are alike share traces. The smallest and the largest imbalance are traced. Between them every
    number is taken as a straight line: bytes at one point of a step are, and of several points the largest is at most.
    ``exact`` traces every layer and every imbalance.
    """
    traced = list(factors) if exact else sorted({min(factors), max(factors)})
    found = {factor: _of_places(config, ranks, sizes, cluster, exact, factor) for factor in traced}
    low, high = found[traced[0]], found[traced[-1]]
    for factor in factors:
        if factor not in found:
            share = (factor - traced[0]) / (traced[-1] - traced[0])
            found[factor] = [between(one, other, share) for one, other in zip(low, high, strict=True)]
    return {factor: found[factor] for factor in factors}


def _of_places(
    config: Config, ranks: int, sizes: MeshSizes, cluster: Cluster, exact: bool, factor: float
) -> list[Summary]:
    kept: dict[tuple[Kind, int | None], Summary] = {}

    def traced(place: int, most: int | None) -> Summary:
        kind = kind_of(config, sizes, place, most)
        if (kind, most) not in kept:
            scope = Scope(rank=place * (ranks // sizes.pp), imbalance=factor, on_gpu=cluster.on_gpu)
            scope = replace(scope, rates=cluster.rates(), micro_batches=2, layers=most)
            with no_collections():  # of a million objects; tensors are freed without one
                kept[kind, most] = summarise(trace(config, ranks, scope), place)
        return kept[kind, most]

    found = []
    for place in range(sizes.pp):
        layers = layers_of_stages(config, sizes, place)
        if exact or max(layers) <= FEW + 1:
            found.append(traced(place, None))
        else:
            found.append(extend(traced(place, FEW), traced(place, FEW + 1), layers))
    return found


def kind_of(config: Config, sizes: MeshSizes, place: int, most: int | None = None) -> Kind:
    """What tells a rank's stages, of at most ``most`` layers, from those of other places."""
    layers = [min(count, most or count) for count in layers_of_stages(config, sizes, place)]
    if sizes.pp == 1:
        return ((layers[0], True, True),)
    schedule = config.parallel.schedule
    own, last = stages_of(schedule, sizes.pp, place), num_stages(schedule, sizes.pp) - 1
    return tuple((count, stage == 0, stage == last) for count, stage in zip(layers, own, strict=True))


def layers_of_stages(config: Config, sizes: MeshSizes, place: int) -> list[int]:
    """Layers of each stage of a rank."""
    if sizes.pp == 1:
        return [config.model.num_layers]
    schedule = config.parallel.schedule
    parts = split(config.model, num_stages(schedule, sizes.pp), config.train.sequence_length)
    own = [parts[stage] for stage in stages_of(schedule, sizes.pp, place)]
    return [part.last - part.first for part in own]
