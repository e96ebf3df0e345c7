"""`longcat plan search`: layouts for a number of GPUs, those that cannot be refused, the fastest that fit first."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from launch.plan.cluster import Cluster, find_cluster
from launch.plan.links import Pattern, group_of, seconds
from launch.plan.plan import Planned, PlanOptions, check, plan
from longcat.counts import flops_per_token
from longcat.errors import ConfigError
from parallel.capacity import needs
from parallel.config import Recompute
from parallel.memory import elements, mib
from parallel.mesh import MeshSizes
from parallel.pipeline.simulation import theory
from train.check import batch_shape
from train.config import Config

SIZES = (1, 2, 4, 8)  # of cp and tp
# FLOPs with recomputation over those without, of a flash layer: python -m benchmarks.recompute
COMPUTED_AGAIN = {Recompute.none: 1.0, Recompute.light: 1.0, Recompute.selective: 1.058, Recompute.full: 4 / 3}


@dataclass(frozen=True)
class Candidate:
    """A layout that a run would accept, before it is traced."""

    config: Config
    sizes: MeshSizes
    seconds: float  # of a step, by formula


@dataclass(frozen=True)
class Found:
    """What a search has seen."""

    fitting: list[Planned]  # the fastest first
    too_large: list[Planned]  # traced, and more than a GPU has
    accepted: int  # layouts that a run would accept
    refused: int
    refusal: str  # of the layout that was asked for, if it is refused, with what works; "" otherwise


def search(config: Config, options: PlanOptions) -> Found:
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
        from launch.plan.nearest import accepted_near

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
    return Found(fitting, too_large, len(candidates), refused, refusal)


def layouts(config: Config, ranks: int) -> Iterator[Config]:
    """Every size of pp, cp and tp with expert groups that divide the experts, and every recomputation.

    fsdp takes the ranks left over; the schedule, the engine and the batch stay.
    """
    for pp in (size for size in range(1, min(ranks, config.model.num_layers) + 1) if ranks % size == 0):
        for cp in SIZES:
            for tp in SIZES:
                if ranks % (pp * cp * tp):
                    continue
                shards, experts = ranks // pp, config.model.num_experts
                most = min(shards, experts)
                for ep in (size for size in range(1, most + 1) if not (shards % size or experts % size)):
                    for recompute in Recompute:
                        layout = copy.deepcopy(config)
                        parallel = layout.parallel
                        parallel.pp, parallel.cp, parallel.tp, parallel.ep = pp, cp, tp, ep
                        parallel.dp, parallel.fsdp, parallel.recompute = 1, -1, recompute
                        if recompute != Recompute.selective:
                            parallel.recompute_list = []
                        yield layout


def least_bytes(one: Candidate) -> float:
    """Bytes that the fullest rank needs at least, by formula."""
    config, batch = one.config, batch_shape(one.config, one.sizes)
    return max(need.total for need in needs(config.model, config.parallel, one.sizes, batch, on_gpu=True))


def estimate(config: Config, ranks: int, cluster: Cluster) -> Candidate:
    """A layout's step by formula: products, messages at their links, the pipeline's bubble.

    Without a pipeline, weights travel beside the products; nothing else overlaps.

    Raises:
        ConfigError: a run would refuse the layout.
    """
    sizes = check(config, ranks)
    batch, model = batch_shape(config, sizes), config.model
    tokens = config.train.global_batch_size * batch.length
    rate = cluster.rates().bfloat16
    compute = flops_per_token(model, batch.length, mtp=config.trains_mtp) * tokens / ranks / rate
    compute *= COMPUTED_AGAIN[config.parallel.recompute]
    count = batch.num_micro_batches
    share = compute / count / 3
    bubble = theory(config.parallel.schedule, sizes.pp, share, share, share) if sizes.pp > 1 else 0.0
    positions = tokens / ranks * sizes.pp  # of a rank's layers
    layers, again = model.num_layers / sizes.pp, 1 + (config.parallel.recompute == Recompute.full) / 2
    rows = positions * model.expected_ffn_experts * model.hidden_size * 2
    messages = 4 * layers * again * count
    sent = rows * (1 - 1 / sizes.ep) * 4 * layers * again
    total = seconds(cluster, group_of("ep", sizes), Pattern.all_to_all, sent, messages)
    latents = 2 * (model.kv_lora_rank + model.qk_rope_head_dim) * positions * (sizes.cp - 1) * 4 * layers
    total += seconds(cluster, group_of("cp", sizes), Pattern.ring, latents, 4 * layers * count)
    columns = 2 * model.hidden_size * positions * (sizes.tp - 1) * 8 * layers
    total += seconds(cluster, group_of("tp", sizes), Pattern.ring, columns, 8 * layers * count)
    counted, times = elements(model), 2 * count + 2 if sizes.pp == 1 else 3  # gradients are float32: two gathers
    experts = 2 * counted.experts / sizes.ep / sizes.pp * (1 - 1 / sizes.efsdp) * times
    dense = (
        2 * (counted.tp_sharded / sizes.tp + counted.tp_replicated) / sizes.pp * (1 - 1 / sizes.dense_shards) * times
    )
    sharding = seconds(cluster, group_of("efsdp", sizes), Pattern.ring, experts, layers * times)
    sharding += seconds(cluster, group_of("fsdp", sizes), Pattern.ring, dense, layers * times)
    total += max(0.0, sharding - compute) if sizes.pp == 1 else sharding
    return Candidate(config, sizes, compute + bubble + total)


def lines(found: Found, options: PlanOptions, memory: float) -> list[str]:
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
