"""What `train.elastic_bits` costs: steps beside ordinary ones in turn, its parts, and sums of int64 beside a tree.

Three programs of two ranks (fsdp 2, one thread each, gloo) take turns on the same global batch: without the key, with N
= 2 (one virtual rank per rank) and with N = 4 (two turns). Each has processes of its own, so their peak memory can be
compared. The parts run in one process on a tensor of 16M elements: gradient norms, AdamW, and the sum of four
gradients in rank order, as a tree, and as int64 multiples of 2^-56, whose order does not matter.

    python -m benchmarks.elastic --model small --batch 2 --length 512
    python -m benchmarks.elastic --parts-only
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common import alternate, print_json, print_table
from benchmarks.weak_scaling import World
from parallel.collectives.point_to_point import tree_sum
from parallel.elastic import exact_squares, update_tails
from parallel.torch_internals import foreach_norms
from train.optimizer import OptimConfig, make_adamw

PROGRAMS = {"off": 0, "N = 2": 2, "N = 4, two turns": 4}
ELEMENTS = 1 << 24
SUMMED = 4
TILE = 65_536
UNIT = 2.0**-56


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help="a preset of configs/model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=2, help="sequences of a micro-batch; each rank has two of them")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    parser.add_argument("--steps", type=int, default=1, help="steps per round")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of the configuration")
    parser.add_argument("--parts-only", action="store_true", help="leave the steps out")
    return parser.parse_args()


def steps(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each program's rounds, the slower rank's, and its peak memory."""
    worlds = {name: World(2, words(args, number)) for name, number in PROGRAMS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in worlds}
    for number in range(args.rounds + 1):
        for name, world in worlds.items():
            world.start("steps", args.steps)
            took = max(world.collect())
            if number:  # the first round warms up
                seconds[name].append(took / args.steps)
    peaks = {}
    for name, world in worlds.items():
        world.start("peak_gib", 0)
        peaks[name] = max(world.collect())
        world.end()
    medians = {name: statistics.median(rounds) for name, rounds in seconds.items()}
    ratios = {
        name: statistics.median(one / off for one, off in zip(rounds, seconds["off"], strict=True))
        for name, rounds in seconds.items()
    }
    print_table(
        f"{args.model}, 2 ranks, 4 micro-batches of {args.batch} × {args.length} tokens a step",
        ["train.elastic_bits", "s per step", "over off (median of rounds)", "peak GiB per rank"],
        [[name, f"{medians[name]:.3f}", f"{ratios[name]:.3f}", f"{peaks[name]:.2f}"] for name in worlds],
    )
    return {"seconds": seconds, "peak_gib": peaks, "over_off": ratios}


def words(args: argparse.Namespace, elastic_bits: int) -> argparse.Namespace:
    """The arguments of `benchmarks.weak_scaling` for two ranks with two micro-batches each."""
    changed = copy.copy(args)
    changed.batch = args.batch * 2
    changed.set = [
        *("parallel.ep=1", "parallel.fsdp=2", f"train.micro_batch_size={args.batch}"),
        f"train.elastic_bits={elastic_bits}",
        *args.set,
    ]
    return changed


def in_rank_order(parts: list[Tensor], out: Tensor) -> None:
    torch.add(parts[0], parts[1], out=out)
    for part in parts[2:]:
        out += part


def to_integers(values: Tensor) -> Tensor:
    """Multiples of 2^-56, as a rank would send them."""
    return values.double().mul_(1 / UNIT).round_().to(torch.int64)


def in_tiles_of_integers(own: Tensor, received: list[Tensor], out: Tensor) -> None:
    """Σ of this rank's part and of int64 parts of the others, in tiles that stay in the cache."""
    tiles = zip(out.split(TILE), own.split(TILE), *(part.split(TILE) for part in received), strict=True)
    for tile, mine, *others in tiles:
        total = to_integers(mine)
        for other in others:
            total += other
        tile.copy_(total.double().mul_(UNIT))


def parts() -> dict[str, Any]:
    """Milliseconds on 16M elements, in turn."""
    gradient = torch.randn(ELEMENTS) * 1e-3
    terms = [torch.randn(ELEMENTS) * 1e-3 for _ in range(SUMMED)]
    out = torch.empty(ELEMENTS)
    parameters = [torch.nn.Parameter(shard.clone()) for shard in torch.randn(ELEMENTS - 5).split(1 << 20)]
    optimizer = make_adamw([{"params": parameters, "role": "hidden"}], OptimConfig())
    for one in parameters:
        optimizer.state[one] = {
            "step": torch.zeros(()),
            **{kind: torch.zeros_like(one) for kind in ("exp_avg", "exp_avg_sq")},
        }
        one.grad = torch.randn_like(one)
    programs: dict[str, Callable[[], Any]] = {
        "norm of shards": partial(foreach_norms, [gradient]),
        "norm of integers": partial(exact_squares, {0: [gradient]}, 1),
        "AdamW": optimizer.step,
        "AdamW, tails again": partial(update_tails, optimizer),
        "sum of 4 in rank order": partial(in_rank_order, terms, out),
        "sum of 4 as a tree": lambda: tree_sum(terms, SUMMED),
        "sum of 4 as int64": partial(in_tiles_of_integers, terms[0], [to_integers(term) for term in terms[1:]], out),
    }
    results = alternate(programs, 7)
    rows = [[name, f"{one.median * 1e3:.1f}", f"{min(one.seconds) * 1e3:.1f}"] for name, one in results.items()]
    print_table("parts, 16M float32 elements, one thread", ["part", "median ms", "least ms"], rows)
    return {name: one.seconds for name, one in results.items()}


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found: dict[str, Any] = {"arguments": vars(args), "parts": parts()}
    dist.destroy_process_group()
    if not args.parts_only:
        found |= steps(args)
    print_json("elastic", found)


if __name__ == "__main__":
    multiprocessing.freeze_support()
    main()
