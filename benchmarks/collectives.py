"""Bytes between ranks: both token dispatchers, and the schemes of context parallelism.

    python -m benchmarks.collectives               # bytes by formula; both dispatchers timed on 2 and 4 local ranks
    python -m benchmarks.collectives --ranks 2 --tokens 1024 --model small

The floor of a dispatcher is the bytes that a rank must send. The all-to-all sends a token once for each FFN expert on
another rank, K_e·(n-1)/n times each way; all-gather and reduce-scatter send it to all n-1 other ranks, once each way.
So the all-gather sends fewer bytes while n < K_e. The times include dispatch, experts and combine of one MoE layer,
forward and backward, over the loopback device, with exposed communication whose sockets also take CPU time.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from benchmarks.common import preset, print_json, print_table, seconds_of
from longcat.config import ModelConfig
from longcat.init import fill
from longcat.model import LongCat
from longcat.moe import MoE
from longcat.names import stored_state
from parallel.collectives.collective import Collective
from parallel.config import ParallelConfig
from parallel.expert.placement import apply_expert_parallel
from parallel.fsdp.sharding import local_part
from parallel.mesh import make_topology, resolve_sizes

TRANSPORTS = ("all_to_all", "all_gather")


def transport_rows(config: ModelConfig, ranks: int) -> dict[str, float]:
    """Rows of D numbers that a rank sends per token in one direction of the forward, by formula."""
    return {"all_to_all": config.expected_ffn_experts * (ranks - 1) / ranks, "all_gather": ranks - 1.0}


def context_numbers(config: ModelConfig, cp: int) -> dict[str, float]:
    """Numbers that a rank receives per position in the forward of one attention block, by formula."""
    heads, value = config.num_heads, config.v_head_dim
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    others = cp - 1  # ranks, each with as many positions
    return {
        "latents of keys and values (ours)": others * latent,
        "latents to heads, results returned": others * (config.q_lora_rank + latent) + heads * value * others / cp,
        "heads to heads (all-to-all of q, k, v and results)": heads * 2 * (config.qk_head_dim + value) * others / cp,
        "keys and values around a ring": others * heads * (config.qk_head_dim + value),
    }


def one_layer(config: ModelConfig, transport: str, ranks: int) -> MoE:
    """A layer's MoE with this rank's experts and initial values."""
    sizes = resolve_sizes(ParallelConfig(ep=ranks), ranks)
    topology = make_topology(sizes, dist.get_rank(), ranks, torch.device("cpu"))
    with torch.device("meta"):
        model = LongCat(config)
    apply_expert_parallel(model, topology, transport)
    moe: MoE = model.shortcut_layers()[0].mlp.to_empty(device="cpu")
    for name, tensor in stored_state(moe):
        local, box = local_part(tensor)
        fill(local, f"layers.0.mlp.{name}", tuple(tensor.shape), box, config, seed=0)
    return moe


def timed(rank: int, ranks: int, port: int, config: ModelConfig, tokens: int, rounds: int, queue: Any) -> None:
    """One rank: both dispatchers in turn; the first rank reports median seconds and bytes sent for each."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    layers = {transport: one_layer(config, transport, ranks) for transport in TRANSPORTS}
    u = torch.randn(tokens, config.hidden_size, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    seconds: dict[str, list[float]] = {transport: [] for transport in TRANSPORTS}
    sent = dict.fromkeys(TRANSPORTS, 0)
    for number in range(rounds + 1):
        for transport, moe in layers.items():

            def step(moe: MoE = moe) -> None:
                out, _ = moe.combine(moe.compute(moe.dispatch(u)))
                out.sum().backward()

            dist.barrier()
            before = Collective.bytes_sent
            took = seconds_of(step)
            if number:
                seconds[transport].append(took)
            sent[transport] = Collective.bytes_sent - before
    if rank == 0:
        queue.put({name: (statistics.median(seconds[name]), sent[name]) for name in TRANSPORTS})
    dist.barrier()
    dist.destroy_process_group()


def run(ranks: int, config: ModelConfig, tokens: int, rounds: int) -> dict[str, tuple[float, int]]:
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (ranks, port, config, tokens, rounds, queue)
    processes = [context.Process(target=timed, args=(rank, *arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    answer: dict[str, tuple[float, int]] = queue.get()
    for process in processes:
        process.join()
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="small")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--tokens", type=int, default=1024, help="per rank")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    flash = preset("flash")
    rows = [
        [f"n = {n}", *(f"{value:.2f}" for value in transport_rows(flash, n).values())] for n in (2, 4, 8, 16, 32, 64)
    ]
    print_table("rows sent to other ranks per token, one way, flash (K_e = 8)", ["ranks", *TRANSPORTS], rows)
    rows = [
        [name, *(f"{2 * context_numbers(flash, cp)[name] / 1024:.1f}" for cp in (2, 4, 8))]
        for name in context_numbers(flash, 2)
    ]
    print_table(
        "context parallelism, KiB received per position and block, bfloat16, flash", ["", "cp 2", "cp 4", "cp 8"], rows
    )
    config, measured = preset(args.model), {}
    for ranks in args.ranks:
        measured[ranks] = run(ranks, config, args.tokens, args.rounds)
        rows = [[name, f"{sent / 2**20:.2f}", f"{took * 1e3:.1f}"] for name, (took, sent) in measured[ranks].items()]
        columns = ["dispatcher", "MiB sent by rank 0", "ms, forward and backward"]
        print_table(f"{args.model}, {ranks} ranks, {args.tokens} tokens each, float32", columns, rows)
    print_json(
        "collectives", {"model": args.model, "config": asdict(config), "tokens": args.tokens, "measured": measured}
    )


if __name__ == "__main__":
    main()
