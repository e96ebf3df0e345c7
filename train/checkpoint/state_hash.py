"""One 64-bit hash of the full state that does not depend on the layout.

Σ_tensors H(name) · Σ_i bits_i · K(i) mod 2^64 over logical tensors: H and K odd, i the index in the unpadded
logical tensor, bits the 32 of a float32 (a counter's 64), read as a signed integer. K(i) = A(i div C) · B(i mod C), so
that C values cost one dot product. Moments hash under their weight's logical name and their kind.
"""

from __future__ import annotations

import hashlib
from functools import cache

import torch
from torch import Tensor

from longcat.names import pieces
from parallel.checksum import MASK, mix
from parallel.mesh import Topology
from parallel.reduce import sum_over_ranks
from parallel.state_store import LocalBox
from train.state import TrainState

COLUMNS = 1 << 15  # C; a product of bits and B stays in the processor's cache


def state_hash(state: TrainState, topology: Topology) -> str:
    """The hash of the state of all ranks as 16 hexadecimal digits; a collective."""
    total = 0
    for box in state.store.local_boxes():
        if state.store.counts_here:
            total += hash_stored(box)
    if topology.holds_first_shards:
        for name, tensor in state.store.steps():
            total += name_key(f"optimizer_step/{name}") * hash_range(bits(tensor.detach()).flatten(), 0)
    if topology.is_first:
        for key, tensor in state.replicated():
            total += name_key(key) * hash_range(bits(tensor.detach()).flatten(), 0)
        for key, value in vars(state.counters).items():
            total += name_key(f"counter/{key}") * value
        for key, tensor in state.health.tensors():
            total += name_key(f"health/{key}") * hash_range(bits(tensor), 0)
    summed = sum_over_ranks(torch.tensor([signed(total)], dtype=torch.int64))
    return f"{int(summed) & MASK:016x}"


def hash_stored(local_box: LocalBox) -> int:
    """The contribution of one box of a stored tensor to the sum."""
    total = 0
    for piece in pieces(local_box.name, local_box.shape, local_box.box):
        values = bits(local_box.values[piece.index])
        if len(piece.shape) == 1 or piece.box[1] == (0, piece.shape[1]):
            width = piece.shape[1] if len(piece.shape) == 2 else 1
            part = hash_range(values.flatten(), piece.box[0][0] * width)
        else:
            rows = enumerate(values, start=piece.box[0][0])
            part = sum(hash_range(row, number * piece.shape[1] + piece.box[1][0]) for number, row in rows)
        total += name_key(f"{local_box.kind}/{piece.name}") * part
    return total & MASK


def bits(tensor: Tensor) -> Tensor:
    """The values' bits as integers: 32 for a float32, 64 for a float64 or an int64."""
    tensor = tensor.cpu().contiguous()
    if tensor.dtype is torch.float32:
        return tensor.view(torch.int32)
    return tensor.view(torch.int64)


def hash_range(values: Tensor, start: int) -> int:
    """Σ values_i · K(start + i) mod 2^64 for a flat run of integers."""
    total, position = 0, 0
    columns = column_keys()
    head = min(-start % COLUMNS, values.shape[0])
    if head:
        first = start % COLUMNS
        row = (values[:head].to(torch.int64) * columns[first : first + head]).sum()
        total += int(row) * row_key(start // COLUMNS)
        position = head
    while position < values.shape[0]:
        chunk = values[position : position + COLUMNS].to(torch.int64)
        total += int((chunk * columns[: chunk.shape[0]]).sum()) * row_key((start + position) // COLUMNS)
        position += COLUMNS
    return total & MASK


@cache
def column_keys() -> Tensor:
    """B(0..C-1), odd, as int64."""
    return torch.tensor([signed(mix(column) | 1) for column in range(COLUMNS)], dtype=torch.int64)


def row_key(row: int) -> int:
    """A(row), odd."""
    return mix(row + (1 << 32)) | 1


def name_key(name: str) -> int:
    """H(name), odd."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") | 1


def signed(number: int) -> int:
    """A number mod 2^64 as the int64 of the same bits."""
    number &= MASK
    return number - (1 << 64) if number >> 63 else number
