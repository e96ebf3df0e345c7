"""Plants faults in a training process from outside the program: its folder stands first on PYTHONPATH.

A rank looks for the file `$PLANTED_FAULTS/rank-<rank>` before each step, removes it and does what it says: `nan` fills
every gradient of that step with NaN, `weight` or `moment` flips bits of a tensor at rest. With `PLANTED_CRASH=1` in a
node's environment each of its ranks fails before its first step; `PLANTED_NAN=12,5` is NaN in step 12 of each start but
those from step 5, as if the state that leads there were unsound after step 5.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any


class AfterImport(MetaPathFinder, Loader):
    """Runs an action on a module that has just been imported."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name, self.action = name, action

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name or (spec := PathFinder.find_spec(name, path, target)) is None:
            return None
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        assert self.loader is not None
        module.__spec__.loader = self.loader  # type: ignore[union-attr]
        self.loader.exec_module(module)
        self.action(module)


def plant(module: ModuleType) -> None:
    """Let each step look for a fault first."""
    at, sound = map(int, os.environ.get("PLANTED_NAN", "0,0").split(","))
    plain, asked = module.Stepper.step, Path(os.environ["PLANTED_FAULTS"]) / f"rank-{os.environ['RANK']}"

    def step(self: Any, *arguments: Any) -> Any:
        if os.environ.get("PLANTED_CRASH"):
            raise RuntimeError("this node fails every time")
        began = vars(self).setdefault("began", self.state.counters.step)
        if began != sound and self.state.counters.step + 1 == at:
            kind = "nan"
        else:
            try:
                kind = asked.read_text()
            except FileNotFoundError:
                return plain(self, *arguments)
            asked.unlink()
        from longcat.faults import install_hook

        install_hook(hook(kind))
        try:
            return plain(self, *arguments)
        finally:
            install_hook(None)

    module.Stepper.step = step


def hook(kind: str) -> Callable[[str, str, Any], None]:
    """What changes tensors that pass `longcat.faults`: all gradients, or the first tensor at rest."""
    from longcat.faults import Place
    from parallel.sdc.inject import corrupt
    from parallel.sdc.spec import InjectedFault, Pattern

    left = [1]

    def change(place: str, name: str, tensor: Any) -> None:
        if kind == "nan" and place == Place.gradient:
            tensor.data.fill_(float("nan"))
        elif place == kind and left:
            left.clear()
            corrupt(tensor, InjectedFault(kind, Pattern.bits))

    return change


if "RANK" in os.environ and "PLANTED_FAULTS" in os.environ:
    sys.meta_path.insert(0, AfterImport("train.step", plant))
