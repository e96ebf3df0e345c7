"""Flat ranges of stored tensors: what an engine that cuts flattened weights holds, and which boxes they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor

from longcat.names import Box


@dataclass(frozen=True)
class FlatShard:
    """The elements ``start`` ... ``start + len(values) - 1`` of a stored tensor, flattened in row-major order.

    Over all ranks each element of the whole tensor is in exactly one shard of its kind. Experts count as one tensor
    of all N of them, wherever they live.
    """

    kind: str  # weight | exp_avg | exp_avg_sq | grad
    name: str  # the stored name, as in model.named_parameters()
    shape: tuple[int, ...]  # of the whole stored tensor
    start: int
    values: Tensor  # float32, flat, a view that may be written in place

    def boxes(self) -> Iterator[tuple[Box, Tensor]]:
        """The shard as boxes of the whole tensor, each with its view of the values, shaped like the box."""
        position = 0
        for box in boxes_of_range(self.shape, self.start, self.start + self.values.numel()):
            sizes = [stop - start for start, stop in box]
            yield box, self.values[position : position + prod(sizes)].view(sizes)
            position += prod(sizes)


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Cut the flat range ``start`` ... ``stop - 1`` of a tensor into boxes, in order: at most 2 · dimensions - 1."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield ((start, stop),)
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # inside one row
        yield from _inside(shape, last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _inside(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield ((first, last), *((0, size) for size in shape[1:]))
    if last * row < stop:
        yield from _inside(shape, last, 0, stop - last * row)


def _inside(shape: tuple[int, ...], index: int, start: int, stop: int) -> Iterator[Box]:
    for box in boxes_of_range(shape[1:], start, stop):
        yield ((index, index + 1), *box)
