"""Redoes a tile of AdamW's update from a backup, rolled, and compares it bit by bit.

The tile rotates over this rank's tensors and their elements. It is long in whole vectors, so that the update's code for
the rest of a tensor does not compute it, and rolled within itself, so that each element is in another lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from longcat.ops.permuted import rolled
from parallel.fsdp.sharding import local_part
from parallel.sdc.recompute import compared

TILE, VECTOR = 1 << 16, 32  # elements
MOMENTS = ("exp_avg", "exp_avg_sq")


_HOOKS: WeakKeyDictionary[torch.optim.Optimizer, RemovableHandle] = WeakKeyDictionary()  # that keep a tile


@dataclass(frozen=True)
class TileDifference:
    """A tile of which AdamW wrote other bits than it gives when it is repeated."""

    name: str  # of the parameter
    elements: int
    largest: float


@dataclass
class _Backup:
    name: str
    parameter: nn.Parameter
    group: dict[str, Any]
    where: slice
    values: list[Tensor]  # weight, gradient, moments before the update
    step: Tensor


class UpdateCheck:
    """Checks one tile of the update in each step in which a check is due."""

    def __init__(
        self, parameters: Sequence[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer, every: int = 1
    ) -> None:
        self.optimizer, self.every = optimizer, every
        # name, parameter, its elements in whole vectors, its tiles
        self._sizes = [(n, p, size := flat(p).numel() // VECTOR * VECTOR, -(-size // TILE)) for n, p in parameters]
        self.found: TileDifference | None = None  # in the last update
        self._step = 0
        self._backup: _Backup | None = None

    def install(self) -> None:
        """Keep a tile before each of the optimizer's steps in which a check is due; `end_step` compares it."""
        if self.optimizer in _HOOKS:
            _HOOKS.pop(self.optimizer).remove()  # of a check before
        _HOOKS[self.optimizer] = self.optimizer.register_step_pre_hook(self._before_step)

    def begin_step(self, step: int) -> None:
        """The number of the training step that follows."""
        self._step = step

    def _before_step(self, *_: Any) -> None:
        if self.every > 0 and self._step % self.every == 0:
            self.before(self._step // self.every)

    def end_step(self) -> None:
        """After the update, if there was one."""
        self.found = self.after()

    @torch.no_grad()
    def before(self, number: int) -> None:
        """Keep tile ``number`` (modulo the number of tiles) as it is before the update."""
        self._backup = None
        found = self._tile(number)
        if found is None:
            return
        name, parameter, where = found
        group = next(one for one in self.optimizer.param_groups if any(p is parameter for p in one["params"]))
        assert parameter.grad is not None
        step = self.optimizer.state[parameter]["step"].clone()
        values = [flat(tensor)[where].clone() for tensor in (parameter, parameter.grad, *self._moments(parameter))]
        self._backup = _Backup(name, parameter, group, where, values, step)

    @torch.no_grad()
    def after(self) -> TileDifference | None:
        """Redo the update of the tile; what differs from the optimizer's result."""
        if (kept := self._backup) is None:
            return None
        self._backup = None
        weight, grad, *moments = (rolled(values, 0) for values in kept.values)
        parameter = nn.Parameter(weight)
        parameter.grad = grad
        settings = {key: value for key, value in kept.group.items() if key != "params"}
        optimizer = type(self.optimizer)([{**settings, "params": [parameter]}])  # type: ignore[call-arg]
        optimizer.state[parameter] = {"step": kept.step, **dict(zip(MOMENTS, moments, strict=True))}
        optimizer.step()
        again = [rolled(tensor.detach(), 0, back=True) for tensor in (parameter, *moments)]
        now = [flat(tensor)[kept.where] for tensor in (kept.parameter, *self._moments(kept.parameter))]
        found = compared(list(now), list(again))
        return None if found is None else TileDifference(kept.name, *found)

    def _moments(self, parameter: nn.Parameter) -> list[Tensor]:
        return [self.optimizer.state[parameter][kind] for kind in MOMENTS]

    def _tile(self, number: int) -> tuple[str, nn.Parameter, slice] | None:
        """The parameter and elements of tile ``number``."""
        tiles = [one for one in self._sizes if one[1].grad is not None]
        total = sum(count for *_, count in tiles)
        left = number % total if total else 0
        for name, parameter, whole, count in tiles:
            if left < count:
                return name, parameter, slice(left * TILE, min((left + 1) * TILE, whole))
            left -= count
        return None


def flat(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor as a vector."""
    return local_part(tensor)[0].view(-1)
