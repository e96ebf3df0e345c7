"""Ranks of a run for tests that kill them: each logs the samples that it reads, and can kill itself."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from parallel.watchdog.spans import SPANS
from tests.support.distributed import inherit, rank_context, set_rank_environment
from tests.support.ports import free_port
from train.batches import BatchReader
from train.checkpoint import manifest, shards
from train.checkpoint import save as saving
from train.checkpoint.files import HashedFile
from train.checkpoint.staging import StagingBuffer
from train.compose import compose
from train.data.samples import TokenSamples
from train.process.rank import main
from train.read_ahead import ReadAhead

GRACE = 5.0  # seconds
TRAIN = Path(shards.__file__).parent.parent


@dataclass(frozen=True)
class Fate:
    """A rank dies at the ``call``-th call of a phase's function, ``before`` or after the call."""

    phase: str
    call: int
    before: bool


# phase → where a process dies in it: the holder and the name of a function that the phase calls again and again, and
# the function of train/ by which it must be called to count, if not by any
PHASES: dict[str, tuple[Any, str, str]] = {
    "staging": (StagingBuffer, "_keep", ""),
    "planning": (saving.ThreadContext, "run_on_all_ranks", ""),
    "writing": (HashedFile, "write", ""),
    "committing": (manifest, "write_synced", ""),
    "renaming": (os, "rename", "commit"),
    "pruning": (os, "unlink", "prune"),
    "moving": (os, "rename", ""),
    "removing": (os, "unlink", ""),
    "loading": (shards.RecordHeaders, "of", ""),
    "verifying": (manifest, "file_hash", ""),
}


def caller() -> str:
    """The innermost function of train/ that is being called in this thread; "" if none is."""
    frame: Any = sys._getframe(1)
    while frame is not None and TRAIN not in Path(frame.f_code.co_filename).parents:
        frame = frame.f_back
    return str(frame.f_code.co_qualname).replace(".<locals>", "") if frame is not None else ""


def die(fate: Fate, will: Path) -> None:
    """Kill this process; writes to ``will`` where it died."""
    will.write_text(f"{fate.phase} in {caller()}, {'before' if fate.before else 'after'}")
    os.kill(os.getpid(), signal.SIGKILL)


def place_of_death(samples: Path) -> str | None:
    """Where a rank has killed itself since the last call: `phase in function, before` or `after`."""
    will = Path(f"{samples}.will")
    if not will.exists():
        return None
    place = will.read_text()
    will.unlink()
    return place


def die_by(fate: Fate, will: Path) -> None:
    """Install this process's fate."""
    holder, name, by = PHASES[fate.phase]
    real = getattr(holder, name)
    calls = 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        counts = not by or caller() == by
        calls += counts
        mine = counts and calls == fate.call
        if mine and fate.before:
            die(fate, will)
        result = real(*arguments, **named)
        if mine:
            die(fate, will)
        return result

    setattr(holder, name, counted)


def log_samples(path: Path) -> None:
    """Append `step sample sample …` to ``path`` for every step's reading of this rank."""
    read: list[int] = []
    get, micro_batches = TokenSamples.__getitem__, BatchReader.read

    def remember(self: TokenSamples, index: int) -> Any:
        read.append(int(index))
        return get(self, index)

    def read_and_log(self: BatchReader, first_sample: int) -> Any:
        read.clear()
        found = list(micro_batches(self, first_sample))
        with path.open("a") as file:
            file.write(" ".join(map(str, [SPANS.step, *read])) + "\n")
        return iter(found)

    TokenSamples.__getitem__ = remember  # type: ignore[method-assign]
    ReadAhead.ask = lambda self, numbers: None  # type: ignore[method-assign] # what is noted is what is trained on
    BatchReader.read = read_and_log  # type: ignore[method-assign]


def rank_main(
    rank: int,
    world_size: int,
    port: int,
    words: list[str],
    samples: str,
    fate: Fate | None,
    environment: dict[str, str],
) -> None:
    """One rank; one with a ``fate`` kills itself."""
    inherit(environment)
    set_rank_environment(rank, world_size, port)
    with open(f"{samples}.{rank}.log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    log_samples(Path(f"{samples}.{rank}"))
    if fate is not None:
        die_by(fate, Path(f"{samples}.will"))
    sys.exit(main(compose(words)))


def start(
    world_size: int, words: list[str], samples: Path, victim: int = 0, fate: Fate | None = None
) -> list[BaseProcess]:
    """Start all ranks of a run."""
    port, environment = free_port(), dict(os.environ)
    ranks = [
        rank_context().Process(
            target=rank_main,
            args=(rank, world_size, port, words, str(samples), fate if rank == victim else None, environment),
            daemon=True,
        )
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    return ranks


def end(ranks: list[BaseProcess], seconds: float) -> list[int | None]:
    """Wait for all ranks; returns their exit codes. As an agent does, kill those that outlive a killed one by `GRACE`.

    None for a rank that has not ended after ``seconds`` although none was killed.
    """
    deadline, grace = time.monotonic() + seconds, 0.0
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        if not grace and any(process.exitcode == -signal.SIGKILL for process in ranks):
            grace = time.monotonic() + GRACE
            deadline = min(deadline, grace)
        time.sleep(0.02)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    return [-signal.SIGKILL if code is None and grace else code for code in codes]


def steps_read(samples: Path, rank: int) -> list[int]:
    """The steps that a rank has read samples for, in order, over all its starts."""
    path = Path(f"{samples}.{rank}")
    return [int(line.split()[0]) for line in path.read_text().splitlines()] if path.exists() else []


def samples_of_steps(samples: Path, world_size: int) -> dict[int, list[int]]:
    """step → the sorted samples that all ranks read when they last trained it."""
    last: dict[int, list[int]] = {}
    for rank in range(world_size):
        own: dict[int, list[int]] = {}
        for line in Path(f"{samples}.{rank}").read_text().splitlines():
            step, *read = map(int, line.split())
            own[step] = read
        for step, read in own.items():
            last[step] = sorted(last.get(step, []) + read)
    return last
