"""Checksums of tensors: every change is noticed, whatever dtype, size or strides; no layout matters but the bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from parallel import checksum
from parallel.checksum import COLUMNS, ROWS_IN_CACHE, Digest, digest, digests, keyed_sum, resolve

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64)
SIZES = (1, 2, 3, 7, COLUMNS - 1, COLUMNS, COLUMNS + 1, 3 * COLUMNS + 5)
KINDS: dict[str, Callable[[Tensor], Digest]] = {"xxh3": digest, "keyed": lambda x: keyed_sum(x.contiguous().view(-1))}


def values(size: int, dtype: torch.dtype) -> Tensor:
    drawn = torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8)
    return (drawn & 1 if dtype is torch.bool else drawn).view(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_flipped_bit_changes_the_checksum(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for size in SIZES:
        x = values(size, dtype)
        (before,) = resolve([KINDS[kind](x)])
        raw = x.view(torch.uint8)
        for position in {0, raw.numel() // 2, raw.numel() - 1}:
            for bit in range(1 if dtype is torch.bool else 8):
                raw[position] ^= 1 << bit
                assert resolve([KINDS[kind](x)]) != [before], (size, position, bit)
                raw[position] ^= 1 << bit
        assert resolve([KINDS[kind](x)]) == [before]


@pytest.mark.parametrize("kind", KINDS)
def test_two_flips_of_one_bit_never_cancel(kind: str) -> None:
    """A sum of 64-bit words with odd keys misses every even number of flips of bit 63."""
    torch.manual_seed(1)
    x = torch.randint(-(1 << 31), (1 << 31) - 1, (2048,), dtype=torch.int32)
    (before,) = resolve([KINDS[kind](x)])
    found = []
    for bit in range(32):
        for _ in range(20):
            places = torch.randperm(1024)[:2] * 2 + 1
            changed = x.clone()
            changed[places] ^= -(1 << 31) if bit == 31 else 1 << bit
            found.append(resolve([KINDS[kind](changed)]) != [before])
    assert all(found)


@pytest.mark.parametrize("kind", KINDS)
def test_exchanged_values_and_lengths_change_the_checksum(kind: str) -> None:
    x = torch.arange(2 * COLUMNS, dtype=torch.float32)
    (before,) = resolve([KINDS[kind](x)])
    for first, second in ((0, 1), (0, COLUMNS), (5, 2 * COLUMNS - 1)):
        y = x.clone()
        y[first], y[second] = x[second], x[first]
        assert resolve([KINDS[kind](y)]) != [before]
    zeros = [resolve([KINDS[kind](torch.zeros(size))])[0] for size in (0, 1, 2, COLUMNS)]
    assert len(set(zeros)) == 4, "zeros of other lengths have other checksums"


def test_gpu_sum_covers_several_chunks() -> None:
    at_once = ROWS_IN_CACHE * COLUMNS
    x = torch.zeros(at_once + COLUMNS + 3, dtype=torch.int32)
    (before,) = resolve([keyed_sum(x)])
    for position in (0, at_once - 1, at_once, at_once + COLUMNS, x.numel() - 1):
        x[position] = 1
        assert resolve([keyed_sum(x)]) != [before]
        x[position] = 0


def test_views_and_scalars_count_by_their_values() -> None:
    x = torch.randn(6, 8)
    for view in (x.t(), x[:, 2:5], x[::2], x[3], x[2, 3], x[:, :0], x.t()[1:3]):
        assert digest(view) == digest(view.contiguous().clone())
    assert digest(x.t()) != digest(x)
    parameter = torch.nn.Parameter(x)
    assert digest(parameter) == digest(x)
    spectrum = torch.randn(5, dtype=torch.complex64)
    assert digest(spectrum.conj()) == digest(spectrum.conj().resolve_conj().clone()) != digest(spectrum)


def test_tensors_without_memory_are_refused() -> None:
    for tensor in (torch.empty(3, device="meta"), torch.eye(3).to_sparse()):
        with pytest.raises(TypeError, match="own memory"):
            digest(tensor)


def test_copy_in_host_memory_can_have_the_checksum_of_a_gpu() -> None:
    values = torch.randn(1000)
    assert resolve([digest(values, as_on_gpu=True)]) == resolve([keyed_sum(values)])
    assert resolve([digest(values)]) != resolve([keyed_sum(values)])


def test_keyed_sum_does_not_depend_on_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU takes more rows at once than a CPU, and both must agree."""
    x = torch.randint(-(1 << 31), (1 << 31) - 1, (9 * COLUMNS + 5,), dtype=torch.int32)
    expected = int(keyed_sum(x))
    monkeypatch.setattr("parallel.checksum.ROWS_IN_CACHE", 2)
    assert int(keyed_sum(x)) == expected
    assert int(keyed_sum(x[: 9 * COLUMNS])) != expected


@pytest.mark.parametrize("as_on_gpu", [False, True], ids=["xxh3", "keyed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batched_checksums_are_those_of_each_part(dtype: torch.dtype, as_on_gpu: bool) -> None:
    torch.manual_seed(2)
    for count in (1, 3, 70):
        for size in (0, *SIZES[:5], COLUMNS + 1):
            parts = values(count * size, dtype).view(count, size)
            expected = resolve(digest(part.clone(), as_on_gpu) for part in parts)
            assert resolve([digests(parts, as_on_gpu=as_on_gpu)]) == expected
            assert resolve([digests(parts, skip=0, as_on_gpu=as_on_gpu)]) == expected[1:]
    parts = values(6 * 40, dtype).view(5, 8, -1)[:, 1:5]
    assert resolve([digests(parts, as_on_gpu=as_on_gpu)]) == resolve(digest(part, as_on_gpu) for part in parts)


def test_parts_of_more_than_a_batch_have_their_own_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = torch.randn(5, 3 * COLUMNS + 7)
    expected = resolve(keyed_sum(part) for part in parts)
    for rows in (1, 2, 3, 8):
        monkeypatch.setattr("parallel.checksum.ROWS_IN_CACHE", rows)
        assert resolve([digests(parts, as_on_gpu=True)]) == expected


@pytest.mark.parametrize("as_on_gpu", [False, True], ids=["xxh3", "keyed"])
def test_parts_of_unequal_rows_are_told_apart(as_on_gpu: bool) -> None:
    """A part's checksum depends on its own rows and their order alone; an empty part has one too."""
    torch.manual_seed(3)
    sizes = [3, 0, 5, 1]
    rows = torch.randn(sum(sizes), 9).bfloat16()
    found = resolve([digests(rows, sizes, as_on_gpu=as_on_gpu)])
    for part, expected in zip(rows.split(sizes), found, strict=True):
        assert resolve([digests(part.clone(), [len(part)], as_on_gpu=as_on_gpu)]) == [expected]
    assert resolve([digests(rows, sizes, skip=2, as_on_gpu=as_on_gpu)]) == found[:2] + found[3:]
    assert len(set(found)) == 4
    for first, second in ((3, 4), (3, 7)):  # rows of the third part
        changed = rows.clone()
        changed[[first, second]] = rows[[second, first]]
        now = resolve([digests(changed, sizes, as_on_gpu=as_on_gpu)])
        assert [a == b for a, b in zip(now, found, strict=True)] == [True, True, False, True]
    zeros = torch.zeros(9, 4)
    assert len(set(resolve([digests(zeros, sizes, as_on_gpu=as_on_gpu)]))) == 4


def test_every_flipped_bit_changes_its_parts_checksum_alone() -> None:
    torch.manual_seed(4)
    sizes = [2, 3, 1]
    rows = values(6 * 5, torch.bfloat16).view(6, 5)
    for kind in (None, sizes):
        before, raw = resolve([digests(rows, kind, as_on_gpu=True)]), rows.view(torch.uint8)
        for row in range(6):
            for bit in range(8):
                raw[row, 3] ^= 1 << bit
                now = resolve([digests(rows, kind, as_on_gpu=True)])
                raw[row, 3] ^= 1 << bit
                changed = [i for i, (a, b) in enumerate(zip(now, before, strict=True)) if a != b]
                assert changed == [row if kind is None else (0, 0, 1, 1, 1, 2)[row]]


def test_same_part_for_all_is_read_once() -> None:
    x = torch.randn(6)
    assert resolve([digests(x.expand(4, 6))]) == [digest(x)]


def test_tensor_that_begins_inside_a_word() -> None:
    x = torch.randn(9).bfloat16()[1:]
    assert resolve([keyed_sum(x)]) == resolve([keyed_sum(x.clone())])


def test_parts_of_any_strides_are_copied_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Owners' parts along another dimension have the checksums of their copies, a few parts at a time."""
    parts = torch.randn(5, 16, 9).movedim(1, 0)  # 16 parts of 5 × 9
    monkeypatch.setattr("parallel.checksum.COPIED_BYTES", 2 * parts[0].nbytes)
    sizes: list[int] = []
    plain = checksum._plain
    monkeypatch.setattr(checksum, "_plain", lambda block: sizes.append(len(block)) or plain(block))
    found = digests(parts, as_on_gpu=True)
    assert sizes == [2] * 8
    assert resolve([found]) == resolve(digest(part.contiguous(), as_on_gpu=True) for part in parts)


def test_one_element_of_a_strided_view_has_a_checksum() -> None:
    """Torch calls it contiguous, whatever its stride."""
    value = torch.randn(2)[1::2]
    assert resolve([digest(value, as_on_gpu=True)]) == resolve([digest(value.clone(), as_on_gpu=True)])
