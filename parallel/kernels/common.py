"""What the kernels share: rounding, the tree sum, and the launch option that keeps products unfused."""

from __future__ import annotations

import triton
import triton.language as tl

UNFUSED = {"enable_fp_fusion": False}  # a product is rounded before it is added, as in the plain versions
# Triton's interpreter truncates to bfloat16 or rounds ties away from zero; for it we round the bits by hand
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """float32 → DTYPE, to nearest, ties to even."""
    if tl.bfloat16 == DTYPE and _INTERPRETED:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(value == value, bits, 0x7FC0)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(DTYPE)


@triton.jit
def factor(values):
    """An operand of a product: Triton's interpreter multiplies the bits of bfloat16 numbers, unless they are upcast."""
    if tl.bfloat16 == values.dtype and _INTERPRETED:
        return values.to(tl.float32)
    else:
        return values


@triton.jit
def tree_sum(values, ROWS: tl.constexpr, STEPS: tl.constexpr):
    """values [ROWS, 2^STEPS] → [ROWS]: add the second half of the columns to the first until one is left."""
    for step in tl.static_range(STEPS):
        halves = tl.reshape(values, (ROWS, 2, 1 << (STEPS - 1 - step)))
        values = tl.sum(halves, axis=1)
    return tl.reshape(values, (ROWS,))
