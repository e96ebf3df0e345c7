"""What the kernels share: one rounding, one order of sums, and the launch setting that keeps products unfused."""

from __future__ import annotations

import triton
import triton.language as tl

UNFUSED = {"enable_fp_fusion": False}  # a product is rounded before it is added, as in the plain versions
# Triton's interpreter cuts bfloat16 off or rounds its ties away; there the bits are rounded by hand
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def power_of_two(number: int) -> int:
    """The next power of two from ``number`` on."""
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
def sum_halves(values, ROWS: tl.constexpr, STEPS: tl.constexpr):
    """values [ROWS, 2^STEPS] → [ROWS]: the second half is added to the first until one number is left."""
    for step in tl.static_range(STEPS):
        halves = tl.reshape(values, (ROWS, 2, 1 << (STEPS - 1 - step)))
        values = tl.sum(halves, axis=1)
    return tl.reshape(values, (ROWS,))
