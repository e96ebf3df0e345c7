"""Helpers of the benchmarks: GEMM rates, alternating rounds, peak memory, tables and the JSON line."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import torch

from longcat.config import ModelConfig
from longcat.errors import ConfigError, LongCatError

PRESETS = Path(__file__).resolve().parent.parent / "configs" / "model"


@dataclass
class Rounds:
    """Results of one program in alternating rounds: seconds per round, and peak memory above the start."""

    seconds: list[float]
    peak_gib: float | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run a program's ``main`` and exit with its code; a wrong key or input is one line and the code of its kind."""
    try:
        raise SystemExit(main())
    except LongCatError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise() -> None:
    """Wait for the GPU, if there is one: kernels run asynchronously, so a timer must wait for them."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(program: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    synchronise()
    start = time.perf_counter()
    program()
    synchronise()
    return time.perf_counter() - start


def gemm_gflops(dtype: torch.dtype, budget_seconds: float = 1.0) -> float:
    """GFLOP/s of a square GEMM with torch's current threads: the median over ``budget_seconds``.

    The size grows from 256 until one product takes 5 ms (or 4096 is reached): small enough for a CPU without
    instructions for the dtype, large enough for one with them. Model FLOP/s over this rate is the utilisation.
    """
    size, seconds = 256, 0.0
    while size < 4096 and seconds < 0.005:
        a, b = (torch.randn(size, size, device=device()).to(dtype) for _ in range(2))
        seconds = min(_matmul_seconds(a, b) for _ in range(2))
        size *= 2 if seconds < 0.005 else 1
    a, b = (torch.randn(size, size, device=device()).to(dtype) for _ in range(2))
    deadline = time.perf_counter() + budget_seconds
    times = [_matmul_seconds(a, b)]
    while time.perf_counter() < deadline:
        times.append(_matmul_seconds(a, b))
    return 2 * size**3 / statistics.median(times) / 1e9


def _matmul_seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    return seconds_of(lambda: torch.matmul(a, b))


def peak_memory_gib(program: Callable[[], Any]) -> float | None:
    """Peak memory of one call above what was held before, in GiB; None where it cannot be measured."""
    if torch.cuda.is_available():
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        program()
        synchronise()
        return (torch.cuda.max_memory_allocated() - held) / 2**30
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    _give_freed_memory_back()
    before = resident_gib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to the current size
    program()
    return resident_gib("VmHWM") - before


def _give_freed_memory_back() -> None:
    """Make the C library return freed memory to the system, or it would hide this call's allocations."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident_gib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 2**20
    raise KeyError(f"/proc/self/status has no {key}")


def alternate(
    programs: Mapping[str, Callable[[], Any]], rounds: int, between: Callable[[], Any] = lambda: None
) -> dict[str, Rounds]:
    """Run the programs in turn (A B A B ...), once to warm up, then ``rounds`` times, each after ``between``.

    A machine that slows down for a while then slows all of them, so the ratio of two neighbouring times is more
    reliable than the ratio of two separate runs.
    """
    peaks = {name: peak_memory_gib(program) for name, program in programs.items()}
    results = {name: Rounds([], peaks[name]) for name in programs}
    for _ in range(rounds):
        between()
        for name, program in programs.items():
            results[name].seconds.append(seconds_of(program))
    return results


def pairwise_ratios(slow: Rounds, fast: Rounds) -> list[float]:
    """How many times faster ``fast`` was than ``slow``, round by round, sorted."""
    return sorted(a / b for a, b in zip(slow.seconds, fast.seconds, strict=True))


def preset(name: str) -> ModelConfig:
    """The sizes of configs/model/<name>.yaml, without Hydra."""
    import yaml

    path = PRESETS / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise ConfigError(f"no model preset {name!r} in configs/model; there are: {known}")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values.pop("defaults", None)
    unknown = values.keys() - {field.name for field in fields(ModelConfig)}
    if unknown:
        raise ConfigError(f"{path.name} has unknown keys: {', '.join(sorted(unknown))}")
    config = ModelConfig(**values)
    config.validate()
    return config


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first column is text and whose others are numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=max(100, Console().width)).print(table)


def print_json(benchmark: str, values: Mapping[str, Any]) -> None:
    """Print one line of JSON: the benchmark's name, the machine, and its values."""
    line = {"benchmark": benchmark, "machine": machine(), **values}
    print(json.dumps(line), flush=True)


def machine() -> dict[str, Any]:
    """Where a figure was measured: device, capability, threads, torch."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "process_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
