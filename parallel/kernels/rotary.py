"""Kernels of the rotation in `longcat/ops/one_pass.py`: a program holds all heads of a token."""

# B sequences, S positions, H heads, N width without positions, P rotary width, C = N + P, V value width

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.kernels.common import UNFUSED, power_of_two, rounded, tree_sum

WARPS = 8


@triton.jit
def _angles(angles, position, pairs, PAIRS: tl.constexpr, BACK: tl.constexpr):
    """Cosines and sines [PAIRS] of a position; the sines negative for the rotation back."""
    pair = tl.arange(0, PAIRS)
    start = angles + position * 2 * pairs + 2 * pair
    cosine = tl.load(start, mask=pair < pairs, other=0.0)
    sine = tl.load(start + 1, mask=pair < pairs, other=0.0)
    if BACK:
        sine = -sine
    return cosine, sine


@triton.jit
def _turned(values, cosine, sine, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    """values [HEADS, 2 · PAIRS] with their pairs rotated, in float32."""
    even, odd = tl.split(tl.reshape(values.to(tl.float32), (HEADS, PAIRS, 2)))
    first = even * cosine[None, :] - odd * sine[None, :]
    second = even * sine[None, :] + odd * cosine[None, :]
    return tl.reshape(tl.join(first, second), (HEADS, 2 * PAIRS))


@triton.jit
def rotate_kernel(
    x, angles, positions, heads, token_stride, head_stride, pairs,
    HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head, turning = tl.arange(0, HEADS)[:, None], tl.arange(0, 2 * PAIRS)[None, :]
    place = x + token * token_stride + head * head_stride + turning
    mask = (head < heads) & (turning < 2 * pairs)
    cosine, sine = _angles(angles, token % positions, pairs, PAIRS, False)
    turned = _turned(tl.load(place, mask=mask, other=0.0), cosine, sine, HEADS, PAIRS)
    tl.store(place, rounded(turned, x.dtype.element_ty), mask=mask)


def _has_even_tokens(x: Tensor) -> bool:
    """Whether x [B, S, H, P] has adjacent columns, and tokens that are evenly apart over all sequences."""
    return x.stride(3) == 1 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1))


def rotate_(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate x [B, S, H, P] in place by ``angles`` [S, P/2]; its columns are adjacent, its tokens evenly apart."""
    batch, positions, heads, width = x.shape
    if x.numel():
        assert _has_even_tokens(x)
        sizes = _sizes(heads, 1, width // 2)
        del sizes["NOPE"]
        rotate_kernel[(batch * positions,)](
            x, torch.view_as_real(angles).contiguous(), positions, heads, x.stride(1), x.stride(2), width // 2, **sizes
        )
    return x


@triton.jit
def rotate_back_kernel(
    x, angles, out, positions, heads, nope, pairs,
    HEADS: tl.constexpr, NOPE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    width = nope + 2 * pairs
    head = tl.arange(0, HEADS)[:, None]
    column, turning = tl.arange(0, NOPE)[None, :], tl.arange(0, 2 * PAIRS)[None, :]
    start = token * heads * width + head * width
    mask = (head < heads) & (column < nope)
    tl.store(out + start + column, tl.load(x + start + column, mask=mask), mask=mask)
    mask = (head < heads) & (turning < 2 * pairs)
    cosine, sine = _angles(angles, token % positions, pairs, PAIRS, True)
    turned = _turned(tl.load(x + start + nope + turning, mask=mask, other=0.0), cosine, sine, HEADS, PAIRS)
    tl.store(out + start + nope + turning, rounded(turned, out.dtype.element_ty), mask=mask)


def _sizes(heads: int, nope: int, pairs: int) -> dict[str, Any]:
    return {
        "HEADS": power_of_two(heads), "NOPE": power_of_two(max(nope, 1)), "PAIRS": power_of_two(pairs),
        "num_warps": WARPS, **UNFUSED,
    }  # fmt: skip


def rotate_back(x: Tensor, angles: Tensor) -> Tensor:
    """x [B, S, H, N + P] with its last columns rotated back by ``angles`` [S, P/2]."""
    x, pairs = x.contiguous(), angles.shape[1]
    out, (batch, positions, heads, width) = torch.empty_like(x), x.shape
    if x.numel():
        nope = width - 2 * pairs
        rotate_back_kernel[(batch * positions,)](
            x, torch.view_as_real(angles).contiguous(), out, positions, heads, nope, pairs,
            **_sizes(heads, nope, pairs),
        )  # fmt: skip
    return out


@triton.jit
def keys_kernel(
    k_nope, k_rope, angles, key, positions, token_stride, head_stride, rope_stride, heads, nope, pairs,
    HEADS: tl.constexpr, NOPE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    width = nope + 2 * pairs
    head = tl.arange(0, HEADS)[:, None]
    column, turning = tl.arange(0, NOPE)[None, :], tl.arange(0, 2 * PAIRS)[None, :]
    row = token * heads + head
    mask = (head < heads) & (column < nope)
    kept = tl.load(k_nope + token * token_stride + head * head_stride + column, mask=mask)
    tl.store(key + row * width + column, kept, mask=mask)
    cosine, sine = _angles(angles, token % positions, pairs, PAIRS, False)
    shared = tl.load(k_rope + token * rope_stride + turning, mask=turning < 2 * pairs, other=0.0)
    turned = rounded(_turned(shared, cosine, sine, 1, PAIRS), key.dtype.element_ty)
    mask = (head < heads) & (turning < 2 * pairs)
    tl.store(key + row * width + nope + turning, tl.broadcast_to(turned, (HEADS, 2 * PAIRS)), mask=mask)


def join_keys(k_nope: Tensor, k_rope: Tensor, angles: Tensor) -> Tensor:
    """k_nope [B, S, H, N], the heads' rotary key [B, S, P] → keys [B, S, H, N + P], the rotary one rotated."""
    pairs, (batch, positions, heads, nope) = angles.shape[1], k_nope.shape
    k_nope = k_nope if _has_even_tokens(k_nope) else k_nope.contiguous()
    flat = k_rope.reshape(batch * positions, 2 * pairs)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    key = k_nope.new_empty(batch, positions, heads, nope + 2 * pairs)
    if key.numel():
        keys_kernel[(batch * positions,)](
            k_nope, flat, torch.view_as_real(angles).contiguous(), key, positions, k_nope.stride(1), k_nope.stride(2),
            flat.stride(0), heads, nope, pairs, **_sizes(heads, nope, pairs),
        )  # fmt: skip
    return key


@triton.jit
def keys_backward_kernel(
    grad_key, grad_value, angles, grad_expanded, grad_rope, positions, heads, nope, pairs, value_width, padded_width,
    HEADS: tl.constexpr, STEPS: tl.constexpr, NOPE: tl.constexpr, PAIRS: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = grad_rope.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    width = nope + 2 * pairs
    head = tl.arange(0, HEADS)[:, None]
    column, turning, of_value = (
        tl.arange(0, NOPE)[None, :], tl.arange(0, 2 * PAIRS)[None, :], tl.arange(0, VALUE)[None, :],
    )  # fmt: skip
    source = token * heads + head
    target = grad_expanded + source * (nope + value_width)
    mask = (head < heads) & (column < nope)
    tl.store(target + column, tl.load(grad_key + source * width + column, mask=mask), mask=mask)
    mask = (head < heads) & (of_value < value_width)
    of_padded = padded_width - value_width + of_value
    tl.store(target + nope + of_value, tl.load(grad_value + source * padded_width + of_padded, mask=mask), mask=mask)
    mask = (head < heads) & (turning < 2 * pairs)
    rotary = tl.load(grad_key + source * width + nope + turning, mask=mask, other=0.0).to(tl.float32)
    total = rounded(tree_sum(tl.trans(rotary), 2 * PAIRS, STEPS) + 0.0, DTYPE)
    cosine, sine = _angles(angles, token % positions, pairs, PAIRS, True)
    turned = _turned(tl.reshape(total, (1, 2 * PAIRS)), cosine, sine, 1, PAIRS)
    tl.store(grad_rope + token * 2 * pairs + turning, rounded(turned, DTYPE), mask=turning < 2 * pairs)


def keys_and_values_backward(
    grad_key: Tensor, grad_value: Tensor, angles: Tensor, value_width: int
) -> tuple[Tensor, Tensor]:
    """→ the gradients of ``expanded`` and ``k_rope``; that of the values is in the last ``value_width`` V columns."""
    grad_key, grad_value, pairs = grad_key.contiguous(), grad_value.contiguous(), angles.shape[1]
    batch, positions, heads, width = grad_key.shape
    nope = width - 2 * pairs
    grad_expanded = grad_key.new_empty(batch, positions, heads, nope + value_width)
    grad_rope = grad_key.new_empty(batch, positions, 2 * pairs)
    if grad_key.numel():
        keys_backward_kernel[(batch * positions,)](
            grad_key, grad_value, torch.view_as_real(angles).contiguous(), grad_expanded, grad_rope, positions, heads,
            nope, pairs, value_width, grad_value.shape[3],
            STEPS=power_of_two(heads).bit_length() - 1, VALUE=power_of_two(value_width), **_sizes(heads, nope, pairs),
        )  # fmt: skip
    return grad_expanded, grad_rope
