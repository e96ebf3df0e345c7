"""Weak scaling from one rank to two: full training steps, expert parallelism over two ranks, fixed tokens per rank.

Three programs run in turn with one thread per rank: one rank while the other core is idle; two ranks that share the
experts (`parallel.ep=2`, gloo over the loopback device); two independent processes at the same time. The last shows
what two cores reach that share memory bandwidth, cache and clock but no messages. Two ranks may exceed it: each
holds, casts and updates half of the experts, so they share the work of a step that does not depend on its tokens.
Efficiency is tokens per second over twice those of the one rank.

    python -m benchmarks.weak_scaling --batch 4 --length 512
    python -m benchmarks.weak_scaling --set parallel.compile=true parallel.transport=all_gather
    python -m benchmarks.weak_scaling --profile        # also profiles a step, on one rank and on two
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import socket
import statistics
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.common import gemm_gflops, print_json, print_table
from parallel.device import keep_freed_memory
from parallel.mesh import make_topology, resolve_sizes, world_from_environment
from train.batches import BatchReader
from train.compose import compose
from train.run import build_state
from train.step import Stepper

SHOWN = 14  # rows of a profile


class RandomSamples:
    """Sequences of random ids that depend only on the sample's index."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary, self.length = vocabulary, length

    def __getitem__(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(1, self.vocabulary, self.length + 1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help="a preset of configs/model")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=4, help="sequences per rank and step, in one micro-batch")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    parser.add_argument("--steps", type=int, default=2, help="steps per round")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of the configuration")
    parser.add_argument("--profile", action="store_true", help="also profile a step with torch, on one rank and on two")
    return parser.parse_args()


def overrides(args: argparse.Namespace, ranks: int) -> list[str]:
    return [
        f"model={args.model}",
        f"train.dtype={args.dtype}",
        f"train.sequence_length={args.length}",
        f"train.micro_batch_size={args.batch}",
        f"train.global_batch_size={args.batch * ranks}",
        f"parallel.ep={ranks}",
        "schedule.warmup_steps=0",
        *args.set,
    ]


class Training:
    """A stepper as `longcat train` builds it, without data sets, checkpoints and logs."""

    def __init__(self, args: argparse.Namespace, ranks: int) -> None:
        config = compose(overrides(args, ranks))
        rank, _, world_size = world_from_environment()
        topology = make_topology(resolve_sizes(config.parallel, world_size), rank, world_size, torch.device("cpu"))
        state = build_state(config, topology)
        samples = RandomSamples(config.model.vocab_size, args.length)
        reader = BatchReader(samples, config, topology)  # type: ignore[arg-type]
        self.stepper = Stepper(state, reader, config, topology)

    def steps(self, num: int) -> float:
        """Seconds of ``num`` steps."""
        start = time.perf_counter()
        for _ in range(num):
            result = self.stepper.step()
            if not result.healthy:
                raise SystemExit("a step was not finite, so its time is invalid")
        return time.perf_counter() - start

    def peak_gib(self, _: int) -> float:
        """The process's peak memory so far."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def profile(self, _: int) -> list[tuple[str, float, int]]:
        """(operator, self milliseconds, calls) of one step, the largest first."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
            self.steps(1)
        rows = [(one.key, one.self_cpu_time_total / 1e3, one.count) for one in recorded.key_averages()]
        return sorted(rows, key=lambda row: -row[1])[:SHOWN]


def serve(rank: int, ranks: int, port: int, args: argparse.Namespace, tasks: Any, answers: Any) -> None:
    """A rank: builds its training, then runs the methods that it is sent and returns their results."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo")
    training = Training(args, ranks)
    answers.put((rank, None))
    while (task := tasks.get()) is not None:
        method, number = task
        answers.put((rank, getattr(training, method)(number)))


class World:
    """The processes of one world."""

    def __init__(self, ranks: int, args: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.answers = context.Queue()
        self.tasks = [context.Queue() for _ in range(ranks)]
        for rank, tasks in enumerate(self.tasks):
            arguments = (rank, ranks, port, args, tasks, self.answers)
            context.Process(target=serve, args=arguments, daemon=True).start()
        self.collect()

    def start(self, method: str, number: int) -> None:
        for queue in self.tasks:
            queue.put((method, number))

    def collect(self) -> list[Any]:
        return [answer for _, answer in sorted(self.answers.get(timeout=300) for _ in self.tasks)]

    def end(self) -> None:
        for queue in self.tasks:
            queue.put(None)


def ask(worlds: list[World], method: str, number: int) -> list[Any]:
    """The answers of all ranks of all ``worlds``, which run at the same time."""
    for world in worlds:
        world.start(method, number)
    return [answer for world in worlds for answer in world.collect()]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each program's rounds, each the slowest rank's."""
    alone, other, pair = World(1, args), World(1, args), World(2, args)
    programs: dict[str, list[World]] = {
        "1 rank": [alone],
        "2 ranks, ep=2": [pair],
        "2 x 1 rank, apart": [alone, other],
    }
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    rates: list[float] = []
    for number in range(args.rounds + 1):
        rates.append(gemm_gflops(getattr(torch, args.dtype), budget_seconds=0.1))
        for name, worlds in programs.items():
            took = max(ask(worlds, "steps", args.steps))
            if number:  # the first round warms up
                seconds[name].append(took)
    profiles = {}
    if args.profile:
        profiles = {name: ask(worlds, "profile", 1)[0] for name, worlds in programs.items()}
    for world in (alone, other, pair):
        world.end()
    return {"seconds": seconds, "profiles": profiles, "gemm_gflops_of_one_thread": max(rates)}


def efficiencies(seconds: dict[str, list[float]], name: str) -> list[float]:
    """Tokens per second of both ranks over twice those of one, round by round, sorted (equal tokens per rank)."""
    return sorted(one / two for one, two in zip(seconds["1 rank"], seconds[name], strict=True))


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    measured = measure(args)
    seconds, tokens = measured["seconds"], args.batch * args.length * args.steps
    rows, found = [], {}
    for name, times in seconds.items():
        ranks = 1 if name == "1 rank" else 2
        ratios = efficiencies(seconds, name)
        found[name] = {"median": statistics.median(ratios), "range": [ratios[0], ratios[-1]]}
        median = statistics.median(times)
        rows.append(
            [
                name,
                f"{median / args.steps:.3f}",
                f"{ranks * tokens / median:.0f}",
                f"{found[name]['median']:.1%}",
                f"{ratios[0]:.1%} to {ratios[-1]:.1%}",
            ]
        )
    columns = ["program", "s per step", "tokens/s", "efficiency", "rounds"]
    title = f"{args.model}, {args.dtype}, {args.batch} x {args.length} tokens per rank and step, one thread per rank"
    print_table(title, columns, rows)
    share = efficiency_of_exchange(seconds)
    print(f"throughput with ep=2 over that of two independent ranks: {share:.1%}")
    for name, profile in measured["profiles"].items():
        shown = [[operator, f"{took:.1f}", str(calls)] for operator, took, calls in profile]
        print_table(f"one step, {name}, first rank", ["operator", "self ms", "calls"], shown)
    print_json("weak_scaling", {**vars(args), "efficiency": found, "of_ceiling": share, **measured})


def efficiency_of_exchange(seconds: dict[str, list[float]]) -> float:
    """Tokens per second of two ranks with ep=2 over those of two independent ranks: median of the rounds."""
    both = zip(seconds["2 x 1 rank, apart"], seconds["2 ranks, ep=2"], strict=True)
    return statistics.median(apart / together for apart, together in both)


if __name__ == "__main__":
    main()
