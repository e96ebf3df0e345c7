"""Costs of saving and loading: `python -m benchmarks.checkpoint` prints a table and one JSON line.

Each of ``--ranks`` processes holds a state of at least a GiB; a time is the slowest rank's. Each ratio compares two
alternating measurements, summed over all rounds: the stall of an asynchronous save and a copy into a warm buffer;
writing and a plain sequential write of as many bytes per process; loading and a plain read of each process's file,
both with a cold page cache. A resume finds the checkpoint, which verifies it, and loads it.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import print_json, print_table, resident_gib
from parallel.mesh import Topology, connect
from parallel.reduce import all_gather_object
from tests.support.distributed import run_ranks
from train.checkpoint.dcp_tensors import Take, box_values, saved
from train.checkpoint.find import find_on_all_ranks
from train.checkpoint.load import load
from train.checkpoint.retention import Keep, prune
from train.checkpoint.save import Snapshot, write
from train.checkpoint.saver import Saver
from train.checkpoint.staging import StagingBuffer
from train.checkpoint.thread_context import ThreadContext
from train.compose import compose
from train.config import Config
from train.run import build_state
from train.run_dir.folder import as_mapping
from train.state import TrainState
from train.terminal import SilentTerminal

BLOCK = 1 << 24  # bytes of one plain read or write
LAYERS = {1: 4, 2: 12}  # ranks → layers with which weights and moments exceed a GiB per rank


def plain_copy(source: list[torch.Tensor], target: list[torch.Tensor]) -> None:
    for one, other in zip(source, target, strict=True):
        other.copy_(one)


def plain_write(path: Path, memory: memoryview) -> None:
    """Write the same bytes to one file sequentially, and sync it."""
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
    """Drop a file, or all files of a folder, from the page cache."""
    for file in path.iterdir() if path.is_dir() else [path]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


class PeakMemory(threading.Thread):
    """Peak resident memory above the start of its context, sampled 100 times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.peak = resident_gib("VmRSS")
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.01):
            self.peak = max(self.peak, resident_gib("VmRSS"))

    def __enter__(self) -> PeakMemory:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.join()

    @property
    def extra_gib(self) -> float:
        return self.peak - self.before


def together(action: Callable[[], Any]) -> float:
    """Seconds until all ranks have run ``action``, started together."""
    dist.barrier()
    start = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - start


class Bench:
    """A state and a folder for its checkpoints. Every method that measures is a collective."""

    def __init__(self, config: Config, topology: Topology) -> None:
        self.config, self.topology, self.folder = config, topology, config.run.folder / "checkpoints"
        self.state: TrainState = build_state(config, topology)
        self.values = list(box_values(saved(self.state)))
        self.num_bytes = sum(values.nbytes for values in self.values)
        for values in self.values:  # moments of zeros might compress on disk
            values.uniform_()

    def stalls(self, rounds: int) -> tuple[list[float], list[float], float]:
        """Seconds that each save stalls training and of a warm copy before each, and the extra memory of saving."""
        saver = Saver(self.state, self.config, self.topology, SilentTerminal())
        with PeakMemory() as memory:
            saver.save()
            saver.wait_pending()
        warm = [torch.empty_like(values) for values in self.values]
        plain_copy(self.values, warm)
        stalls, copies = [], []
        for _ in range(rounds):
            copies.append(together(lambda: plain_copy(self.values, warm)))
            self.state.counters.step += 1
            stalls.append(together(saver.save))
            saver.wait_pending()
        saver.close()
        return stalls, copies, memory.extra_gib

    def writes(self, rounds: int) -> tuple[list[float], list[float], Path]:
        """Seconds of writing and committing the staged state, and of a plain write of the same bytes before each."""
        memory = memoryview(mmap.mmap(-1, self.num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        torch.cat([values.flatten() for values in self.values], out=torch.frombuffer(memory, dtype=torch.float32))
        plain, ours, paths = [], [], [self.folder]
        target = self.folder / f"plain-{self.topology.rank}"
        stage = StagingBuffer(self.topology.device)
        for _ in range(rounds):
            plain.append(together(lambda: plain_write(target, memory)))
            target.unlink()
            self.state.counters.step += 1
            snapshot = stage.copy(self._snapshot)
            ours.append(together(lambda shot=snapshot: paths.append(self._write(shot))))
            if self.topology.is_first:  # not timed
                prune(self.folder, Keep(newest=1))
        return plain, ours, paths[-1]

    def _snapshot(self, take: Take) -> Snapshot:
        return Snapshot.of(self.state, as_mapping(self.config), self.topology, take=take)

    def _write(self, snapshot: Snapshot) -> Path:
        return write(snapshot, self.folder, self.topology, Keep(), ThreadContext())

    def loads(self, rounds: int, path: Path) -> tuple[dict[str, list[float]], float]:
        """Seconds of a plain read, of loading, verifying and resuming, and the extra memory of loading."""
        shard = path / f"__{self.topology.rank}_0.distcp"
        memory = memoryview(bytearray(b"\1") * shard.stat().st_size)  # touched

        def find() -> None:
            assert find_on_all_ranks(self.folder, "auto", self.topology) == (path, [])

        def fill() -> None:
            load(self.state, path, as_mapping(self.config))

        actions: dict[str, Callable[[], Any]] = {
            "plain_read": lambda: plain_read(shard, memory),
            "load": fill,
            "verify": find,
            "resume": lambda: (find(), fill()),
        }
        with PeakMemory() as peak:
            fill()
        seconds: dict[str, list[float]] = {name: [] for name in actions}
        for turn in range(rounds):  # each round starts with another action
            order = [list(actions)[(turn + place) % len(actions)] for place in range(len(actions))]
            for name in order:
                if self.topology.is_first:
                    forget(path)
                seconds[name].append(together(actions[name]))
        return seconds, peak.extra_gib


def ratio(ours: list[float], plain: list[float]) -> float:
    """Our time over the plain one, summed over rounds: single times of a disk vary by a factor of four."""
    return sum(ours) / sum(plain)


def measure(words: list[str], rounds: int) -> dict[str, float]:
    """The figures; a collective."""
    torch.set_num_threads(1)
    config = compose([*words, "checkpoint.keep=1", "train.dtype=float32"])
    topology = connect(config.parallel)
    bench = Bench(config, topology)
    gib = bench.num_bytes / 2**30
    stalls, copies, saving = bench.stalls(rounds)
    plain_writes, writes, path = bench.writes(rounds)
    seconds, loading = bench.loads(rounds, path)
    states = all_gather_object(gib)
    memories = [all_gather_object(extra / gib) for extra in (saving, loading)]
    total, median, plain_reads = sum(states), statistics.median, seconds["plain_read"]
    dist.destroy_process_group()
    return {
        "ranks": topology.world_size,
        "state_gib_a_rank": min(states),
        "stall_seconds": median(stalls),
        "warm_copy_seconds": median(copies),
        "stall_allowed_seconds": 1.5 * median(copies) + 0.2,
        "write_gib_per_second": total / median(writes),
        "plain_write_gib_per_second": total / median(plain_writes),
        "write_over_plain": 1 / ratio(writes, plain_writes),
        **{f"{name}_gib_per_second": total / median(times) for name, times in seconds.items()},
        "load_over_plain": 1 / ratio(seconds["load"], plain_reads),
        "resume_over_plain": 1 / ratio(seconds["resume"], plain_reads),
        "saving_memory_over_state": max(memories[0]),
        "loading_memory_over_state": max(memories[1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=1, choices=LAYERS)
    parser.add_argument("--folder", default=None, help="where to write (default: a new temporary folder)")
    parser.add_argument("overrides", nargs="*", help="another model (the default has more than a GiB per rank)")
    given = parser.parse_args()
    model = ["model=small", "model.vocab_size=32768", f"model.num_layers={LAYERS[given.ranks]}"]
    if given.folder:
        Path(given.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=given.folder) as base:
        words = [*model, f"parallel.ep={given.ranks}", *given.overrides, f"run.dir={base}"]
        figures = run_ranks(measure, given.ranks, words, given.rounds, timeout=900)[0]
    print_table("checkpoint", ["figure", "value"], [[name, f"{value:.3f}"] for name, value in figures.items()])
    print_json("checkpoint", {name: round(value, 4) for name, value in figures.items()})


if __name__ == "__main__":
    main()
