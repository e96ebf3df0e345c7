"""Cost of determinism and of the checks for silent data corruption: `python -m benchmarks.sdc` prints two tables.

The first table has hashes beside memcpy, alternating. The second has training steps of two ranks, alternating in one
run: not deterministic, deterministic without checks, with the default checks, with those of the state at rest alone.
It shows the seconds that a rank spends in each kind of check as a share of its step, at ``--tokens`` tokens a rank a
step: such a share resolves a tenth of a per cent, where two step times on a shared machine differ by several. Rows
`every N` are computed from the default's; `period` are the steps until each operator call had its turn, which bound
the delay in which a lasting fault is found. A replay is a forward and backward more: 100 / `sdc.replay_every` %.
`--releases` has the time in which a gathered parameter is compared, by the number of its owners, in place of these.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import xxhash

from benchmarks.common import alternate, print_json, print_table
from longcat.ops.calls import set_observer
from parallel.checksum import digest, keyed_sum
from parallel.device import keep_freed_memory, make_deterministic
from parallel.mesh import connect
from parallel.sdc.ledger import LEDGER
from parallel.torch_internals import start_fake_world
from tests.support.distributed import run_ranks
from tests.support.gathered_units import gathered_unit
from tests.support.running import RandomSamples
from train.batches import BatchReader
from train.checkpoint.state_hash import bits, hash_range
from train.compose import compose
from train.run import build_state
from train.step import Stepper

MIB = 1 << 20
NEVER = 1 << 30
# name → deterministic, every, at_rest
VARIANTS = {
    "not deterministic": (False, 0, False),
    "off": (True, 0, False),
    "default": (True, 1, True),
    "at rest": (True, NEVER, True),
}
COMPUTED = {"every 4": 4, "every 16": 16, "every 64": 64}
KINDS = ("at rest", "gathered weights", "messages", "operators", "verdict")


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
    import train.sdc.guard as guard

    for module, kind in ((gathered, "gathered weights"), (ledger, "messages")):
        for name in ("digest", "digests"):
            setattr(module, name, timer.around(kind, getattr(module, name)))
    ledger.LEDGER.cells = timer.around("messages", ledger.LEDGER.cells)  # type: ignore[method-assign]
    guard.checksums = timer.around("at rest", guard.checksums)  # type: ignore[attr-defined]
    stepper.guard.judge = timer.around("verdict", stepper.guard.judge)  # type: ignore[method-assign]
    operators = stepper.guard.operators
    operators.recomputer._repeat = timer.around(  # type: ignore[method-assign]
        "operators", operators.recomputer._repeat
    )
    assert operators.update is not None
    operators.update.before = timer.around("operators", operators.update.before)  # type: ignore[method-assign]
    operators.update.after = timer.around("operators", operators.update.after)  # type: ignore[method-assign]


def choose(stepper: Stepper, deterministic: bool, every: int, at_rest: bool) -> None:
    """Set what the next step does."""
    torch.use_deterministic_algorithms(False)
    if deterministic:
        make_deterministic()
    guard = stepper.guard
    guard.config.every, guard.checks_state = every, at_rest
    assert guard.operators.update is not None
    guard.operators.recomputer.every = guard.operators.update.every = every
    if not every:
        set_observer(None)
    guard.state.checksums = None
    guard.begin_step(guard.step)


def train(words: list[str], rounds: int) -> list[dict[str, Any]]:
    """Steps on this rank, one of each variant in turn: seconds of the step and of each kind of check."""
    config = compose(words)
    topology = connect(config.parallel)
    keep_freed_memory()
    make_deterministic()
    state = build_state(config, topology)
    samples: Any = RandomSamples(config.train.sequence_length, config.model.vocab_size)
    stepper = Stepper(state, BatchReader(samples, config, topology), config, topology)
    timer = Timer()
    install(timer, stepper)
    stepper.step()
    found = []
    for _ in range(rounds):
        for name, variant in VARIANTS.items():
            choose(stepper, *variant)
            timer.take()
            torch.distributed.barrier()
            start = time.perf_counter()
            stepper.step()
            seconds = time.perf_counter() - start
            calls = stepper.guard.operators.recomputer.period
            found.append({"variant": name, "step": seconds, "calls": calls, **timer.take()})
    torch.distributed.destroy_process_group()
    return found


def release_times(owners: int, as_on_gpu: bool, rounds: int) -> tuple[float, float]:
    """Milliseconds, on one thread, to release a gathered parameter of 4096 x 1024 bfloat16 and to sum its cells."""
    import parallel.sdc.gathered as gathered

    torch.set_num_threads(1)
    plain = gathered.digest, gathered.digests
    if as_on_gpu:
        gathered.digest, gathered.digests = (partial(one, as_on_gpu=True) for one in plain)  # type: ignore[assignment]
    start_fake_world(0, owners)
    unit, weights = gathered_unit({"weight": (4096, 1024)}, torch.bfloat16), gathered.GatheredWeights()
    seconds: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        LEDGER.begin(0, 1, recording=True)
        start = time.perf_counter()
        weights._release(unit)
        middle = time.perf_counter()
        LEDGER.cells(owners)
        seconds.append((middle - start, time.perf_counter() - middle))
    torch.distributed.destroy_process_group()
    gathered.digest, gathered.digests = plain
    releases, cells = zip(*seconds[1:], strict=True)
    return 1e3 * statistics.median(releases), 1e3 * statistics.median(cells)


def print_releases(rounds: int) -> None:
    """The table of `--releases`."""
    found = [
        [name, owners, *release_times(owners, as_on_gpu, rounds)]
        for name, as_on_gpu in (("XXH3", False), ("keyed sum (GPUs')", True))
        for owners in (8, 64, 1024)
    ]
    columns = ["checksum", "owners", "release ms", "cells ms"]
    print_table(
        "8 MiB of a parameter", columns, [[str(row[0]), str(row[1]), *(f"{x:.2f}" for x in row[2:])] for row in found]
    )
    print_json("sdc_release", {"columns": columns, "rows": found})


def rows(measured: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Variant → seconds of a step, per cent of it in each kind of check, and until when a lasting fault is found."""

    def of(variant: str) -> list[dict[str, Any]]:
        return [one for one in measured if one["variant"] == variant]

    def share(variant: str, kind: str) -> float:
        return statistics.median(100 * one.get(kind, 0.0) / one["step"] for one in of(variant))

    calls = max(one["calls"] for one in of("default"))
    table: dict[str, dict[str, float]] = {}
    for name in VARIANTS:
        shares = {kind: share(name, kind) for kind in KINDS}
        pairs = zip(of(name), of("off"), strict=True)
        table[name] = {
            "step s": statistics.median(one["step"] for one in of(name)),
            "to off": statistics.median(one["step"] / off["step"] for one, off in pairs),
            **shares,
            "all %": sum(shares.values()),
            "period": calls if name == "default" else float("nan"),
        }
    default = table["default"]
    for name, every in COMPUTED.items():
        shares = {kind: default[kind] / (1 if kind == "at rest" else every) for kind in KINDS}
        nan = {"step s": float("nan"), "to off": float("nan")}
        table[name] = {**nan, **shares, "all %": sum(shares.values()), "period": calls * every}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", default="small")
    parser.add_argument("--tokens", type=int, default=13312, help="a rank a step")
    parser.add_argument("--micro-batch-tokens", type=int, default=6656)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--releases", action="store_true", help="only time releases by their number of owners")
    arguments = parser.parse_args()
    if arguments.releases:
        return print_releases(50 * arguments.rounds)
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
        [[name, *("" if math.isnan(x) else f"{x:.2f}" for x in row.values())] for name, row in table.items()],
    )
    settings = {key: vars(arguments)[key] for key in ("ranks", "model", "tokens", "micro_batch_tokens", "rounds")}
    found = {name: {key: x for key, x in row.items() if not math.isnan(x)} for name, row in table.items()}
    print_json("sdc", {**settings, "xxhash": xxhash.VERSION, "gb_per_second": speeds, "table": found})


if __name__ == "__main__":
    main()
