"""What an optimistic step could save at most: a pipeline of two ranks over a link that is slow on purpose.

    sudo .venv/bin/python -m benchmarks.optimistic

Before an update all ranks add their shares of loss, gradient norm and counts, and wait for each other. An optimistic
step updates at once and takes the update back if the sums forbid it. Its gain is at most this wait. Stretches of steps
run in turn: as they are, and without the exchange, each rank going on with its own sums (checks for corruption are off
in both). Printed are the seconds in the exchange, as a share of a step, and the ratio of neighbouring stretches.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common import print_json, print_table
from benchmarks.link import ADDRESSES, DEVICES, inside, set_speed, shaped_link
from longcat.errors import ConfigError

SCHEDULES = ("1f1b", "zbv")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--micro-batches", type=int, default=8, help="of one sequence each")
    parser.add_argument("--mbit", type=float, nargs="+", default=[1000.0, 100.0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of a stretch")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_rank(args: argparse.Namespace) -> None:
    """Steps of both kinds in turn, for each schedule and speed; writes their seconds."""
    import train.step as step_module

    os.environ["GLOO_SOCKET_IFNAME"] = DEVICES[args.rank]
    found: dict[str, list[dict[str, float]]] = {}
    exchanges: list[float] = []
    exchange, pending = step_module.sum_in_one_collective, step_module.PendingSum

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*tensors: Tensor) -> Any:
            start = time.perf_counter()
            try:
                return function(*tensors)
            finally:
                exchanges.append(time.perf_counter() - start)

        return run

    def own_sums(numbers: Tensor, *parts: Tensor) -> list[Tensor]:
        return [numbers.double(), *(part.double() for part in parts)]

    class OwnSums:
        def __init__(self, *parts: Tensor) -> None:
            self.parts = [part.double() for part in parts]

        def wait(self) -> list[Tensor]:
            return self.parts

    variants = {"as it is": (timed(exchange), pending), "without": (own_sums, OwnSums)}
    for schedule in SCHEDULES:
        stepper = build(args, schedule)
        for mbit in args.mbit:
            set_speed(args.rank, mbit)
            dist.barrier()
            rows = found.setdefault(f"{schedule}, {mbit:.0f} Mbit/s", [])
            for number in range(args.rounds + 1):
                row: dict[str, float] = {}
                for name, functions in variants.items():
                    step_module.sum_in_one_collective, step_module.PendingSum = functions  # type: ignore[assignment]
                    exchanges.clear()
                    dist.barrier()
                    start = time.perf_counter()
                    for _ in range(args.steps):
                        stepper.step()
                    dist.barrier()
                    row[name] = (time.perf_counter() - start) / args.steps
                    row["exchange"] = max(row.get("exchange", 0.0), sum(exchanges) / args.steps)
                if number:
                    rows.append(row)
        stepper.state.engine.close()
        dist.destroy_process_group()
    Path(args.out, f"{args.rank}.json").write_text(json.dumps(found))


def build(args: argparse.Namespace, schedule: str) -> Any:
    """A pipeline's training steps on random ids."""
    from parallel.mesh import connect
    from tests.support.running import RandomSamples
    from train.batches import BatchReader
    from train.compose import compose
    from train.run import build_state
    from train.step import Stepper

    torch.set_num_threads(1)
    config = compose(
        [
            f"model={args.model}",
            f"train.sequence_length={args.length}",
            f"train.global_batch_size={args.micro_batches}",
            "train.micro_batch_size=1",
            "train.dtype=float32",
            "parallel.pp=2",
            f"parallel.schedule={schedule}",
            "sdc.every=0",
        ]
    )
    topology = connect(config.parallel)
    state = build_state(config, topology)
    samples: Any = RandomSamples(args.length, config.model.vocab_size)
    return Stepper(state, BatchReader(samples, config, topology), config, topology)


def measure(args: argparse.Namespace) -> list[dict[str, list[dict[str, float]]]]:
    """Run both ranks in their namespaces; each one's rows."""
    words = [f"--{name}={getattr(args, name)}" for name in ("model", "length", "rounds", "steps")]
    words += [f"--micro-batches={args.micro_batches}", "--mbit", *map(str, args.mbit)]
    with tempfile.TemporaryDirectory() as folder, shaped_link():
        ranks = []
        for rank in (0, 1):
            command = [sys.executable, "-m", "benchmarks.optimistic", *words, "--rank", str(rank), "--out", folder]
            variables = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
            variables |= {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29513"}
            ranks.append(subprocess.Popen(inside(rank, command), env=os.environ | variables))
        codes = [process.wait() for process in ranks]
        if any(codes):
            raise SystemExit(f"the ranks ended with {codes}")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in (0, 1)]


def main() -> None:
    args = arguments()
    if args.rank is not None:
        measure_rank(args)
        return
    try:
        ranks = measure(args)
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    table = {}
    for name, rows in ranks[0].items():
        pairs = list(zip(rows, ranks[1][name], strict=True))
        table[name] = {
            "step s": statistics.median(one["as it is"] for one, _ in pairs),
            # The rank that comes last waits for nobody: its time is the exchange's own
            "exchange %": statistics.median(100 * min(a["exchange"], b["exchange"]) / a["as it is"] for a, b in pairs),
            "with waiting %": statistics.median(
                100 * max(a["exchange"], b["exchange"]) / a["as it is"] for a, b in pairs
            ),
            "step without": statistics.median(a["without"] / a["as it is"] for a, _ in pairs),
        }
    columns = list(next(iter(table.values())))
    rows = [[name, *(f"{row[column]:.3f}" for column in columns)] for name, row in table.items()]
    print_table("what the exchange before an update costs", ["", *columns], rows)
    print_json("optimistic", {"model": args.model, "length": args.length, "micro_batches": args.micro_batches, **table})


if __name__ == "__main__":
    main()
