"""Rotation by positions: queries and keys, on a GPU in one pass with what is copied beside them."""

# B sequences, S positions, H heads, N width without positions, R rotary width, C = N + R, V value width

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longcat.faults import Place, passed, passed_all
from longcat.ops.calls import observed
from longcat.ops.fusion import Permutable
from longcat.ops.one_pass import join_keys, keys_and_values_backward, rotate_, rotate_back
from longcat.ops.permuted import along, rolled


@Permutable
def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().contiguous().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * angles[:, None, :]).flatten(-2).to(x.dtype)


@_rotated.permuted_by
def _rotated_permuted(x: Tensor, angles: Tensor) -> Tensor:
    """Heads, and positions with their angles, are rolled; pairs stay, as the rest of a row is scalar code on a CPU."""
    turned = rolled(angles, 0)
    return rolled(along(-2, lambda heads: _rotated.compute(heads, turned), rolled(x, -3)), -3, back=True)


@observed("rotary")
class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Tensor) -> Tensor:
        ctx.save_for_backward(angles)
        return passed(Place.activation, "rotary", _rotated(x, angles))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return passed(Place.gradient, "rotary", _rotated(grads[0], ctx.saved_tensors[0].conj())), None


def rotary(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the interleaved pairs of x [..., S, H, R] by ``angles`` [S, R/2] (`longcat.rope`), in float32."""
    return _Rotary.apply(x, angles)


def _moved(x: Tensor, rotary: int, back: bool = False) -> Tensor:
    """x [B, S, ..., N + rotary] with its positions rolled, and within a row the N columns and the rotary pairs."""
    plain, turning = x.split((x.shape[-1] - rotary, rotary), -1)
    pairs = rolled(turning.unflatten(-1, (rotary // 2, 2)), -2, back).flatten(-2)
    return rolled(torch.cat((rolled(plain, -1, back), pairs), -1), 1, back)


def _moved_angles(angles: Tensor) -> Tensor:
    """angles [S, R/2] of `_moved` positions and pairs."""
    return rolled(rolled(angles, 0), 1)


@Permutable
def _rotate_in_place(x: Tensor, angles: Tensor) -> Tensor:
    return rotate_(x, angles)  # type: ignore[no-any-return]


@_rotate_in_place.permuted_by
def _rotate_in_place_permuted(x: Tensor, angles: Tensor) -> Tensor:
    rotary = x.shape[-1]
    return x.copy_(_moved(_rotate_in_place.compute(_moved(x, rotary), _moved_angles(angles)), rotary, back=True))


@Permutable
def _rotate_back(x: Tensor, angles: Tensor) -> Tensor:
    return rotate_back(x, angles)  # type: ignore[no-any-return]


@_rotate_back.permuted_by
def _rotate_back_permuted(x: Tensor, angles: Tensor) -> Tensor:
    rotary = 2 * angles.shape[-1]
    return _moved(_rotate_back.compute(_moved(x, rotary), _moved_angles(angles)), rotary, back=True)


@Permutable
def _join_keys(k_nope: Tensor, k_rope: Tensor, angles: Tensor) -> Tensor:
    return join_keys(k_nope, k_rope, angles)  # type: ignore[no-any-return]


@_join_keys.permuted_by
def _join_keys_permuted(k_nope: Tensor, k_rope: Tensor, angles: Tensor) -> Tensor:
    rotary = k_rope.shape[-1]
    key = _join_keys.compute(_moved(k_nope, 0), _moved(k_rope, rotary), _moved_angles(angles))
    return _moved(key, rotary, back=True)


@Permutable
def _keys_and_values_backward(
    grad_key: Tensor, grad_value: Tensor, angles: Tensor, value_width: int
) -> tuple[Tensor, Tensor]:
    return keys_and_values_backward(grad_key, grad_value, angles, value_width)  # type: ignore[no-any-return]


@_keys_and_values_backward.permuted_by
def _keys_and_values_backward_permuted(
    grad_key: Tensor, grad_value: Tensor, angles: Tensor, value_width: int
) -> tuple[Tensor, Tensor]:
    """Heads stay: the rotary key's gradient is a sum over them."""
    rotary = 2 * angles.shape[-1]
    of_value = _moved(grad_value[..., grad_value.shape[-1] - value_width :], 0)
    moved = _moved(grad_key, rotary), of_value, _moved_angles(angles)
    of_expanded, of_rope = _keys_and_values_backward.compute(*moved, value_width)
    of_nope, of_value = (
        _moved(part, 0, back=True) for part in of_expanded.split((grad_key.shape[-1] - rotary, value_width), -1)
    )
    return torch.cat((of_nope, of_value), -1), _moved(of_rope, rotary, back=True)


def rotate_heads(x: Tensor, head_width: int, angles: Tensor) -> None:
    """On a GPU: rotate the last columns of each head of x [B, q, H · head_width] in place, by ``angles`` [q, R/2]."""
    heads = x.unflatten(-1, (x.shape[-1] // head_width, head_width))
    _rotate_in_place(heads[..., head_width - 2 * angles.shape[-1] :], angles)


def rotate_heads_back(grad: Tensor, head_width: int, angles: Tensor) -> Tensor:
    """The gradient of what `rotate_heads` was given."""
    return _rotate_back(grad.unflatten(-1, (grad.shape[-1] // head_width, head_width)), angles).view(grad.shape)


@observed("keys_and_values")
class _KeysAndValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, expanded: Tensor, k_rope: Tensor, angles: Tensor, nope: int, width: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(angles)
        ctx.value_width = expanded.shape[-1] - nope
        key = passed(Place.activation, "rotary", _join_keys(expanded[..., :nope], k_rope, angles))
        return key, expanded[..., max(expanded.shape[-1] - width, 0) :]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grads_in = _keys_and_values_backward(grads[0], grads[1], ctx.saved_tensors[0], ctx.value_width)
        return *passed_all(Place.gradient, "rotary", grads_in), None, None, None


def expanded_keys(expanded: Tensor, k_rope: Tensor, angles: Tensor, nope: int, width: int) -> tuple[Tensor, Tensor]:
    """On a GPU in one pass: expanded [B, S, H, N + V] and the rotary key of all heads k_rope [B, S, R] → keys, values.

    Keys are [B, S, H, N + R], with the rotated k_rope in their last columns. Values are a view of ``expanded``, its
    last ``width`` columns where it has so many: V behind some columns of keys, which attention takes for values too.
    ``nope`` is N.
    """
    return _KeysAndValues.apply(expanded, k_rope, angles, nope, width)  # type: ignore[no-any-return]
