"""The layouts of a number of GPUs that a run would accept, with the time and memory of a step by formula."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from launch.plan.cluster import Cluster
from launch.plan.links import TrafficPattern, group_of, seconds
from launch.plan.plan import check
from longcat.counts import flops_per_token
from parallel.capacity import needs
from parallel.config import Recompute
from parallel.memory import elements
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
    total = seconds(cluster, group_of("ep", sizes), TrafficPattern.all_to_all, sent, messages)
    latents = 2 * (model.kv_lora_rank + model.qk_rope_head_dim) * positions * (sizes.cp - 1) * 4 * layers
    total += seconds(cluster, group_of("cp", sizes), TrafficPattern.ring, latents, 4 * layers * count)
    columns = 2 * model.hidden_size * positions * (sizes.tp - 1) * 8 * layers
    total += seconds(cluster, group_of("tp", sizes), TrafficPattern.ring, columns, 8 * layers * count)
    counted, times = elements(model), 2 * count + 2 if sizes.pp == 1 else 3  # gradients are float32: two gathers
    experts = 2 * counted.experts / sizes.ep / sizes.pp * (1 - 1 / sizes.efsdp) * times
    dense = (
        2 * (counted.tp_sharded / sizes.tp + counted.tp_replicated) / sizes.pp * (1 - 1 / sizes.dense_shards) * times
    )
    sharding = seconds(cluster, group_of("efsdp", sizes), TrafficPattern.ring, experts, layers * times)
    sharding += seconds(cluster, group_of("fsdp", sizes), TrafficPattern.ring, dense, layers * times)
    total += max(0.0, sharding - compute) if sizes.pp == 1 else sharding
    return Candidate(config, sizes, compute + bubble + total)
