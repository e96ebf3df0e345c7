"""Seconds of FSDP2's collectives on a cluster's links, and which of them a step's computation hides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from launch.plan.links import TrafficPattern, group_of, seconds
from launch.plan.step import BACKWARD, FORWARD, PhaseTimes, Step
from launch.plan.summary import Summary
from longcat.counts import count_parameters
from parallel.memory import elements
from parallel.watchdog.events import SpanKind

NAMES = {
    SpanKind.WEIGHT_ALL_GATHER.value: "weight all-gather",
    SpanKind.GRADIENT_REDUCE_SCATTER.value: "gradient reduce-scatter",
}


def exposed_sharding(step: Step, summary: Summary, spent: Mapping[tuple[int, str], PhaseTimes]) -> float:
    """Exposed seconds, in a step without a pipeline, of FSDP2's all-gathers and reduce-scatters.

    Its units are the layers, MTP's among them, and the root, which has the embedding and the head. A forward begins
    with the root's gather and the first layer's. Then each layer's forward hides the gather of the next one
    (`prefetch_in_order`). The root stays gathered; the head's backward hides the gather of the last layer, and each
    layer's backward that of the layer before it and, in the last micro-batch, the reduce-scatter of the layer after it
    (`PendingReductions`). Sums of the first layer and the root are left for the end of the backward. What hides is the
    time in which a layer leaves the link idle.
    """
    model, count = step.config.model, step.batch.num_micro_batches
    layers = summary.layers[0] + model.num_mtp_layers * step.config.trains_mtp
    gathers, sums = NAMES

    def units(kind: str, what: str) -> tuple[float, float]:
        """Seconds of a layer's collectives in a phase, and of the root's."""
        (num_bytes, root_bytes), (messages, root_messages) = (
            (summary.of(one, 0, kind, what), summary.of(f"root {one}", 0, kind, what)) for one in ("bytes", "count")
        )
        of_layers = _seconds(step, num_bytes - root_bytes, messages - root_messages, expert_share(step, root=False))
        return of_layers / layers, _seconds(step, root_bytes, root_messages, 0.0)

    def window(kind: str, head: float) -> float:
        return max(0.0, spent[0, kind].seconds - head - spent[0, kind].on_link) / layers

    head = step.head_seconds
    gather, root = units(FORWARD, gathers)
    forward = root + gather + (layers - 1) * max(0.0, gather - window(FORWARD, head))
    again, _ = units(BACKWARD, gathers)
    added, root_sum = units(BACKWARD, sums)
    windows = [2 * head, *[window(BACKWARD, 2 * head)] * layers]
    hidden_gathers, hidden_sums = [again] * layers + [0.0], [0.0, 0.0] + [added] * (layers - 1)
    backward = _exposed(hidden_gathers, windows)
    if step.sizes.dp > 1 and not step.cluster.on_gpu:  # FSDP2 needs each sum at once
        last = backward + layers * added + root_sum
    else:
        last = _exposed([sum(both) for both in zip(hidden_gathers, hidden_sums, strict=True)], windows)
        last += added + root_sum
    phases = (FORWARD, BACKWARD)
    for what, exposed, times in ((gathers, count * (forward + backward), count), (sums, last - backward, 1)):
        num_bytes, messages = (sum(summary.of(one, 0, kind, what) for kind in phases) for one in ("bytes", "count"))
        taken = sum(layers * one + other for one, other in (units(kind, what) for kind in phases))
        step.add("fsdp", NAMES[what], num_bytes * times, taken * times, exposed, messages * times)
    return count * (forward + backward) + last - backward


def pipeline_sharding(step: Step, summary: Summary) -> float:
    """The same under a pipeline: weights come with the first micro-batch, gradients are summed after the last one."""
    gathers, sums = NAMES
    phases = [key[1:] for key in summary.numbers if key[0] == "bytes" and key[-1] == sums]
    summed = [sum(summary.of(name, *phase) for phase in phases) for name in ("bytes", "count")]
    gathered = [summary.of(f"step {name}", gathers) for name in ("bytes", "count")]
    exposed = 0.0
    for what, (num_bytes, count) in ((sums, summed), (gathers, gathered)):
        taken = _seconds(step, num_bytes, count, expert_share(step))
        step.add("fsdp", NAMES[what], num_bytes, taken, taken, count)
        exposed += taken
    return exposed


def _exposed(transfers: Sequence[float], windows: Sequence[float]) -> float:
    """Seconds of transfers that go beyond the windows that hide them, one for each."""
    return sum(max(0.0, transfer - window) for transfer, window in zip(transfers, windows, strict=True))


def expert_share(step: Step, root: bool = True) -> float:
    """The experts' share of the bytes of all units, or without the root of the layers'."""
    sizes, counted, model = step.sizes, elements(step.config.model), step.config.model
    experts = counted.experts / sizes.ep * (1 - 1 / sizes.efsdp)
    dense = counted.tp_sharded / sizes.tp + counted.tp_replicated
    if not root:
        counts = count_parameters(model)
        dense -= (counts.embedding + counts.head) / sizes.tp + model.hidden_size
    return experts / max(experts + dense * (1 - 1 / sizes.dense_shards), 1.0)


def _seconds(step: Step, num_bytes: float, count: float, experts: float) -> float:
    """Seconds of collectives of weights or gradients: the share ``experts`` over efsdp, the others over all shards."""
    return sum(
        seconds(step.cluster, group_of(axis, step.sizes), TrafficPattern.ring, num_bytes * part, count * part)
        for axis, part in (("efsdp", experts), ("fsdp", 1 - experts))
    )
