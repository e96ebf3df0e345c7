"""Where DeepSpeed keeps what: its flat partitions as parts of the weights.

ZeRO 1 and 2 lay the weights of a group end to end and cut the whole into equal partitions, so that a partition's
ends may lie inside a weight. ZeRO-3 cuts each weight and lays this rank's parts end to end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class Fragment:
    """A part of one weight in a flat partition; ranges are in elements, padding is left out."""

    weight: nn.Parameter
    start: int  # in the flattened weight
    numel: int
    offset: int  # in the partition


def fragments(zero: Any, number: int, stage: int) -> list[Fragment]:
    """What this rank's partition of the group ``number`` of DeepSpeed's optimizer consists of."""
    return _cut_one_by_one(zero, number) if stage == 3 else _cut_together(zero, number)


def _cut_together(zero: Any, number: int) -> list[Fragment]:
    size = int(zero.partition_size[number])
    low = dist.get_rank(zero.real_dp_process_group[number]) * size
    found = []
    for weight, begin in zip(
        zero.round_robin_bit16_groups[number], zero.round_robin_bit16_offsets[number], strict=True
    ):
        first, last = max(begin, low), min(begin + weight.numel(), low + size)
        if first < last:
            found.append(Fragment(weight, first - begin, last - first, first - low))
    return found


def _cut_one_by_one(zero: Any, number: int) -> list[Fragment]:
    rank = dist.get_rank(zero.sub_group_process_groups[number])
    found, offset = [], 0
    for weight in zero.fp16_groups[number]:
        size = int(weight.partition_numel())
        first, last = rank * size, min((rank + 1) * size, int(weight.ds_numel))
        if first < last:
            found.append(Fragment(weight, first, last - first, offset))
        offset += size
    return found
