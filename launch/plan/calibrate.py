"""Measures what the ranks of a cluster reach, and writes it as a file for `plan.cluster`.

    torchrun --nproc-per-node 2 -m launch.plan.calibrate ours.yaml

All ranks measure at once, as they would train: products, memory, messages among the ranks of a node and between nodes,
and forwards and backwards of a small model with few and with many tokens. These two tell what an operator costs beside
its work, and which part of the measured products and memory traffic a model reaches. The slowest rank's figures are
written.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.plan.cluster import Cluster
from longcat.config import ModelConfig
from longcat.errors import OK, ConfigError, LongCatError
from longcat.init import initialise
from longcat.model import LongCat
from parallel.capacity import host_memory
from parallel.chunks import best_seconds, line
from parallel.config import ParallelConfig
from parallel.device import keep_freed_memory, measured_gemm_rate
from parallel.mesh import connect
from parallel.plan.rates import Rates
from parallel.plan.recorder import AllocationRecorder
from parallel.reduce import max_over_ranks

SIZE = 1024  # of the products; a GPU's are eight times as wide
MESSAGE = 4 << 20  # bytes
SMALL = 4 << 10
SECONDS = 1.0  # of products
MODEL = ModelConfig(
    name="calibration", vocab_size=4096, num_layers=2, hidden_size=128, num_heads=4, q_lora_rank=48, kv_lora_rank=32,
    qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, ffn_hidden_size=256, num_experts=8, num_zero_experts=4,
    top_k=3, expected_ffn_experts=2.0, expert_hidden_size=64, num_mtp_layers=0,
)  # fmt: skip
GPU_MODEL = replace(MODEL, hidden_size=4096, ffn_hidden_size=8192, q_lora_rank=1024, kv_lora_rank=512, num_heads=32,
    qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, expert_hidden_size=2048)  # fmt: skip
FEW, MANY = (1, 16), (2, 256)  # sequences and their positions; a GPU's are eight times as long


def calibrate(name: str) -> Cluster:
    """Measure on all ranks that torchrun started. A collective; this process must have no process group."""
    topology = connect(ParallelConfig())
    device, local = topology.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    on_gpu = device.type == "cuda"
    if not on_gpu:
        keep_freed_memory()
    nodes = topology.world_size // local
    size = 8 * SIZE if on_gpu else SIZE
    bfloat16, float32 = (measured_gemm_rate(device, one, SECONDS, size) for one in (torch.bfloat16, torch.float32))
    memory_rate = _memory_rate(device)
    reached, call = fit(Rates(bfloat16, float32, memory_rate), device)
    own = [1 / bfloat16, 1 / float32, 1 / memory_rate, 1 / reached, call]
    slowest = max_over_ranks(torch.tensor(own, dtype=torch.float64, device=device)).tolist()
    network = inside = None
    if local > 1:
        of_nodes = [dist.new_group(list(range(node * local, (node + 1) * local))) for node in range(nodes)]
        inside = _link(device, of_nodes[topology.rank // local])
    if nodes > 1:
        across = [dist.new_group([node * local + place for node in range(nodes)]) for place in range(local)]
        network = _link(device, across[topology.rank % local])
    inside, network = inside or network, network or inside
    if inside is None or network is None:
        raise ConfigError("messages need two ranks: start at least --nproc-per-node 2, or several nodes")
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else host_memory() / local
    dist.destroy_process_group()
    return Cluster(
        name,
        local,
        memory / 2**30,
        1 / slowest[0],
        1 / slowest[1],
        1 / slowest[2],
        inside[0],
        network[0],
        inside[1],
        network[1],
        products_reached=1 / slowest[3],
        memory_reached=1 / slowest[3],
        links_reached=1.0,
        call=slowest[4],
        reserved_gib=Cluster.reserved_gib if on_gpu else 0.0,
        fragmented=Cluster.fragmented if on_gpu else 0.0,
        on_gpu=on_gpu,
        cores=0 if on_gpu else len(os.sched_getaffinity(0)),
    )


def _memory_rate(device: torch.device) -> float:
    """Bytes per second that a sum of two tensors of 16 MiB reads and writes."""
    a, b = (torch.ones(MESSAGE, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return 3 * a.nbytes / _best(lambda: torch.add(a, b, out=out), device)


@dataclass(frozen=True)
class _Operators(Rates):
    """Keeps each operator's seconds by products and memory alone, as `AllocationRecorder` asks for them."""

    found: list[float] = field(default_factory=list)

    def seconds(self, flops: float, num_bytes: float, dtype: torch.dtype) -> float:
        self.found.append(super().seconds(flops, num_bytes, dtype))
        return 0.0


def fit(rates: Rates, device: torch.device) -> tuple[float, float]:
    """(share of ``rates`` that a model reaches, least seconds of an operator), from steps with few and many tokens.

    The planner says of a step: the sum of max(seconds at the reached rates, least seconds) over its operators. These
    two make it the measured time for both numbers of tokens.
    """
    (few, few_seconds), (many, many_seconds) = (_step(rates, device, shape) for shape in (FEW, MANY))
    reached, call = 1.0, 0.0
    for _ in range(20):  # each has little effect on the other's step
        call = _bisect(partial(_planned, few, 1 / reached), few_seconds, 1e-8, 1e-2)
        reached = 1 / _bisect(partial(_planned, many, call=call), many_seconds, 0.1, 1e4)
    return reached, call


def _planned(operators: Sequence[float], slowness: float, call: float) -> float:
    return sum(max(seconds * slowness, call) for seconds in operators)


def _bisect(function: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Where an ascending function has the value ``wanted``, to a part in 1,000."""
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if function(middle) < wanted else (low, middle)
    return math.sqrt(low * high)


def _step(rates: Rates, device: torch.device, shape: tuple[int, int]) -> tuple[list[float], float]:
    """(each operator's seconds at ``rates``, measured seconds) of a forward and backward."""
    on_gpu = device.type == "cuda"
    config = GPU_MODEL if on_gpu else MODEL
    model = LongCat(config).to(device)
    initialise(model, config, 1)
    model.to(torch.bfloat16)
    tokens = torch.arange(shape[0] * shape[1] * (8 if on_gpu else 1), device=device).view(shape[0], -1)
    tokens = tokens * 7919 % config.vocab_size  # spread over the vocabulary, and so over the experts
    valid = torch.ones_like(tokens, dtype=torch.bool)

    def step() -> None:
        model(tokens, tokens, valid, mtp=False).lm.backward()
        model.zero_grad(set_to_none=True)

    kept = _Operators(rates.bfloat16, rates.float32, rates.memory)
    with AllocationRecorder(kept):
        step()
    return kept.found, _median(step, device)


def _best(action: Callable[[], object], device: torch.device) -> float:
    """The shortest of some runs, about a second's worth."""
    return min(_times(action, device))


def _median(action: Callable[[], object], device: torch.device) -> float:
    """The median of some runs, about a second's worth."""
    return statistics.median(_times(action, device))


def _times(action: Callable[[], object], device: torch.device) -> list[float]:
    found: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(found) < 4 or time.perf_counter() < end:
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return found


def _link(device: torch.device, group: Any) -> tuple[float, float]:
    """(bytes per second that a rank sends to the others of a group, least seconds of a message: `inside_latency`)."""
    size = group.size()

    def exchange(num_bytes: int) -> Callable[[], object]:
        x = torch.zeros(num_bytes // size * size, dtype=torch.uint8, device=device)
        out = torch.empty_like(x)
        return lambda: dist.all_to_all_single(out, x, group=group)

    def mean_seconds(action: Callable[[], object], count: int) -> float:
        action()
        dist.all_reduce(torch.zeros(1, device=device), group=group)
        start = time.perf_counter()
        for _ in range(count):
            action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / count

    # A mean of small ones: in a step too, a message waits until its peers' processes have a core
    own = [
        best_seconds(exchange(MESSAGE), device, group),
        mean_seconds(exchange(SMALL), max(4, round(500 * SECONDS))),
    ]
    whole, small = max_over_ranks(torch.tensor(own, dtype=torch.float64, device=device)).tolist()
    seconds, fixed = line(MESSAGE, whole, SMALL, small)
    return MESSAGE * (size - 1) / size / max(seconds, 1e-9), fixed if device.type == "cuda" else fixed / (size - 1)


def as_yaml(cluster: Cluster) -> str:
    """The file that `plan.cluster` reads."""
    values = asdict(cluster)
    lines = [
        f"{name}: {str(value).lower() if isinstance(value, bool) else f'{value:.6g}'}"
        for name, value in values.items()
        if name != "name"
    ]
    return "\n".join(["# Measured by launch/plan/calibrate.py; the fields of launch/plan/cluster.py", *lines]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", type=Path, help="the file to write; rank 0 does")
    target = parser.parse_args().target
    try:
        found = calibrate(target.stem)
    except LongCatError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if os.environ.get("RANK", "0") == "0":
        target.write_text(as_yaml(found), encoding="utf-8")
        print(f"{target}: use it with plan.cluster={target}")
    return OK


if __name__ == "__main__":
    sys.exit(main())
