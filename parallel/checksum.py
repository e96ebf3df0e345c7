"""Fast 64-bit checksums of a tensor's bytes, for comparisons inside a run.

On a CPU this is XXH3 over the tensor's memory. It reads twice as fast as memory is copied, and misses a change, of one
bit or of many, with probability 2^-64. On a GPU, where XXH3 has no kernel, it is a keyed sum of the 32-bit words,
Σ word_i · K(i) modulo 2^64 with odd keys: no change of a single word is missed, one of several words with probability
at most 2^-32, and of four in the corners of a rectangle of rows and columns with about 2^-28. Words are widened to 64
bits first: in a sum of 64-bit words, two flips of bit 63 would always cancel.

The value depends on shape and layout only through the bytes in row-major order, and on the kind of device. For a value
that does not depend on how a tensor is sharded, see `train/checkpoint/state_hash.py`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, overload

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from longcat.documents import to_device
from parallel.reduce import to_host

COLUMNS = 1 << 12  # 32-bit words in a row
ROWS_ON_GPU, ROWS_IN_CACHE = 1 << 10, 1 << 6  # widened at once: 32 MiB on a GPU, 2 MiB in a CPU's cache
COPIED_BYTES = 1 << 24
MASK = (1 << 64) - 1
Words = NDArray[np.uint64]
Digest = int | Tensor  # a GPU's is a tensor [] int64 on it, until `resolve` fetches it: no wait in between
Digests = Digest | Words  # one checksum, or of n parts [n], on a GPU int64


def digest(tensor: Tensor, as_on_gpu: bool = False) -> Digest:
    """The checksum of a tensor of any dtype, shape and strides; 0 elements have one too.

    ``as_on_gpu`` gives a CPU tensor the checksum that its values have on a GPU.

    Raises:
        TypeError: the tensor has no memory of its own that can be read (meta, sparse, or a wrapper like DTensor).
    """
    plain = _plain(tensor)
    if plain.is_cpu and not as_on_gpu:
        return xxhash.xxh3_64_intdigest(_memory(plain))
    return keyed_sum(plain)


def digests(
    parts: Tensor | Sequence[Tensor],
    sizes: Sequence[int] | None = None,
    skip: int | None = None,
    as_on_gpu: bool = False,
) -> Digests:
    """The `digest` of each of ``parts`` [n, ...] → [n]. On a GPU the number of kernels does not depend on n.

    An expanded tensor, the same part n times, has one checksum. On a CPU parts may be tensors of their own.
    ``sizes`` [n]: parts of so many rows follow each other; a GPU's checksums are then sums over rows, not `digest`'s.
    ``skip``: a part that is left out.

    Raises:
        TypeError: as `digest`.
    """
    if not isinstance(parts, Tensor):
        return _words([digest(part) for number, part in enumerate(parts) if number != skip])
    if sizes is None and len(parts) > 1 and not parts.stride(0):
        return digest(parts[0], as_on_gpu)
    if not parts.is_cpu or as_on_gpu:
        found = _sums_in_blocks(parts) if sizes is None else _segment_sums(_plain(parts), sizes)
        return found if skip is None else torch.cat((found[:skip], found[skip + 1 :]))
    plain = _plain(parts)
    memory, end, checksums = memoryview(_memory(plain)), 0, []
    row = plain.nbytes // max(len(plain), 1)
    for number, size in enumerate([1] * len(plain) if sizes is None else sizes):
        start, end = end, end + size * row
        if number != skip:
            checksums.append(xxhash.xxh3_64_intdigest(memory[start:end]))
    return _words(checksums)


def _plain(tensor: Tensor) -> Tensor:
    """The tensor in row-major order, copied if it is not."""
    if tensor.layout is not torch.strided or tensor.is_meta or type(tensor).__name__ == "DTensor":
        raise TypeError(f"a checksum needs a tensor's own memory, not a {type(tensor).__name__} on {tensor.device}")
    in_order = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    return (tensor if in_order else tensor.resolve_conj().resolve_neg().contiguous()).detach()


def _memory(plain: Tensor) -> ctypes.Array[ctypes.c_char] | bytes:
    """A contiguous CPU tensor's memory. Not by `numpy()`: FSDP2 could no longer free a storage that numpy has seen."""
    if not (size := plain.nbytes):
        return b""
    return (ctypes.c_char * size).from_address(plain.data_ptr())


def _words(checksums: Sequence[Digest]) -> Words:
    return np.array(checksums, dtype=np.uint64)


def keyed_sum(values: Tensor) -> Tensor:
    """The checksum for GPUs of a contiguous tensor, as an int64 [] on its device."""
    return keyed_sums(values[None])[0]


def keyed_sums(parts: Tensor) -> Tensor:
    """The checksum for GPUs of each of contiguous ``parts`` [n, ...] → [n] int64 on their device.

    The kernels are as many for many parts as for one, but for one more for each 16 MiB (1 MiB on a CPU).
    """
    count, device = len(parts), parts.device
    num_bytes = parts.nbytes // max(count, 1)
    if not num_bytes:
        return torch.zeros(count, dtype=torch.int64, device=device)
    if parts.numel() == 1:
        parts = parts.clone(memory_format=torch.contiguous_format)  # one element is contiguous, whatever its stride
    raw = parts.reshape(-1).view(torch.uint8).view(count, num_bytes)
    if padding := -num_bytes % 4:
        raw = torch.nn.functional.pad(raw, (0, padding))
    elif raw.storage_offset() % 4:  # begins inside a word of its storage
        raw = raw.clone()
    words = raw.view(torch.int32)  # [n, w]
    at_once = ROWS_ON_GPU if device.type == "cuda" else ROWS_IN_CACHE
    columns = keys(COLUMNS, 0, device)
    blocks = words.split(max(1, at_once * COLUMNS // words.shape[1]))
    by_row = _joined([_row_sums(block, columns, at_once) for block in blocks], 0)  # [n, rows of a part]
    row_keys = keys(1 << (by_row.shape[1] - 1).bit_length(), 1, device)[: by_row.shape[1]]
    return (by_row * row_keys).sum(1) + num_bytes


def _sums_in_blocks(parts: Tensor) -> Tensor:
    """`keyed_sums` of parts [n, ...] of any strides; only so many are copied into row-major order at once."""
    size = parts.nbytes // max(len(parts), 1)
    blocks = [parts] if parts.is_contiguous() else parts.split(max(1, COPIED_BYTES // max(size, 1)))
    return _joined([keyed_sums(_plain(block)) for block in blocks], 0)


def _row_sums(words: Tensor, columns: Tensor, at_once: int) -> Tensor:
    """Σ over columns of word · key, of words [n, w], the last row perhaps shorter → [n, rows] int64."""
    whole = words.shape[1] // COLUMNS * COLUMNS
    rows = list(words[:, :whole].unflatten(1, (-1, COLUMNS)).split(at_once, 1)) if whole else []  # [n, ≤ at_once, C]
    if whole < words.shape[1]:
        rows.append(words[:, None, whole:])
    return _joined([_products(some, columns[: some.shape[2]]) for some in rows], 1)


def _products(rows: Tensor, columns: Tensor) -> Tensor:
    """Σ over columns, [n, rows] int64. CUDA has no integer matrix product."""
    if not rows.is_cpu:
        return (rows * columns).sum(2)  # widened as it is multiplied
    return torch.mv(rows.to(torch.int64).reshape(-1, rows.shape[2]), columns).view(rows.shape[:2])


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _segment_sums(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """Checksums [n] of parts of ``sizes`` rows each: Σ of the rows' checksums times a key of the place in the part."""
    device, ends = rows.device, np.cumsum(sizes, dtype=np.int64)
    bounds = to_device(torch.from_numpy(np.stack((ends - np.array(sizes, dtype=np.int64), ends))), device)  # [2, n]
    starts = torch.repeat_interleave(bounds[0], bounds[1] - bounds[0], output_size=len(rows))
    places = torch.arange(len(rows), device=device) - starts
    row_keys = keys(1 << len(rows).bit_length(), 2, device)
    until = torch.nn.functional.pad((keyed_sums(rows) * row_keys[places]).cumsum(0), (1, 0))  # modulo 2^64: exact
    return until[bounds[1]] - until[bounds[0]]


@cache
def keys(count: int, stream: int, device: torch.device) -> Tensor:
    """``count`` odd 64-bit keys, the same in every process; another ``stream`` has others."""
    generator = torch.Generator().manual_seed(0x5DC + stream)
    drawn = torch.randint(-(1 << 63), (1 << 63) - 1, (count,), dtype=torch.int64, generator=generator)
    return (drawn | 1).to(device)


def resolve(checksums: Iterable[Digests]) -> list[int]:
    """The checksums as numbers from 0 to 2^64 - 1, one after the other; those on a GPU come in one copy."""
    return [number for one in fetched(list(checksums)) for number in one.tolist()]


def fetched(checksums: Sequence[Digests]) -> list[Words]:
    """Each as an array [n] on the host, one checksum as [1]; those on a GPU come in one copy."""
    on_device = [one.reshape(-1) for one in checksums if isinstance(one, Tensor)]
    copied = to_host(torch.cat(on_device)).numpy().view(np.uint64) if on_device else np.zeros(0, np.uint64)
    pieces = iter(np.split(copied, np.cumsum([len(one) for one in on_device])))
    return [next(pieces) if isinstance(one, Tensor) else np.array(one, np.uint64, ndmin=1) for one in checksums]


def combined(checksums: Iterable[int]) -> int:
    """One 64-bit number for checksums in this order."""
    number = 0
    for value in checksums:
        number = mix(number ^ value)
    return number


@overload
def mix(number: int) -> int: ...
@overload
def mix(number: Words) -> Words: ...
def mix(number: Any) -> Any:
    """64 well mixed bits (the finaliser of splitmix64), of a number or of each in an array."""
    number = (number + 0x9E3779B97F4A7C15) & MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & MASK
    return number ^ (number >> 31)
