"""Fast 64-bit checksums of a tensor's bytes, for comparisons inside a run.

On a CPU this is XXH3 over the tensor's memory. It reads twice as fast as memory is copied, and misses a change, of one
bit or of many, with probability 2^-64. On a GPU, where XXH3 has no kernel, it is a keyed sum of the 32-bit words,
Σ word_i · K(i) modulo 2^64 with odd keys: no change of a single word is missed, and one of several words with
probability at most 2^-32. Words are widened to 64 bits first: in a sum of 64-bit words, two flips of bit 63 would
always cancel.

The value depends on shape and layout only through the bytes in row-major order, and on the kind of device. For a value
that does not depend on how a tensor is sharded, see `train/checkpoint/state_hash.py`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import cache

import torch
import xxhash
from torch import Tensor

COLUMNS = 1 << 12  # 32-bit words in a row
ROWS_ON_GPU, ROWS_IN_CACHE = 1 << 10, 1 << 6  # widened at once: 32 MiB on a GPU, 2 MiB in a CPU's cache
MASK = (1 << 64) - 1
Digest = int | Tensor  # a GPU's is a tensor [] int64 on it, until `resolve` fetches it: no wait in between


def digest(tensor: Tensor, as_on_gpu: bool = False) -> Digest:
    """The checksum of a tensor of any dtype, shape and strides; 0 elements have one too.

    ``as_on_gpu`` gives a CPU tensor the checksum that its values have on a GPU.

    Raises:
        TypeError: the tensor has no memory of its own that can be read (meta, sparse, or a wrapper like DTensor).
    """
    if tensor.layout is not torch.strided or tensor.is_meta or type(tensor).__name__ == "DTensor":
        raise TypeError(f"a checksum needs a tensor's own memory, not a {type(tensor).__name__} on {tensor.device}")
    in_order = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    plain = tensor if in_order else tensor.detach().resolve_conj().resolve_neg().contiguous()
    if plain.is_cpu and not as_on_gpu:
        return xxhash.xxh3_64_intdigest(_memory(plain))
    return keyed_sum(plain.detach().reshape(-1))


def _memory(plain: Tensor) -> ctypes.Array[ctypes.c_char] | bytes:
    """A contiguous CPU tensor's memory. Not by `numpy()`: FSDP2 could no longer free a storage that numpy has seen."""
    if not (size := plain.nbytes):
        return b""
    return (ctypes.c_char * size).from_address(plain.data_ptr())


def keyed_sum(values: Tensor) -> Tensor:
    """The checksum for GPUs of a flat tensor, as an int64 [] on its device."""
    num_bytes, device = values.nbytes, values.device
    raw = values.view(torch.uint8)
    padding = -num_bytes % 4
    if padding:
        raw = torch.nn.functional.pad(raw, (0, padding))
    words = raw.view(torch.int32)
    columns = keys(COLUMNS, 0, device)
    whole = words.numel() // COLUMNS * COLUMNS
    at_once = ROWS_ON_GPU if device.type == "cuda" else ROWS_IN_CACHE
    sums = [_row_sums(rows, columns) for rows in words[:whole].view(-1, COLUMNS).split(at_once)] if whole else []
    if whole < words.numel():
        sums.append(_row_sums(words[whole:][None], columns[: words.numel() - whole]))
    if not sums:
        return torch.full((), num_bytes, dtype=torch.int64, device=device)
    by_row = torch.cat(sums)
    row_keys = keys(1 << (by_row.numel() - 1).bit_length(), 1, device)[: by_row.numel()]
    return (by_row * row_keys).sum() + num_bytes


def _row_sums(rows: Tensor, columns: Tensor) -> Tensor:
    """Σ over columns of word · key, [rows] int64. CUDA has no integer matrix product."""
    wide = rows.to(torch.int64)
    return (wide * columns).sum(1) if rows.is_cuda else torch.mv(wide, columns)


@cache
def keys(count: int, stream: int, device: torch.device) -> Tensor:
    """``count`` odd 64-bit keys, the same in every process; another ``stream`` has others."""
    generator = torch.Generator().manual_seed(0x5DC + stream)
    drawn = torch.randint(-(1 << 63), (1 << 63) - 1, (count,), dtype=torch.int64, generator=generator)
    return (drawn | 1).to(device)


def resolve(digests: Iterable[Digest]) -> list[int]:
    """The checksums as numbers from 0 to 2^64 - 1; those on a GPU come in one copy."""
    found = list(digests)
    on_device = [one for one in found if isinstance(one, Tensor)]
    fetched = iter(torch.stack(on_device).tolist() if on_device else ())
    return [(next(fetched) if isinstance(one, Tensor) else one) & MASK for one in found]


def combined(checksums: Iterable[int]) -> int:
    """One 64-bit number for checksums in this order."""
    number = 0
    for value in checksums:
        number = mix(number ^ value)
    return number


def mix(number: int) -> int:
    """64 well mixed bits (the finaliser of splitmix64)."""
    number = (number + 0x9E3779B97F4A7C15) & MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & MASK
    return number ^ (number >> 31)
