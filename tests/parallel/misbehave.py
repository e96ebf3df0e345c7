"""One rank of a training run that dies, stops or sleeps inside a layer: `python -m tests.parallel.misbehave`."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
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


def misbehave(action: str, step: int, layer: int) -> None:
    """Act once, before the given layer's forward of the given step (layers are counted as they come)."""
    forward, seen = ShortcutLayer.forward, [0, 0]

    def then_act(self: Any, *arguments: Any, **keywords: Any) -> Any:
        seen[:] = [TRAIL.step, seen[1] + 1 if seen[0] == TRAIL.step else 0]
        if seen == [step, layer]:
            ACTIONS[action]()
        return forward(self, *arguments, **keywords)

    ShortcutLayer.forward = then_act  # type: ignore[method-assign]


if __name__ == "__main__":
    rank, action, step, layer, *words = sys.argv[1:]
    if os.environ["RANK"] == rank:
        misbehave(action, int(step), int(layer))
    sys.exit(main(compose(words)))
