"""Grouped GEMM: every expert's rows times that expert's matrix, in one call.

A GPU has a kernel for it: torch's `grouped_mm`, or one of this project where that is a loop. On a CPU this is one GEMM
per expert, and the CPU's library generates code for every new shape: half a millisecond and half a MiB for each number
of rows that an expert ever gets. So the GEMMs here take whole blocks of rows. A product over rows also computes some
rows of the next experts, whose own GEMMs then overwrite them; a sum over rows is padded with zeros.

On a processor with AMX a call of that library costs as much as multiplying some ten rows. Experts with equally many
rows are one batched call; `padded_capacity` says where padding rows are worth it.
"""

# P rows sorted by expert, I input width, O output width, E experts

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, pad

from longcat.faults import Place, passed
from longcat.ops.calls import named, observed
from longcat.ops.elementwise import joined_swiglu, joined_swiglu_backward
from longcat.ops.matmul import (
    StoreWeightGrad,
    compute_or_store,
    cpu_has_amx,
    detach_if_deferred,
    upcast,
)
from longcat.ops.permuted import along, is_permuting, matmul, rolled
from longcat.ops.rows import row_products
from longcat.ops.torch_library import operator

BLOCK = 16  # rows; the GEMMs' shapes are multiples of it
_CALL_OVERHEAD_MATTERS = cpu_has_amx()
MAX_PADDING = 1.25  # rows with padding over rows without: beyond it a batch costs more than it saves


def padded_capacity(counts: Tensor, like: Tensor) -> int | None:
    """Rows that each expert is padded to so that all are one batch; None where ``counts`` [E] should not be padded.

    Only for bfloat16 on a CPU with AMX: elsewhere a GEMM takes much longer than the overhead of its call.
    """
    if not _CALL_OVERHEAD_MATTERS or like.device.type != "cpu" or like.dtype is not torch.bfloat16:
        return None
    capacity = -(-int(counts.max()) // BLOCK) * BLOCK
    return capacity if 0 < capacity * counts.shape[0] <= MAX_PADDING * int(counts.sum()) else None


def _batches(ends: Tensor, *rows: Tensor) -> list[Tensor] | None:
    """Rows [P, ...] as [E, P / E, ...] if every expert has equally many rows in whole blocks, else None."""
    num_experts, total = ends.shape[0], rows[0].shape[0]
    each = total // num_experts
    if each == 0 or each % BLOCK or ends.tolist() != list(range(each, total + 1, each)):
        return None
    return [x.unflatten(0, (num_experts, each)) for x in rows]


def _block_ranges(ends: Tensor, total: int) -> Iterator[tuple[int, int, int, int]]:
    """(start, end) of each expert's rows, and (first, last) of the whole blocks around them, within ``total`` rows."""
    start = 0
    for end in ends.tolist():
        last = start + -(-(end - start) // BLOCK) * BLOCK
        yield start, end, (start if last <= total else max(0, start + total - last)), min(last, total)
        start = end


def torch_groups(capability: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether torch has a grouped kernel for it; else it copies the ends to the host and loops over the experts.

    torch 2.13 has one for bfloat16 on Hopper and datacenter Blackwell.
    """
    return dtype is torch.bfloat16 and capability[0] in (9, 10)


@operator("grouped_rows(Tensor a, Tensor b, Tensor ends) -> Tensor")
def grouped_rows(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """`grouped_product` on a GPU for which torch has no grouped kernel; this plain version loops."""
    return grouped_mm(a, b, offs=ends)


@operator("grouped_sums(Tensor a, Tensor b, Tensor ends) -> Tensor")
def grouped_sums(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """`grouped_sum` likewise."""
    return grouped_mm(a.t(), b, offs=ends)


def _rows_on_gpu(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    if torch_groups(torch.cuda.get_device_capability(a.device), a.dtype):
        return grouped_mm(a, b, offs=ends)
    return grouped_rows(a, b, ends)  # type: ignore[no-any-return]


def _sums_on_gpu(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    if torch_groups(torch.cuda.get_device_capability(a.device), a.dtype):
        return grouped_mm(a.t(), b, offs=ends)
    return grouped_sums(a, b, ends)  # type: ignore[no-any-return]


def grouped_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Rows a [P, I] times their expert's b [E, I, O] → [P, O]; ``ends`` [E] int32: the row after each expert's last.

    Accumulates in float32 and rounds once.
    """
    if a.device.type != "cpu":
        if is_permuting():
            return along(-1, lambda matrices: _rows_on_gpu(a, matrices, ends), b)  # type: ignore[no-any-return]
        return _rows_on_gpu(a, b, ends)
    a_upcast, b_upcast = upcast(a, b)
    if batch := _batches(ends, a_upcast):
        return matmul(batch[0], b_upcast).flatten(0, 1).to(a.dtype)
    out = a_upcast.new_empty(a.shape[0], b.shape[2])
    for (start, end, first, last), matrix in zip(_block_ranges(ends, a.shape[0]), b_upcast.unbind(0), strict=True):
        if first == start < end:
            matmul(a_upcast[start:last], matrix, out[start:last])
        elif start < end:  # the block would end after the last row: it begins earlier, over results of other experts
            out[start:end] = matmul(a_upcast[first:last], matrix)[start - first : end - first]
    return out.to(a.dtype)


def grouped_sum(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Σ over each expert's rows of a [P, O] ⊗ b [P, I] → [E, O, I]; zeros for an expert without rows."""
    if a.device.type != "cpu":
        if is_permuting():
            out = _sums_on_gpu(rolled(a, 1), rolled(b, 1), ends)
            return rolled(rolled(out, 1, back=True), 2, back=True)
        return _sums_on_gpu(a, b, ends)
    a_upcast, b_upcast = upcast(a, b)
    if batch := _batches(ends, a_upcast, b_upcast):
        return matmul(batch[0].transpose(1, 2), batch[1]).to(a.dtype)
    out = a_upcast.new_empty(ends.shape[0], a.shape[1], b.shape[1])
    ranges = list(_block_ranges(ends, a.shape[0]))
    buffer = a_upcast.new_empty(max(last - first for _, _, first, last in ranges), a.shape[1])
    for (start, end, first, last), target in zip(ranges, out.unbind(0), strict=True):
        rows = a_upcast[first:last]
        if start == end:
            target.zero_()
            continue
        if (first, last) != (start, end):
            rows = buffer[: last - first]
            rows[: start - first].zero_()
            rows[start - first : end - first] = a_upcast[start:end]
            rows[end - first :].zero_()
        matmul(rows.t(), b_upcast[first:last], target)
    return out.to(a.dtype)


def weight_gradient(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """`grouped_sum`, as an operator."""
    return passed(Place.gradient, "experts weight", grouped_sum(grad, x, ends))


_weight_gradient = named("experts weight", weight_gradient)


@observed("experts")
class _GroupedLinear(torch.autograd.Function):
    """``x`` are rows [P, I], or if ``gated`` the gate and up [P, 2I] of a SwiGLU whose result is not saved."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        ends: Tensor,
        store: StoreWeightGrad | None,
        gated: bool,
        x: Tensor,
        log_scale: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(weight, ends, x)
        ctx.store, ctx.gated = store, gated
        x = joined_swiglu(x) if gated else x
        return passed(Place.activation, "experts", grouped_product(x, weight.to(x.dtype).transpose(1, 2), ends))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, ends, x = ctx.saved_tensors
        grad, grad_x, grad_scale = grads[0].contiguous(), None, None
        if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
            grad_x = passed(Place.gradient, "experts", grouped_product(grad, weight.to(grad.dtype), ends))
            if ctx.gated:
                grad_hidden = grad_x
                grad_x, x = joined_swiglu_backward(grad_hidden, x)
                if ctx.needs_input_grad[5]:
                    grad_scale = row_products(grad_hidden, x)
        elif ctx.gated:
            x = joined_swiglu(x)
        grad_w = None
        if ctx.store is not None or ctx.needs_input_grad[0]:
            grad_w = compute_or_store(ctx.store, lambda: _weight_gradient(grad, x, ends))
        return grad_w, None, None, None, grad_x, grad_scale


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, store: StoreWeightGrad | None = None) -> Tensor:
    """x [P, I] sorted by expert, weight [E, O, I], ``ends`` [E] int32: the row after each expert's last → [P, O].

    Experts may have no rows, and P may be 0; their weight gradient is zero. ``store`` as in `linear`.
    """
    return _grouped(x, weight, ends, store, gated=False)


def grouped_gated_linear(
    gate_up: Tensor,
    weight: Tensor,
    ends: Tensor,
    store: StoreWeightGrad | None = None,
    log_scale: Tensor | None = None,
) -> Tensor:
    """`grouped_linear` of x = silu(gate) · up [P, I], which autograd does not save; gate_up [P, 2I] has both.

    ``log_scale`` [P] float32 are zeros: the logarithm of a factor of each row of the result. Its gradient, Σ grad ·
    result, is found as Σ grad_x · x, without the result.
    """
    return _grouped(gate_up, weight, ends, store, True, log_scale)


def _grouped(
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    store: StoreWeightGrad | None,
    gated: bool,
    log_scale: Tensor | None = None,
) -> Tensor:
    weight = detach_if_deferred(weight, store, x)
    width, height = weight.shape[2], weight.shape[1]
    align = 16 // x.element_size()  # grouped_mm needs rows of a multiple of 16 bytes
    pad_in, pad_out = -width % align, -height % align
    if not pad_in and not pad_out:
        return _GroupedLinear.apply(weight, ends, store, gated, x, log_scale)

    def store_unpadded(compute: Callable[[], Tensor]) -> None:
        assert store is not None
        store(lambda: compute()[:, :height, :width])

    padded = _GroupedLinear.apply(
        pad(weight, (0, pad_in, 0, pad_out)),
        ends,
        None if store is None else store_unpadded,
        gated,
        pad(x.unflatten(-1, (2 if gated else 1, width)), (0, pad_in)).flatten(-2),
        log_scale,
    )
    return padded[:, :height]
