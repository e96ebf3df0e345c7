"""A rank of a run in which one rank fails inside a layer, at a moment that the test chooses."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter

from longcat.layer import ShortcutLayer
from parallel.reduce import sum_scalars
from parallel.watchdog import watchdog
from parallel.watchdog.spans import SPANS
from tests.support.distributed import inherit, set_rank_environment
from train.compose import compose
from train.process.rank import main

ACTIONS: dict[str, Callable[[], object]] = {
    "dies": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stops": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleeps": lambda: time.sleep(1000),
    "differs": lambda: sum_scalars([0.0]),  # issues another collective than the others
}

SLOW = {"saves slowly": 2.0, "hardly saves": 20.0}  # timeouts that the disk takes


def misbehave(action: str | None, step: int, layer: int, seconds: float, folder: Path) -> None:
    """Misbehave once, before the given layer's forward in the given step (layers are counted in order).

    Every rank shortens its timeout after its first step.
    """
    forward, seen = ShortcutLayer.forward, [0, 0]

    def then_act(self: Any, *arguments: Any, **keywords: Any) -> Any:
        seen[:] = [SPANS.step, seen[1] + 1 if seen[0] == SPANS.step else 0]
        if seen == [2, 0]:
            watchdog.set_timeout(seconds)
        if action is not None and seen == [step, layer]:
            (folder / "acting").write_text(str(time.monotonic()))
            (folder / "acting").rename(folder / "acted")
            ACTIONS[action]()
        return forward(self, *arguments, **keywords)

    ShortcutLayer.forward = then_act  # type: ignore[method-assign]


def save_slowly(seconds: float) -> None:
    """Make the disk take ``seconds`` for each shard that this rank writes."""
    write = FileSystemWriter._write_data

    def then_write(self: Any, *arguments: Any) -> Any:
        time.sleep(seconds)
        return write(self, *arguments)

    FileSystemWriter._write_data = then_write


@dataclass(frozen=True)
class Fault:
    """Which rank misbehaves, and when."""

    rank: int
    action: str  # a key of ACTIONS or SLOW
    seconds: float  # the timeout after the first step: busy cores make the start slow
    folder: Path  # its file `acted` gets the time of the fault, on the machine's monotonic clock
    step: int = 3
    layer: int = 1  # before whose forward


def rank_main(
    rank: int, world_size: int, port: int, fault: Fault, words: list[str], environment: dict[str, str]
) -> None:
    """Train as one rank, which logs to the fault's folder; the end is this process's."""
    inherit(environment)
    set_rank_environment(rank, world_size, port)
    with (fault.folder / f"{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    own = fault.action if rank == fault.rank else None
    if own in SLOW:
        save_slowly(SLOW[own] * fault.seconds)
        own = None
    misbehave(own, fault.step, fault.layer, fault.seconds, fault.folder)
    sys.exit(main(compose(words)))
