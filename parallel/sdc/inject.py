"""Injects faults: bits, stuck lanes, scaled tiles and wrong rows, at a place, step, rank and call.

A fault's position and bits depend only on its seed and the tensor's shape, so a persistent fault strikes the same
element of a result each time that the result is computed, whatever its operands are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from longcat.faults import Place, install_hook, passed
from parallel.sdc.spec import InjectedFault, Pattern

LANE, TILE = 16, 16  # elements
WITH_A_CHECKPOINT = (Place.snapshot, Place.file)  # strike while the first checkpoint from their step on is written
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


@dataclass(frozen=True)
class AppliedFault:
    """A fault that has changed something."""

    fault: InjectedFault
    step: int
    name: str  # of the operator, tensor, transfer or file
    changed: int  # elements with other bits


class Injector:
    """Applies this rank's faults to what passes `longcat.faults.passed`."""

    def __init__(self, faults: Sequence[InjectedFault], rank: int) -> None:
        self.faults = [fault for fault in faults if fault.rank == rank]
        self.step, self.calls = 0, Counter[int]()
        self.strikes: list[AppliedFault] = []

    def install(self) -> None:
        """Let operators and transfers pass their results through this injector; without faults, through none."""
        install_hook(self if self.faults else None)

    def begin_step(self, step: int) -> None:
        """Count calls anew."""
        self.step = step
        for number, fault in enumerate(self.faults):
            if fault.place not in WITH_A_CHECKPOINT:
                self.calls[number] = 0

    def __call__(self, place: Place, name: str, tensor: Tensor) -> None:
        for number, fault in enumerate(self.faults):
            if fault.place != place or fault.name not in name:
                continue
            late = fault.place in WITH_A_CHECKPOINT
            if late and self.step < fault.step:
                continue
            self.calls[number] += 1
            once = (late or self.step == fault.step) and self.calls[number] == fault.call
            if once or (fault.persistent and self.step >= fault.step):
                changed = corrupt(tensor, fault)
                if changed:
                    self.strikes.append(AppliedFault(fault, self.step, name, changed))


@torch.no_grad()
def corrupt(tensor: Tensor, fault: InjectedFault) -> int:
    """Change a tensor's values in place by a fault's pattern; returns how many elements have other bits."""
    if not tensor.numel():
        return 0
    target = tensor.data  # without autograd's notice, as memory changes
    before = target.clone(memory_format=torch.contiguous_format)
    after = before.clone()
    draw = torch.rand(4, generator=torch.Generator().manual_seed(fault.seed), dtype=torch.float64).tolist()
    PATTERNS[Pattern(fault.pattern)](after, fault, draw)
    target.copy_(after)
    return int((_bits(before) != _bits(after)).sum())


def _bits(values: Tensor) -> Tensor:
    flat = values.reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    return flat.view(INTEGERS[flat.element_size()])


def _flip_bits(values: Tensor, fault: InjectedFault, draw: list[float]) -> None:
    words = _bits(values)
    width = 8 * words.element_size()
    generator = torch.Generator().manual_seed(fault.seed + 1)
    chosen = torch.randperm(width, generator=generator)[: fault.count].tolist()
    words[int(draw[0] * words.numel())] ^= _mask(chosen, words.dtype)


def _stick_lane(values: Tensor, fault: InjectedFault, draw: list[float]) -> None:
    words = _bits(values)
    width = 8 * words.element_size()
    mask = _mask([int(draw[1] * width)], words.dtype)
    lane = words[int(draw[0] * min(LANE, words.numel())) :: LANE]
    if draw[2] < 0.5:
        lane |= mask
    else:
        lane &= ~mask


def _scale_tile(values: Tensor, fault: InjectedFault, draw: list[float]) -> None:
    rows = _rows(values)
    top, left = (int(at * max(1, size - TILE + 1)) for at, size in zip(draw, rows.shape, strict=False))
    tile = rows[top : top + TILE, left : left + TILE]
    tile.copy_((tile.double() * fault.factor).to(tile.dtype))


def _wrong_row(values: Tensor, fault: InjectedFault, draw: list[float]) -> None:
    rows = _rows(values)
    count = rows.shape[0]
    if count > 1:
        target = int(draw[0] * count)
        rows[target] = rows[(target + 1 + int(draw[1] * (count - 1))) % count].clone()


def _rows(values: Tensor) -> Tensor:
    """A contiguous tensor as a matrix of its last dimension; one of a single dimension has rows of one element."""
    return values.view(-1, values.shape[-1]) if values.dim() > 1 else values.view(-1, 1)


def _mask(positions: list[int], dtype: torch.dtype) -> Tensor:
    number = sum(1 << position for position in positions)
    width = 8 * dtype.itemsize
    if dtype is not torch.uint8 and number >= 1 << (width - 1):
        number -= 1 << width
    return torch.tensor(number, dtype=dtype)


PATTERNS = {
    Pattern.bits: _flip_bits,
    Pattern.lane: _stick_lane,
    Pattern.scale: _scale_tile,
    Pattern.row: _wrong_row,
}


def damage_file(path: Path) -> None:
    """Let injected faults change a file's bytes."""
    content = bytearray(path.read_bytes())
    if content:
        passed(Place.file, path.name, torch.frombuffer(content, dtype=torch.uint8))
        path.write_bytes(content)
