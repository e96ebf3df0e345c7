"""What saving and loading cost: `python -m benchmarks.checkpoint` prints a table and one JSON line.

One process holds a state of at least a GiB. Ratios are between neighbours of one run: the stall of a save beside
training and a copy into a warm buffer; writing and a plain sequential write of the same bytes; loading and a plain
read of the same file, both after the file has left the page cache.
"""

from __future__ import annotations

import argparse
import mmap
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import _resident_gib, print_json, print_table, seconds_of
from parallel.mesh import Topology, connect
from train.checkpoint import Keep, load, verify
from train.config import Config, compose
from train.folder import as_mapping
from train.run import build_state
from train.saver import Saver
from train.spread import Take, box_values, saved
from train.stage import Stage
from train.state import TrainState
from train.writing import Side, Snapshot, write

BLOCK = 1 << 24  # bytes of one plain read or write


def plain_copy(source: list[torch.Tensor], target: list[torch.Tensor]) -> None:
    for one, other in zip(source, target, strict=True):
        other.copy_(one)


def plain_write(path: Path, memory: memoryview) -> None:
    """The same bytes in one file, front to back, and to the disk."""
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(memory), BLOCK):
            file.write(memory[start : start + BLOCK])
        os.fsync(file.fileno())


def plain_read(path: Path, memory: memoryview) -> None:
    with path.open("rb", buffering=0) as file:
        start = 0
        while count := file.readinto(memory[start : start + BLOCK]):
            start += count


def forget(path: Path) -> None:
    """Take a file, or all files of a folder, out of the page cache."""
    for file in path.iterdir() if path.is_dir() else [path]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


class PeakMemory(threading.Thread):
    """The most resident memory above rest while its context lasts, looked at 100 times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.peak = _resident_gib("VmRSS")
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.01):
            self.peak = max(self.peak, _resident_gib("VmRSS"))

    def __enter__(self) -> PeakMemory:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.join()

    @property
    def extra_gib(self) -> float:
        return self.peak - self.before


class Bench:
    """A state, and a folder for its checkpoints."""

    def __init__(self, config: Config, topology: Topology, folder: Path) -> None:
        self.config, self.topology, self.folder = config, topology, folder
        self.state: TrainState = build_state(config, topology)
        self.values = list(box_values(saved(self.state)))
        self.num_bytes = sum(values.nbytes for values in self.values)

    def stalls(self, rounds: int) -> tuple[list[float], list[float], float]:
        """Seconds that saves stall training, seconds of a warm copy before each, and the memory that saving took."""
        saver = Saver(self.state, self.config, self.topology, None)
        with PeakMemory() as memory:
            saver.save()
            saver.settle()
        warm = [torch.empty_like(values) for values in self.values]
        plain_copy(self.values, warm)
        stalls, copies = [], []
        for _ in range(rounds):
            copies.append(seconds_of(lambda: plain_copy(self.values, warm)))
            self.state.counters.step += 1
            stalls.append(seconds_of(saver.save))
            saver.settle()
        saver.close()
        return stalls, copies, memory.extra_gib

    def writes(self, rounds: int) -> tuple[list[float], list[float], Path]:
        """Seconds of writing and committing what is staged, and of a plain write of the same bytes before each."""
        memory = memoryview(mmap.mmap(-1, self.num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        torch.frombuffer(memory, dtype=torch.uint8).fill_(3)
        plain, ours = [], []
        path, stage = self.folder, Stage(self.topology.device)
        for _ in range(rounds):
            target = self.folder / "plain"
            plain.append(seconds_of(lambda target=target: plain_write(target, memory)))
            target.unlink()
            self.state.counters.step += 1
            snapshot = stage.copy(self._snapshot)
            start = time.perf_counter()
            path = write(snapshot, self.folder, self.topology, Keep(newest=1), Side())
            ours.append(time.perf_counter() - start)
        return plain, ours, path

    def _snapshot(self, take: Take) -> Snapshot:
        return Snapshot.of(self.state, as_mapping(self.config), self.topology, take=take)

    def loads(self, rounds: int, path: Path) -> tuple[list[float], list[float], list[float]]:
        """Seconds of a plain read of the largest file, of loading, and of verifying, each from the disk."""
        shard = max(path.iterdir(), key=lambda file: file.stat().st_size)
        memory = memoryview(bytearray(shard.stat().st_size))
        plain, ours, checks = [], [], []
        for _ in range(rounds):
            plain.append(from_disk(path, lambda: plain_read(shard, memory)))
            ours.append(from_disk(path, lambda: load(self.state, path, as_mapping(self.config))))
            checks.append(from_disk(path, lambda: verify(path)))
        return plain, ours, checks


def from_disk(path: Path, action: Callable[[], Any]) -> float:
    forget(path)
    return seconds_of(action)


def ratio(ours: list[float], plain: list[float]) -> float:
    """The median of our time over its neighbour's."""
    return statistics.median(a / b for a, b in zip(ours, plain, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None, help="where to write; a new folder in the system's own otherwise")
    parser.add_argument("overrides", nargs="*", default=["model=small", "model.vocab_size=32768"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    base = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=given.folder))
    config = compose([*given.overrides, f"run.dir={base}", "checkpoint.keep=1", "train.dtype=float32"])
    try:
        bench = Bench(config, connect(config.parallel), base)
        gib = bench.num_bytes / 2**30
        stalls, copies, extra = bench.stalls(given.rounds)
        plain_writes, writes, path = bench.writes(given.rounds)
        plain_reads, loads, checks = bench.loads(given.rounds, path)
    finally:
        shutil.rmtree(base, ignore_errors=True)
        if dist.is_initialized():
            dist.destroy_process_group()
    median = statistics.median
    figures = {
        "state_gib": gib,
        "stall_seconds": median(stalls),
        "warm_copy_seconds": median(copies),
        "stall_allowed_seconds": 1.5 * median(copies) + 0.2,
        "write_gib_per_second": gib / median(writes),
        "plain_write_gib_per_second": gib / median(plain_writes),
        "write_over_plain": 1 / ratio(writes, plain_writes),
        "load_gib_per_second": gib / median(loads),
        "plain_read_gib_per_second": gib / median(plain_reads),
        "load_over_plain": 1 / ratio(loads, plain_reads),
        "verify_gib_per_second": gib / median(checks),
        "extra_memory_over_state": extra / gib,
    }
    print_table("checkpoint", ["figure", "value"], [[name, f"{value:.3f}"] for name, value in figures.items()])
    print_json("checkpoint", {name: round(value, 4) for name, value in figures.items()})


if __name__ == "__main__":
    main()
