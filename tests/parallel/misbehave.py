"""A rank of a training run, one of which dies, stops or sleeps inside a layer: `python -m tests.parallel.misbehave`.

Arguments: the rank that misbehaves, how (dies | stops | sleeps), in which step, before which layer's forward of that
step, a folder in which ranks wait for each other (time-outs are short here, imports are not), overrides.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longcat.layer import ShortcutLayer
from parallel.crumbs import TRAIL
from train.config import compose
from train.run import main

ACTIONS: dict[str, Callable[[], None]] = {
    "dies": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stops": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleeps": lambda: time.sleep(1000),
}


def misbehave(action: str, step: int, layer: int, meeting: Path) -> None:
    """Act once, before the given layer's forward of the given step (layers are counted as they come)."""
    forward, seen = ShortcutLayer.forward, [0, 0]

    def then_act(self: Any, *arguments: Any, **keywords: Any) -> Any:
        seen[:] = [TRAIL.step, seen[1] + 1 if seen[0] == TRAIL.step else 0]
        if seen == [step, layer]:
            (meeting / "acted").touch()
            ACTIONS[action]()
        return forward(self, *arguments, **keywords)

    ShortcutLayer.forward = then_act  # type: ignore[method-assign]


def meet(folder: Path) -> None:
    """Return once every rank has come here."""
    (folder / f"rank{os.environ['RANK']}").touch()
    while len(list(folder.glob("rank*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.05)


if __name__ == "__main__":
    rank, action, step, layer, meeting, *words = sys.argv[1:]
    import parallel.watch_sharding  # noqa: F401
    import train.data.samples  # noqa: F401

    meet(Path(meeting))
    if os.environ["RANK"] == rank:
        misbehave(action, int(step), int(layer), Path(meeting))
    sys.exit(main(compose(words)))
