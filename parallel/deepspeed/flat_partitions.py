"""DeepSpeed's flat partitions as parts of the weights, and flat ranges of a weight as boxes of it.

ZeRO 1 and 2 lay the weights of a group end to end and cut the result into equal partitions, so a partition may begin
and end inside a weight. ZeRO-3 cuts each weight and lays this rank's parts end to end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from longcat.names import Box


@dataclass(frozen=True)
class Fragment:
    """A part of one weight in a flat partition; ranges are in elements, padding is left out."""

    weight: nn.Parameter
    start: int  # in the flattened weight
    numel: int
    offset: int  # in the partition


def fragments(zero: Any, number: int, stage: int) -> list[Fragment]:
    """The fragments in this rank's partition of the group ``number`` of DeepSpeed's optimizer."""
    return _fragments_by_weight(zero, number) if stage == 3 else _fragments_by_group(zero, number)


def _fragments_by_group(zero: Any, number: int) -> list[Fragment]:
    size = int(zero.partition_size[number])
    low = dist.get_rank(zero.real_dp_process_group[number]) * size
    pieces = []
    for weight, begin in zip(
        zero.round_robin_bit16_groups[number], zero.round_robin_bit16_offsets[number], strict=True
    ):
        first, last = max(begin, low), min(begin + weight.numel(), low + size)
        if first < last:
            pieces.append(Fragment(weight, first - begin, last - first, first - low))
    return pieces


def _fragments_by_weight(zero: Any, number: int) -> list[Fragment]:
    rank = dist.get_rank(zero.sub_group_process_groups[number])
    pieces, offset = [], 0
    for weight in zero.fp16_groups[number]:
        size = int(weight.partition_numel())
        first, last = rank * size, min((rank + 1) * size, int(weight.ds_numel))
        if first < last:
            pieces.append(Fragment(weight, first, last - first, offset))
        offset += size
    return pieces


def by_fragment(tensors: list[Tensor], pieces: list[Fragment]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Cut a partition that is stored as several tensors, end to end: (weight, flat values), without padding."""
    start = 0  # of the tensor, in the partition
    waiting = deque(sorted(pieces, key=lambda piece: piece.offset))
    for tensor in tensors:
        stop = start + tensor.numel()
        while waiting and waiting[0].offset < stop:
            piece = waiting[0]
            end = piece.offset + piece.numel
            low, high = max(piece.offset, start), min(end, stop)
            yield piece.weight, tensor.reshape(-1)[low - start : high - start]
            if end > stop:
                break
            waiting.popleft()
        start = stop


@dataclass(frozen=True)
class FlatShard:
    """The elements ``start`` ... ``start + len(values) - 1`` of a stored tensor, flattened in row-major order.

    Over all ranks each element of the full tensor is in exactly one shard of its kind. All N experts of a layer are one
    tensor, whatever ranks have them.
    """

    kind: str  # weight | exp_avg | exp_avg_sq | grad
    name: str  # the stored name, as in model.named_parameters()
    shape: tuple[int, ...]  # of the full stored tensor
    start: int
    values: Tensor  # float32, flat, a view that may be written in place

    def boxes(self) -> Iterator[tuple[Box, Tensor]]:
        """The shard as boxes of the full tensor, each with its view of the values, shaped like the box."""
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
    first, last = -(-start // row), stop // row  # complete rows
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
