"""Measures what the ranks of a cluster reach, and writes it as a file for `plan.cluster`.

    torchrun --nproc-per-node 2 -m launch.plan.calibrate ours.yaml

All ranks measure at once, as they would train: products, memory, calls of small operators, and messages among the ranks
of a node and between nodes. The slowest rank's figures are written.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
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
ONE_A_CALL = Rates(float("inf"), float("inf"), float("inf"), call=1.0)
# All tensors are small, so that a step is calls and nothing else
CALLS = ModelConfig(
    name="calls", vocab_size=32, num_layers=2, hidden_size=32, num_heads=2, q_lora_rank=16, kv_lora_rank=16,
    qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, ffn_hidden_size=32, num_experts=4, num_zero_experts=2,
    top_k=2, expected_ffn_experts=1.0, expert_hidden_size=16, num_mtp_layers=0,
)  # fmt: skip


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
    own = [1 / bfloat16, 1 / float32, 1 / _memory_rate(device), _call_seconds(device)]
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
        products_reached=1.0,
        memory_reached=1.0,
        links_reached=1.0,
        call=slowest[3],
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


def _call_seconds(device: torch.device) -> float:
    """Seconds of one operator of a model whose tensors are all small, the code around it included."""
    model = LongCat(CALLS).to(device)
    initialise(model, CALLS, 1)
    tokens = torch.zeros(1, 16, dtype=torch.int64, device=device)
    valid = torch.ones_like(tokens, dtype=torch.bool)

    def step() -> None:
        model(tokens, tokens, valid, mtp=False).lm.backward()
        model.zero_grad(set_to_none=True)

    with AllocationRecorder(ONE_A_CALL) as recorder:
        step()
    calls = sum(work.seconds for work in recorder.phases.values())
    return _best(step, device) / calls


def _best(action: Callable[[], object], device: torch.device) -> float:
    """The shortest of some runs, about a second's worth."""
    found: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(found) < 4 or time.perf_counter() < end:
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found)


def _link(device: torch.device, group: Any) -> tuple[float, float]:
    """(bytes per second that a rank sends to the others of a group, seconds that a message takes at least)."""
    size = group.size()

    def exchange(num_bytes: int) -> Callable[[], object]:
        x = torch.zeros(num_bytes // size * size, dtype=torch.uint8, device=device)
        out = torch.empty_like(x)
        return lambda: dist.all_to_all_single(out, x, group=group)

    own = [best_seconds(exchange(count), device, group) for count in (MESSAGE, SMALL)]
    whole, small = max_over_ranks(torch.tensor(own, dtype=torch.float64, device=device)).tolist()
    seconds, fixed = line(MESSAGE, whole, SMALL, small)
    return MESSAGE * (size - 1) / size / max(seconds, 1e-9), fixed


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
