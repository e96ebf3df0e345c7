"""How long a step takes on a cluster: each rank's traced work, its messages, what overlaps, and the schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.plan.cluster import Cluster
from launch.plan.links import TrafficPattern, group_of, seconds, where
from launch.plan.sharding import exposed_sharding, pipeline_sharding
from launch.plan.step import FORWARD, AxisTraffic, PhaseTimes, Step
from launch.plan.summary import Summary, backward_kinds
from longcat.counts import count_parameters, flops_per_token
from parallel.chunks import LayerTimes, backward_of, choose_chunks, exposed_share, waiting_seconds
from parallel.config import ExpertsAfter, Recompute, Sharding
from parallel.expert.sharding import largest_share
from parallel.layout import BatchShape
from parallel.memory import elements
from parallel.mesh import MeshSizes
from parallel.watchdog.events import SpanKind
from train.config import Config

TP_KINDS = (
    SpanKind.SEQUENCE_ALL_GATHER,
    SpanKind.SEQUENCE_REDUCE_SCATTER,
    SpanKind.VOCABULARY_MAX,
    SpanKind.VOCABULARY_SUM,
)
UPDATE_BYTES = 32  # of a weight: gradient, master weight and moments read, the last three written, gradient's norm


@dataclass(frozen=True)
class StepTimes:
    """A step's prediction."""

    seconds: float
    compute: float  # seconds in which the busiest rank computes
    bubble: float  # share of the pipeline's time in which a rank waits for others, on average
    lines: list[AxisTraffic]
    layer: LayerTimes | None  # of one shortcut layer's forward, if its experts are on several ranks
    chunks: int  # that choose_chunks takes for it
    exposed: dict[int, float]  # by the number of chunks: the share of a layer in which nothing is computed
    mfu: float  # of text
    tokens_per_gpu: float  # of text, a second


def predict(
    config: Config,
    sizes: MeshSizes,
    batch: BatchShape,
    cluster: Cluster,
    ranks: Sequence[Summary],
    imbalance: float = 1.0,
    padding: float = 0.0,
) -> StepTimes:
    """A step's time from the summaries of one rank for each place in the pipeline.

    The part ``padding`` of the positions takes its time, and is no token.
    """
    count = batch.num_micro_batches
    steps = [Step(config, sizes, batch, cluster, imbalance) for _ in ranks]
    spent = [_phases(step, summary) for step, summary in zip(steps, ranks, strict=True)]
    computed = [
        count * sum(value for key, value in one.numbers.items() if key[0] == "seconds" and key[1] != -1)
        for one in ranks
    ]
    bubble = 0.0
    if sizes.pp == 1:
        run = count * sum(one.seconds for one in spent[0].values()) + exposed_sharding(steps[0], ranks[0], spent[0])
    else:
        run, bubble = _pipeline(steps[0], spent, count)
    ends = [_ends(step, summary) for step, summary in zip(steps, ranks, strict=True)]
    total = run + max(ends)
    if cluster.cores:
        busy = _busy_seconds(steps, computed)
        total = max(total, busy) if sizes.pp > 1 else busy + _idle_seconds(steps[0])
    busiest = max(range(len(ranks)), key=lambda place: computed[place])
    train, layer = config.train, layer_times(steps[busiest], ranks[busiest])
    tokens = train.global_batch_size * train.sequence_length * (1 - padding)
    world = sizes.pp * sizes.dp * sizes.dense_shards
    flops = flops_per_token(config.model, train.sequence_length, mtp=config.trains_mtp) * tokens
    chunks = {} if layer is None else {n: exposed_share(n, layer) for n in (1, 2, 4, 8)}
    return StepTimes(
        total,
        computed[busiest],
        bubble,
        list(steps[busiest].lines.values()),
        layer,
        1 if layer is None else choose_chunks(layer, steps[0].positions),
        chunks,
        flops / (total * world * cluster.bfloat16),
        tokens / total / world,
    )


def _busy_seconds(steps: Sequence[Step], computed: Sequence[float]) -> float:
    """Seconds in which the cores of the fullest node do all that its ranks compute and send.

    In a pipeline, what a rank waits for another one on its core may use.
    """
    cluster, sizes = steps[0].cluster, steps[0].sizes
    work = [
        own + sum(line.work for line in step.lines.values()) + _update_seconds(step)
        for step, own in zip(steps, computed, strict=True)
    ]
    each = sizes.dp * sizes.dense_shards
    ranks = range(sizes.pp * each)
    nodes = (ranks[first : first + cluster.gpus_per_node] for first in ranks[:: cluster.gpus_per_node])
    shared = max(sum(work[rank // each] for rank in node) for node in nodes) / cluster.cores
    return max([*work, shared])


def _idle_seconds(step: Step) -> float:
    """Seconds of exposed messages in which no core copies them. All ranks outside a pipeline wait at the same time."""
    return sum(max(0.0, line.exposed - line.work) for line in step.lines.values())


def _phases(step: Step, summary: Summary) -> dict[tuple[int, str], PhaseTimes]:
    """Each phase of one micro-batch, by (stage of the rank, phase)."""
    found = {}
    forward_exposed: dict[int, float] = {}
    link = where(step.cluster, group_of("fsdp", step.sizes))
    for stage, layers in enumerate(summary.layers):
        for kind in (FORWARD, *backward_kinds(step.config.parallel, step.sizes.pp)):
            spent, before = step.slowdown * summary.of("seconds", stage, kind), step.seconds_on(link)
            if kind != SpanKind.WEIGHT_GRADIENTS.value:
                spent += _experts(step, summary, stage, kind, layers, forward_exposed)
                spent += _sequence(step, summary, stage, kind, layers)
            on_link = (step.seconds_on(link) - before) / step.batch.num_micro_batches
            found[stage, kind] = PhaseTimes(spent, on_link)
    return found


def _experts(
    step: Step, summary: Summary, stage: int, kind: str, layers: int, forward_exposed: dict[int, float]
) -> float:
    """Exposed seconds of dispatch and combine in a phase."""
    times = layer_times(step, summary, stage)
    if times is None:
        return 0.0
    chunks = step.config.overlap.decided_chunks
    once = waiting_seconds(chunks, times) if step.config.overlap.enabled else 2 * (times.message + times.per_message)
    exposed = once
    if kind == FORWARD:
        forward_exposed[stage] = once
    else:
        ratio = summary.of("seconds", stage, kind) / max(summary.of("seconds", stage, FORWARD), 1e-12)
        recomputes = step.config.parallel.recompute == Recompute.full
        backward = backward_of(times, max(ratio - recomputes, 0.5))
        exposed = recomputes * once
        exposed += waiting_seconds(chunks, backward) if step.config.overlap.enabled else once
    kinds = SpanKind.EXPERT_DISPATCH, SpanKind.EXPERT_COMBINE, SpanKind.EXPERT_GATES
    num_bytes = sum(summary.of("bytes", stage, kind, one.value) for one in kinds)
    messages = 2 * (1 + (kind != FORWARD and step.config.parallel.recompute == Recompute.full))
    short = kind != FORWARD  # the gates' gradients, a number a row
    count = step.batch.num_micro_batches
    taken = layers * (messages * times.message + (messages + short) * chunks * times.per_message)
    sent = layers * (messages + short) * chunks * count
    step.add("ep", "dispatch and combine", num_bytes * count, taken * count, layers * exposed * count, sent)
    return layers * exposed


def layer_times(step: Step, summary: Summary, stage: int = 0) -> LayerTimes | None:
    """One layer's forward: its messages, and its parts by their FLOPs, which together take as long as they were traced.

    None where experts are on one rank.
    """
    if step.sizes.ep == 1:
        return None
    model, layers = step.config.model, summary.layers[stage]
    counts, positions = count_parameters(model), step.positions
    scores = model.num_heads * (model.qk_head_dim + model.v_head_dim) * (step.batch.length + 1) / 2
    dense, attention = 2.0 * positions * counts.dense_ffn, 2.0 * positions * (counts.attention + scores)
    experts = 2.0 * positions * model.expected_ffn_experts * step.imbalance * counts.expert
    rate = step.cluster.rates().bfloat16
    heads = step.head_seconds if _has_head(step, summary, stage) else 0.0
    traced = max(step.slowdown * summary.of("seconds", stage, FORWARD) - heads, 0.0) / layers
    scale = max(traced, (2 * dense + 2 * attention + experts) / rate) / (2 * dense + 2 * attention + experts)
    kinds = SpanKind.EXPERT_DISPATCH.value
    num_bytes = summary.of("bytes", stage, FORWARD, kinds) / layers * step.imbalance
    group = group_of("ep", step.sizes)
    fixed = seconds(step.cluster, group, TrafficPattern.all_to_all, 0.0)
    message = seconds(step.cluster, group, TrafficPattern.all_to_all, num_bytes) - fixed
    after_attention = step.config.overlap.experts_after == ExpertsAfter.attention
    before, after = (dense + attention, dense) if after_attention else (dense, attention + dense)
    return LayerTimes(message, fixed, experts * scale, 6 * step.cluster.call, before * scale, after * scale)


def _has_head(step: Step, summary: Summary, stage: int) -> bool:
    """Whether a stage has the head: those of one pipeline are all alike but for it."""
    flops = [summary.of("flops", other, FORWARD) / max(layers, 1) for other, layers in enumerate(summary.layers)]
    return step.sizes.pp == 1 or flops[stage] > 1.2 * min(flops)


def _sequence(step: Step, summary: Summary, stage: int, kind: str, layers: int) -> float:
    """Exposed seconds of context and tensor parallelism in a phase: latents overlap the queries' projection."""
    model, count = step.config.model, step.batch.num_micro_batches
    queries = model.hidden_size * model.q_lora_rank + model.q_lora_rank * model.num_heads * model.qk_head_dim
    window = step.slowdown * 2.0 * step.positions * queries / step.cluster.rates().bfloat16 * 2 * layers
    latents = SpanKind.ATTENTION_LATENTS.value
    exposed = step.send(
        "cp",
        "attention latents",
        TrafficPattern.ring,
        summary.of("bytes", stage, kind, latents),
        summary.of("count", stage, kind, latents),
        window,
        count,
    )
    for one in TP_KINDS:
        num_bytes, messages = (summary.of(name, stage, kind, one.value) for name in ("bytes", "count"))
        exposed += step.send("tp", "sequence and vocabulary", TrafficPattern.ring, num_bytes, messages, 0.0, count)
    return exposed


def _ends(step: Step, summary: Summary) -> float:
    """Seconds of a step outside its micro-batches: sums over replicas, the update, and all that a pipeline shards."""
    config, sizes = step.config, step.sizes
    exposed = pipeline_sharding(step, summary) if sizes.pp > 1 else 0.0
    share = shard_elements(config, sizes) / sizes.pp
    if sizes.dp > 1:
        num_bytes = 2 * share * 4 * (sizes.dp - 1) / sizes.dp
        exposed += step.send("dp", "sum over replicas", TrafficPattern.ring, num_bytes, 1.0, 0.0, 1.0)
    if config.parallel.sharding != Sharding.fsdp:
        num_bytes = 4 * (4 if config.parallel.sharding == Sharding.zero2 else 3) * share
        exposed += step.send(
            "fsdp", "ZeRO's sums and weights", TrafficPattern.ring, num_bytes * sizes.data_ranks, 1, 0, 1
        )
    return exposed + _update_seconds(step)


def _update_seconds(step: Step) -> float:
    """Seconds of the optimizer on a rank, which reads and writes all that it has."""
    share = shard_elements(step.config, step.sizes) / step.sizes.pp
    return share * UPDATE_BYTES / (step.cluster.memory * step.cluster.memory_reached)


def shard_elements(config: Config, sizes: MeshSizes) -> float:
    """Elements of the whole model that one rank of a replica without a pipeline stores."""
    counted = elements(config.model)
    if config.parallel.sharding != Sharding.fsdp:
        return counted.total / (sizes.dp * sizes.dense_shards)
    return (counted.total - counted.experts) / sizes.dense_shards + counted.experts * largest_share(config.model, sizes)


def _pipeline(step: Step, spent: Sequence[Mapping[tuple[int, str], PhaseTimes]], count: int) -> tuple[float, float]:
    """(seconds of a pipeline's micro-batches, share in which a rank waits on average)."""
    from parallel.pipeline.simulation import Action, planned, simulate
    from parallel.pipeline.stages import stages_of

    parallel, pp = step.config.parallel, step.sizes.pp
    own = [stages_of(parallel.schedule, pp, place) for place in range(pp)]
    hidden = step.positions * step.config.model.hidden_size * (2 if step.config.train.dtype == "bfloat16" else 4)
    transfer = seconds(step.cluster, group_of("pp", step.sizes), TrafficPattern.neighbour, hidden)
    names = {"F": FORWARD, "B": "backward", "I": "input_gradients", "W": "weight_gradients"}

    def of(place: int, action: Action) -> float:
        sends = transfer if action.kind != "W" else 0.0
        return spent[place][own[place].index(action.stage), names[action.kind]].seconds + sends

    found = simulate(parallel.schedule, planned(parallel.schedule, pp, count), of)
    sent = 2 * count * len(own[0])
    step.add("pp", "hidden states and gradients", hidden * sent, transfer * sent, transfer * sent, sent)
    return found.seconds, found.bubble
