"""RMSNorm, SwiGLU, rotation and sums as operators that have one GPU kernel each: every number is read and written once.

The plain versions here define their bits. Sums have one order, and nothing but sums, products, quotients and square
roots is used, all rounded to nearest, so that a kernel can repeat each step. A CPU runs other expressions
(`elementwise.py`), which differ by rounding.
"""

# R rows (tokens), D width, F hidden width, B sequences, S positions, H heads, N width without positions, P rotary width

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from longcat.ops.torch_library import operator, tree_sum

ROWS = 32  # whose contributions to a gain's gradient are added in order
BLOCKS = 256  # of ROWS rows, whose sums are added by halves
# exp(x) = 2^n · exp(r) with |r| ≤ ln 2 / 2; ln 2 in two parts, the first with few bits, so that n · LN2_HIGH is exact
LOG2_E, LN2_HIGH, LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4
EXP_RANGE = (-87.0, 88.0)
EXP_TERMS = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)  # of its series, highest power first


def by_halves(values: Tensor) -> Tensor:
    """values [..., n] → [..., 1]: filled with zeros to a power of two, the second half is added to the first, …

    It is never -0.0, like a sum that starts from zero.
    """
    size = 1 << max(values.shape[-1] - 1, 0).bit_length()
    flat = pad(values, (0, size - values.shape[-1])).reshape(-1, size)
    return tree_sum(flat).view(*values.shape[:-1], 1) + 0.0


@operator("norm_rows(Tensor x, Tensor gain, float eps) -> (Tensor, Tensor)")
def norm_rows(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [R, D], gain [D] → the normed rows [R, D] in x's dtype, 1 / sqrt(mean(x²) + eps) [R, 1] in float32."""
    return _norm_rows(x, gain, eps)


def _norm_rows(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    values = x.float()
    mean = by_halves(values * values) * (1.0 / x.shape[1])
    inverse = (mean + eps).double().sqrt().float().reciprocal()  # a CPU's float32 root is not rounded to nearest
    return (values * inverse).to(x.dtype) * gain.to(x.dtype), inverse


@operator("norm_rows_backward(Tensor grad, Tensor x, Tensor gain, Tensor inverse) -> (Tensor, Tensor)")
def norm_rows_backward(grad: Tensor, x: Tensor, gain: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """→ the gradients of x [R, D] and of the gain [D].

    The gain's: ROWS rows in order, BLOCKS such sums by halves, then what these give in order.
    """
    return _norm_rows_backward(grad, x, gain, inverse)


def _norm_rows_backward(grad: Tensor, x: Tensor, gain: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    normed = x.float() * inverse
    grad_normed = grad.float() * gain.to(x.dtype).float()
    mean = by_halves(grad_normed * normed) * (1.0 / x.shape[1])
    grad_x = ((grad_normed - normed * mean) * inverse).to(x.dtype)
    return grad_x, _sum_over_rows(grad.float() * normed).to(gain.dtype)


@operator("add_norm_rows(Tensor x, Tensor y, Tensor gain, float eps) -> (Tensor, Tensor, Tensor)")
def add_norm_rows(x: Tensor, y: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x, y [R, D] → x + y in their dtype, and `norm_rows` of that."""
    total = x + y
    return total, *_norm_rows(total, gain, eps)


@operator(
    "add_norm_rows_backward(Tensor grad_total, Tensor grad, Tensor total, Tensor gain, Tensor inverse) "
    "-> (Tensor, Tensor)"
)
def add_norm_rows_backward(
    grad_total: Tensor, grad: Tensor, total: Tensor, gain: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """→ the gradients of x, which is that of y too, and of the gain; ``grad_total`` is that of x + y's other uses."""
    grad_x, grad_gain = _norm_rows_backward(grad, total, gain, inverse)
    return grad_total + grad_x, grad_gain


@operator("add_three(Tensor x, Tensor y, Tensor z) -> Tensor")
def add_three(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x, y, z [..., D] → x + y, rounded to their dtype, + z, rounded."""
    return (x + y) + z


@operator("split_rows(Tensor x) -> Tensor")
def split_rows(x: Tensor) -> Tensor:
    """x [R, D] float32 → three bfloat16 parts one below another [3 R, D], the largest first, whose sum is x."""
    large = x.bfloat16()
    rest = x - large
    middle = rest.bfloat16()
    return torch.cat((large, middle, (rest - middle).bfloat16()))


def _sum_over_rows(values: Tensor) -> Tensor:
    """values [R, D] → [D]."""
    num_rows, width = values.shape
    blocks = pad(values, (0, 0, 0, -num_rows % ROWS)).view(-1, ROWS, width)
    sums = values.new_zeros(blocks.shape[0], width)
    for row in blocks.unbind(1):
        sums = sums + row
    total = values.new_zeros(width)
    for part in sums.split(BLOCKS):
        full = pad(part, (0, 0, 0, BLOCKS - part.shape[0]))
        total = total + by_halves(full.t().contiguous())[:, 0]
    return total


def _exp(x: Tensor) -> Tensor:
    """exp of float32 numbers, those beyond EXP_RANGE as at its ends; within 2 units in the last place."""
    x = x.clamp(*EXP_RANGE)
    power = (x * LOG2_E + 0.5).floor()
    rest = x - power * LN2_HIGH - power * LN2_LOW
    series = torch.full_like(rest, EXP_TERMS[0])
    for term in EXP_TERMS[1:]:
        series = series * rest + term
    scale = ((power.nan_to_num(0.0).to(torch.int32) + 127) << 23).view(torch.float32)
    return series * scale


@operator("gate_rows(Tensor gate, Tensor up) -> Tensor")
def gate_rows(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [R, F] → silu(gate), rounded to their dtype, times up, rounded."""
    value = gate.float()
    return (value / (_exp(-value) + 1.0)).to(gate.dtype) * up


@operator("gate_rows_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)")
def gate_rows_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """→ the gradients of gate and up side by side [R, 2F], and the result of `gate_rows` [R, F]."""
    value = gate.float()
    denominator = _exp(-value) + 1.0
    activation = (value / denominator).to(gate.dtype)
    sigmoid = denominator.reciprocal()
    slope = sigmoid * ((1.0 - sigmoid) * value + 1.0)
    grad_gate = ((grad * up).float() * slope).to(gate.dtype)
    return torch.cat((grad_gate, activation * grad), -1), activation * up


def _turned(x: Tensor, angles: Tensor, back: bool) -> Tensor:
    """x [..., S, H, P] with its pairs rotated by ``angles`` [S, P/2], or ``back``; float32, unrounded."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = torch.view_as_real(angles)[:, None].unbind(-1)
    sine = -sine if back else sine
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), -1).flatten(-2)


@operator("rotate_(Tensor(a!) x, Tensor angles) -> Tensor(a!)")
def rotate_(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate x [B, S, H, P] in place by ``angles`` [S, P/2]; its columns are adjacent."""
    return x.copy_(_turned(x, angles, False))


@operator("rotate_back(Tensor x, Tensor angles) -> Tensor")
def rotate_back(x: Tensor, angles: Tensor) -> Tensor:
    """x [B, S, H, N + P] with its last columns rotated back by ``angles`` [S, P/2]."""
    plain, rotary = x.split((x.shape[-1] - 2 * angles.shape[-1], 2 * angles.shape[-1]), -1)
    return torch.cat((plain, _turned(rotary, angles, True).to(x.dtype)), -1)


@operator("join_keys(Tensor k_nope, Tensor k_rope, Tensor angles) -> Tensor")
def join_keys(k_nope: Tensor, k_rope: Tensor, angles: Tensor) -> Tensor:
    """k_nope [B, S, H, N], the heads' rotary key [B, S, P] → keys [B, S, H, N + P], the rotary one rotated."""
    rotated = _turned(k_rope[:, :, None], angles, False).to(k_nope.dtype)
    return torch.cat((k_nope, rotated.expand(-1, -1, k_nope.shape[2], -1)), -1)


@operator(
    "keys_and_values_backward(Tensor grad_key, Tensor grad_value, Tensor angles, int value_width) -> (Tensor, Tensor)"
)
def keys_and_values_backward(
    grad_key: Tensor, grad_value: Tensor, angles: Tensor, value_width: int
) -> tuple[Tensor, Tensor]:
    """→ the gradients of ``expanded`` and ``k_rope``; that of the values is in the last ``value_width`` V columns.

    The rotary key's gradient is summed over the heads by halves, rounded, then rotated back.
    """
    rotary = 2 * angles.shape[-1]
    grad_nope, grad_rotated = grad_key.split((grad_key.shape[-1] - rotary, rotary), -1)
    total = by_halves(grad_rotated.float().transpose(-1, -2))[..., 0].to(grad_key.dtype)
    grad_rope = _turned(total[:, :, None], angles, True)[:, :, 0].to(grad_key.dtype)
    return torch.cat((grad_nope, grad_value[..., grad_value.shape[-1] - value_width :]), -1), grad_rope
