"""What of the experts' exchange is covered: steps of some layers on two local ranks under the `overlap` settings.

    python -m benchmarks.overlap
    python -m benchmarks.overlap --model small --layers 3 --tokens 512 --rounds 7

Forward and backward of ScMoE layers with experts spread over two ranks (ep = 2), float32, each setting in turn. Beside
the time of a step stands the time in which a rank was blocked in waits for exchanges. Over the loopback device a
message takes processor time whoever covers it, so with as many ranks as cores a step cannot lose all that waits lose.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from benchmarks.common import preset, print_json, print_table, seconds_of
from longcat.config import ModelConfig
from longcat.init import fill
from longcat.model import LongCat
from longcat.names import stored_state
from longcat.ops.elementwise import rotary_angles
from parallel import exchange, expert
from parallel.expert import spread_experts
from parallel.mesh import ParallelConfig, Topology, make_topology, resolve_sizes
from parallel.overlap import OverlapConfig, set_overlap
from parallel.sharding import local_part

SETTINGS = {
    "awaited at once": OverlapConfig(enabled=False),
    "experts after ffn": OverlapConfig(),
    "experts after attention": OverlapConfig(experts_after="attention"),
    "awaited at once, 2 chunks": OverlapConfig(enabled=False, num_chunks=2),
    "experts after ffn, 2 chunks": OverlapConfig(num_chunks=2),
    "experts after attention, 2 chunks": OverlapConfig(experts_after="attention", num_chunks=2),
}


class Blocked:
    """Seconds that this rank has spent in waits for exchanges."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def crumb(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start


def spread_layers(config: ModelConfig, topology: Topology) -> LongCat:
    """A model whose layers have values, their experts spread."""
    with torch.device("meta"):
        model = LongCat(config)
    spread_experts(model, topology, "all_to_all")
    for number, layer in enumerate(model.shortcut_layers()):
        layer.to_empty(device="cpu")
        for name, tensor in stored_state(layer):
            local, box = local_part(tensor.detach())
            fill(local, f"layers.{number}.{name}", tuple(tensor.shape), box, config, seed=0)
    return model


def timed(rank: int, port: int, config: ModelConfig, tokens: int, rounds: int, queue: Any) -> None:
    """One rank: all settings in turn; the first rank reports median seconds of a step and in waits."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    topology = make_topology(resolve_sizes(ParallelConfig(ep=2), 2), rank, 2, torch.device("cpu"))
    model, blocked = spread_layers(config, topology), Blocked()
    exchange.crumb = expert.crumb = blocked.crumb  # type: ignore[assignment]
    angles = rotary_angles(torch.arange(tokens), config.qk_rope_head_dim, config.rope_theta)
    x = torch.randn(1, tokens, config.hidden_size, generator=torch.Generator().manual_seed(rank)).requires_grad_()

    def step() -> None:
        y = x
        for layer in model.shortcut_layers():
            y, _ = layer(y, angles)
        y.square().mean().backward()

    took: dict[str, list[tuple[float, float]]] = {name: [] for name in SETTINGS}
    for number in range(rounds + 1):
        for name, setting in SETTINGS.items():
            set_overlap(model, setting, topology)
            dist.barrier()
            blocked.seconds = 0.0
            seconds = seconds_of(step)
            if number:
                took[name].append((seconds, blocked.seconds))
    if rank == 0:
        queue.put({name: tuple(statistics.median(one) for one in zip(*took[name], strict=True)) for name in SETTINGS})
    dist.barrier()
    dist.destroy_process_group()


def run(config: ModelConfig, tokens: int, rounds: int) -> dict[str, tuple[float, float]]:
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=timed, args=(rank, port, config, tokens, rounds, queue), daemon=True) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    answer: dict[str, tuple[float, float]] = queue.get()
    for process in processes:
        process.join()
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="small")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=512, help="of each rank")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    config = preset(args.model)
    config.num_layers = args.layers
    measured = run(config, args.tokens, args.rounds)
    rows = [[name, f"{step * 1e3:.1f}", f"{waits * 1e3:.1f}"] for name, (step, waits) in measured.items()]
    title = f"{args.model}, {args.layers} layers, 2 ranks, {args.tokens} tokens each, float32"
    print_table(title, ["setting", "ms a step", "of it blocked in waits"], rows)
    print_json("overlap", {**vars(args), "seconds": measured})


if __name__ == "__main__":
    main()
