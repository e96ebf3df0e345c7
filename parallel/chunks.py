"""`overlap.num_chunks=auto`: the number of chunks of a micro-batch's tokens, from rates measured at the start."""

# T tokens of a micro-batch on a rank, D width, E local experts

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from longcat.config import ModelConfig
from longcat.counts import count_parameters
from longcat.ops.grouped import grouped_product
from longcat.ops.matmul import product
from parallel.config import DispatcherKind
from parallel.mesh import Topology
from parallel.reduce import max_over_ranks
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import wait_span

CANDIDATES = (1, 2, 4, 8)
SMALL = 8  # a second measurement takes this part of the rows, which tells fixed cost from rate
GAIN = 0.02  # more chunks must save this share of a layer: predictions are no better
REPEATS = 3
BACKWARD = 2.0  # computing of a backward over that of a forward: gradients of inputs and of weights


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one layer's forward or backward on the slowest rank, all tokens of a micro-batch."""

    message: float  # sending all rows to their experts; sending the results back takes as long
    per_message: float  # what each message costs beside its size
    experts: float  # the experts' products over all rows
    per_call: float  # what each call of the experts costs beside its size
    before: float  # compute between the start of dispatch and the experts
    after: float  # compute between the experts and the end of combine


@dataclass(frozen=True)
class ChunkChoice:
    """The number of chunks, and what it was chosen from."""

    num_chunks: int
    times: LayerTimes
    link: float  # bytes per second that a rank sends
    rate: float  # FLOP/s of the experts' products

    def __str__(self) -> str:
        exposed = 100 * exposed_share(self.num_chunks, self.times)
        return (
            f"auto measured {self.num_chunks} (link {self.link / 1e9:.2f} GB/s, experts {self.rate / 1e9:,.0f} "
            f"GFLOP/s; {exposed:.0f} % of a layer waits)"
        )

    def as_mapping(self) -> dict[str, Any]:
        """For config.yaml."""
        rates = {"link_gb_per_second": self.link / 1e9, "experts_gflops": self.rate / 1e9}
        return {"measured_choice": self.num_chunks, **rates, "layer_seconds": asdict(self.times)}


def layer_seconds(num_chunks: int, times: LayerTimes) -> float:
    """A layer's forward, from the start of dispatch to the end of combine, as `MoE` runs it; or its backward.

    The chunks' messages follow each other on the link; experts take a chunk when it has come and the chunk before is
    done; its results travel while the next one is computed.
    """
    message = times.message / num_chunks + times.per_message
    experts = times.experts / num_chunks + times.per_call
    arrived, computed = 0.0, times.before
    sent_back = num_chunks * message  # all rows are on their way before the first results
    for _ in range(num_chunks):
        arrived += message
        computed = max(computed, arrived) + experts
        sent_back = max(sent_back, computed) + message
    return max(computed + times.after, sent_back)


def backward_of(times: LayerTimes, factor: float = BACKWARD) -> LayerTimes:
    """The backward of a forward: gradients of the results travel first, and what was computed last comes first.

    The messages are as long as the forward's, with a third short one, the gates' gradients; computing takes ``factor``
    times as long.
    """
    experts, per_call = times.experts * factor, times.per_call * factor
    before, after = times.after * factor, times.before * factor
    return LayerTimes(times.message, 1.5 * times.per_message, experts, per_call, before, after)


def waiting_seconds(num_chunks: int, times: LayerTimes) -> float:
    """The seconds of a forward or backward in which nothing is computed."""
    busy = times.before + times.experts + num_chunks * times.per_call + times.after
    return max(0.0, layer_seconds(num_chunks, times) - busy)


def both_seconds(num_chunks: int, times: LayerTimes) -> float:
    """A layer's forward and backward."""
    return layer_seconds(num_chunks, times) + layer_seconds(num_chunks, backward_of(times))


def exposed_share(num_chunks: int, times: LayerTimes) -> float:
    """The share of a layer's forward and backward in which nothing is computed."""
    waiting = waiting_seconds(num_chunks, times) + waiting_seconds(num_chunks, backward_of(times))
    return waiting / both_seconds(num_chunks, times)


def choose_chunks(times: LayerTimes, num_tokens: int) -> int:
    """The fewest chunks, of 1, 2, 4 and 8, that no larger number beats by 2 % of a layer's forward and backward."""
    seconds = {count: both_seconds(count, times) for count in CANDIDATES if count <= num_tokens}
    return min(
        count
        for count, own in seconds.items()
        if all(other >= own * (1 - GAIN) for larger, other in seconds.items() if larger > count)
    )


def measure_chunks(
    model: ModelConfig,
    kind: DispatcherKind,
    topology: Topology,
    num_tokens: int,
    sequence_length: int,
    dtype: torch.dtype,
    after_attention: bool,
) -> ChunkChoice:
    """Time an exchange and the products of one layer at their real sizes, with equal loads. A collective of all ranks.

    Args:
        num_tokens: T, of a micro-batch on this rank.
        after_attention: as `overlap.experts_after`.
    """
    ep = topology.sizes.ep
    group, device = topology.expert_exchange, topology.device
    computed = max(1, round(num_tokens * model.expected_ffn_experts))  # rows of this rank's experts
    rows = max(ep, (computed if kind == DispatcherKind.all_to_all else num_tokens) // ep * ep)
    few = max(ep, rows // SMALL // ep * ep)

    def exchange(count: int) -> Callable[[], object]:
        x = torch.zeros(count, model.hidden_size, dtype=dtype, device=device)
        if kind == DispatcherKind.all_to_all:
            out = torch.empty_like(x)
            return lambda: dist.all_to_all_single(out, x, group=group)
        every = x.new_empty(ep * count, model.hidden_size)
        return lambda: dist.all_gather_into_tensor(every, x, group=group)

    experts = model.num_experts // ep
    hidden, width = model.expert_hidden_size, model.hidden_size
    gate_up = torch.randn(experts, width, 2 * hidden, dtype=dtype, device=device)
    down = torch.randn(experts, hidden, width, dtype=dtype, device=device)

    def apply_experts(count: int) -> Callable[[], object]:
        x = torch.randn(count, width, dtype=dtype, device=device)
        ends = (torch.arange(1, experts + 1, device=device) * count // experts).to(torch.int32)
        return lambda: grouped_product(grouped_product(x, gate_up, ends)[:, :hidden], down, ends)

    def ffn() -> Callable[[], object]:
        x = torch.randn(num_tokens, width, dtype=dtype, device=device)
        gate_up = torch.randn(width, 2 * model.ffn_hidden_size, dtype=dtype, device=device)
        down = torch.randn(model.ffn_hidden_size, width, dtype=dtype, device=device)
        return lambda: product(product(x, gate_up)[:, : model.ffn_hidden_size], down)

    fewer = max(1, computed // SMALL)
    with wait_span(Event(SpanKind.MAXIMUM)):
        measured = [
            best_seconds(action, device, group)
            for action in (exchange(rows), exchange(few), apply_experts(computed), apply_experts(fewer), ffn())
        ]
    whole, small, products, small_products, dense = max_over_ranks(torch.tensor(measured, dtype=torch.float64)).tolist()
    message, per_message = line(rows, whole, few, small)
    experts_seconds, per_call = line(computed, products, fewer, small_products)
    counts = count_parameters(model)
    scores = model.num_heads * (model.qk_head_dim + model.v_head_dim) * (sequence_length + 1) / 2
    attention = dense * (counts.attention + scores) / counts.dense_ffn  # at the rate of the dense FFN
    before, after = (dense + attention, dense) if after_attention else (dense, attention + dense)
    times = LayerTimes(message, per_message, experts_seconds, per_call, before, after)
    others = (ep - 1) / ep if kind == DispatcherKind.all_to_all else ep - 1
    sent = rows * width * torch.empty(0, dtype=dtype).element_size() * others
    flops = 6 * computed * width * hidden
    return ChunkChoice(choose_chunks(times, num_tokens), times, sent / whole, flops / products)


def best_seconds(action: Callable[[], object], device: torch.device, group: dist.ProcessGroup) -> float:
    """The shortest of some runs after one that is not timed; the ranks of the group start together."""
    found = []
    for _ in range(REPEATS + 1):
        dist.all_reduce(torch.zeros(1, device=device), group=group)
        _finish(device)
        start = time.perf_counter()
        action()
        _finish(device)
        found.append(time.perf_counter() - start)
    return min(found[1:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def line(size: int, seconds: float, small_size: int, small_seconds: float) -> tuple[float, float]:
    """(seconds without the fixed cost, fixed cost) of the straight line through two measurements."""
    if small_size >= size:
        return seconds, 0.0
    slope = max(0.0, (seconds - small_seconds) / (size - small_size))
    fixed = max(0.0, min(small_seconds, seconds - slope * size))
    return seconds - fixed, fixed
