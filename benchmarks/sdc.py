"""Cost of the checks for silent data corruption: `python -m benchmarks.sdc` prints two tables and a JSON line.

The first table has hashes beside memcpy, alternating. The second has training steps of two ranks with checks on, off
and in between, alternating in one run: the seconds that a rank spends in checksums, as a share of its step, at
``--tokens`` tokens a rank a step. A share of measured seconds resolves a tenth of a per cent where two step times on a
shared machine differ by several.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import xxhash

from benchmarks.common import alternate, print_json, print_table
from parallel.checksum import digest, keyed_sum
from parallel.mesh import connect
from tests.support.distributed import run_ranks
from tests.support.running import RandomSamples
from train.batches import BatchReader
from train.checkpoint.state_hash import bits, hash_range
from train.compose import compose
from train.run import build_state
from train.step import Stepper

MIB = 1 << 20
# name → every, at_rest
NEVER = 1 << 30
VARIANTS = {
    "off": (0, False),
    "default": (1, True),
    "every 4": (4, True),
    "every 16": (16, True),
    "at rest": (NEVER, True),
}


def hash_speeds(num_bytes: int, rounds: int) -> dict[str, float]:
    """GB/s of memcpy and of each hash, the median of alternating rounds on one thread."""
    torch.set_num_threads(1)
    x = torch.randn(num_bytes // 4)
    target, words, matrix = torch.empty_like(x), bits(x), x.view(torch.int64).view(-1, 1024)
    keys = torch.randint(-(1 << 62), 1 << 62, (1024,)) | 1
    programs: dict[str, Callable[[], Any]] = {
        "memcpy": lambda: target.copy_(x),
        "checksum (XXH3)": lambda: digest(x),
        "integer mv over pairs": lambda: torch.mv(matrix, keys),
        "keyed sum (GPUs')": lambda: keyed_sum(x),
        "state hash": lambda: hash_range(words, 0),
    }
    found = alternate(programs, rounds)
    return {name: num_bytes / found[name].median / 1e9 for name in programs}


class Timer:
    """Seconds spent in checksums, by who asked."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **keywords)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

        return timed

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, {}
        return taken


def install(timer: Timer, stepper: Stepper) -> None:
    """Time what the checks do in a step."""
    import parallel.sdc.gathered as gathered
    import parallel.sdc.ledger as ledger

    guard = stepper.guard
    gathered.digest = timer.around("gathered weights", gathered.digest)  # type: ignore[attr-defined]
    ledger.digest = timer.around("messages", ledger.digest)  # type: ignore[attr-defined]
    guard.numbers = timer.around("at rest", guard.numbers)  # type: ignore[method-assign]
    guard.end_step = timer.around("at rest", guard.end_step)  # type: ignore[method-assign]
    guard.judge = timer.around("verdict", guard.judge)  # type: ignore[method-assign]


def train(words: list[str], rounds: int) -> list[dict[str, Any]]:
    """Steps on this rank, one of each variant in turn: seconds of the step and of each kind of check."""
    config = compose(words)
    topology = connect(config.parallel)
    state = build_state(config, topology)
    samples: Any = RandomSamples(config.train.sequence_length, config.model.vocab_size)
    stepper = Stepper(state, BatchReader(samples, config, topology), config, topology)
    timer = Timer()
    install(timer, stepper)
    stepper.step()
    found = []
    for _ in range(rounds):
        for name, (every, at_rest) in VARIANTS.items():
            if every not in (0, 1, NEVER):
                continue  # a mean of two others: see `rows`
            guard = stepper.guard
            guard.config.every, guard.checks_state = every, at_rest
            state.checksums = None
            guard.begin_step(guard.step)
            timer.take()
            start = time.perf_counter()
            stepper.step()
            found.append({"variant": name, "step": time.perf_counter() - start, **timer.take()})
    torch.distributed.destroy_process_group()
    return found


def rows(measured: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Variant → seconds of a step, and per cent of it in each kind of check; the worst case of noticing, in steps."""
    kinds = ("at rest", "gathered weights", "messages", "verdict")

    def share(variant: str, kind: str) -> float:
        return statistics.median(
            100 * one.get(kind, 0.0) / one["step"] for one in measured if one["variant"] == variant
        )

    table: dict[str, dict[str, float]] = {}
    for name, (every, at_rest) in VARIANTS.items():
        full = {kind: share("default", kind) for kind in kinds}
        part = 0.0 if every in (0, NEVER) else 1 / every
        shares = {kind: full[kind] * (float(at_rest) if kind == "at rest" else part) for kind in kinds}
        if name in ("off", "default", "at rest"):
            shares = {kind: share(name, kind) for kind in kinds}
        steps = [one["step"] for one in measured if one["variant"] == name]
        table[name] = {
            "step s": statistics.median(steps) if steps else float("nan"),
            **shares,
            "all": sum(shares.values()),
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", default="small")
    parser.add_argument("--tokens", type=int, default=13312, help="a rank a step")
    parser.add_argument("--micro-batch-tokens", type=int, default=6656)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    speeds = hash_speeds(64 * MIB, 9)
    length = 512
    words = [
        f"model={arguments.model}",
        f"train.sequence_length={length}",
        f"train.global_batch_size={arguments.tokens // length * arguments.ranks}",
        f"train.micro_batch_size={arguments.micro_batch_tokens // length}",
        f"parallel.fsdp={arguments.ranks}",
        f"parallel.ep={arguments.ranks}",
        "train.dtype=float32",
    ]
    measured = run_ranks(train, arguments.ranks, words, arguments.rounds, timeout=3600)
    table = rows(measured[0])
    print_table("hashes, 64 MiB, one thread", ["", "GB/s"], [[name, f"{speed:.1f}"] for name, speed in speeds.items()])
    columns = list(next(iter(table.values())))
    print_table(
        f"checks at {arguments.tokens} tokens a rank a step, % of the step",
        ["sdc", *columns],
        [[name, *(f"{row[column]:.2f}" for column in columns)] for name, row in table.items()],
    )
    settings = {key: vars(arguments)[key] for key in ("ranks", "model", "tokens", "micro_batch_tokens", "rounds")}
    print_json("sdc", {**settings, "xxhash": xxhash.VERSION, "gb_per_second": speeds, "per_cent": table})


if __name__ == "__main__":
    main()
