"""Grouped products: every expert's rows by that expert's matrix, in one call.

A GPU has a kernel for it (`grouped_mm`). A CPU multiplies expert by expert, whatever the call, and its library prepares
code for every new shape: half a millisecond and half a MiB for each number of rows that an expert ever gets. So here
the products take whole blocks of rows: a product over rows runs on into rows of the next experts, which overwrite what
it left there; a sum over rows gets zeros.

A call of that library costs as much as multiplying some ten rows on a processor with AMX. Experts with equally many
rows are one call, a batch; `padded_capacity` says where it is worth rows of nobody to have them so.
"""

# P rows sorted by expert, I input width, O output width, E experts

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, pad

from longcat.ops.matmul import Defer, compute_or_defer, cpu_has_amx, input_and_gradients, input_of, source_of, upcast

BLOCK = 16  # rows; the products' shapes differ by multiples of it
_CALLS_COUNT = cpu_has_amx()
MAX_PADDING = 1.25  # rows with those of nobody, over rows: beyond it a batch costs what it saves


def padded_capacity(counts: Tensor, like: Tensor) -> int | None:
    """Rows that each expert should have so that all are one batch; None where they should have their ``counts`` [E].

    Only for bfloat16 on a CPU with AMX: elsewhere a product takes so long that its call does not count.
    """
    if not _CALLS_COUNT or like.device.type != "cpu" or like.dtype is not torch.bfloat16:
        return None
    room = -(-int(counts.max()) // BLOCK) * BLOCK
    return room if 0 < room * counts.shape[0] <= MAX_PADDING * int(counts.sum()) else None


def _batches(ends: Tensor, *rows: Tensor) -> list[Tensor] | None:
    """Rows [P, ...] as [E, P / E, ...] where every expert has equally many, which are whole blocks."""
    num_experts, total = ends.shape[0], rows[0].shape[0]
    each = total // num_experts
    if each == 0 or each % BLOCK or ends.tolist() != list(range(each, total + 1, each)):
        return None
    return [one.unflatten(0, (num_experts, each)) for one in rows]


def _stretches(ends: Tensor, total: int) -> Iterator[tuple[int, int, int, int]]:
    """(start, end) of each expert's rows, and the (first, last) of whole blocks around them, inside ``total`` rows."""
    start = 0
    for end in ends.tolist():
        last = start + -(-(end - start) // BLOCK) * BLOCK
        yield start, end, (start if last <= total else max(0, start + total - last)), min(last, total)
        start = end


def grouped_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Rows a [P, I] times their expert's b [E, I, O] → [P, O]; ``ends`` [E] int32: the row after each expert's last.

    Accumulates in float32, rounds once.
    """
    wide_a, wide_b = upcast(a, b)
    if a.device.type != "cpu":
        return grouped_mm(wide_a, wide_b, offs=ends).to(a.dtype)
    if batch := _batches(ends, wide_a):
        return torch.bmm(batch[0], wide_b).flatten(0, 1).to(a.dtype)
    out = wide_a.new_empty(a.shape[0], b.shape[2])
    for (start, end, first, last), matrix in zip(_stretches(ends, a.shape[0]), wide_b.unbind(0), strict=True):
        if first == start < end:
            torch.mm(wide_a[start:last], matrix, out=out[start:last])
        elif start < end:  # the block would end after the last row: it begins earlier, where others' results stand
            out[start:end] = torch.mm(wide_a[first:last], matrix)[start - first : end - first]
    return out.to(a.dtype)


def grouped_sum(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Σ over each expert's rows of a [P, O] ⊗ b [P, I] → [E, O, I]; zeros for an expert without rows."""
    wide_a, wide_b = upcast(a, b)
    if a.device.type != "cpu":
        return grouped_mm(wide_a.t(), wide_b, offs=ends).to(a.dtype)
    if batch := _batches(ends, wide_a, wide_b):
        return torch.bmm(batch[0].transpose(1, 2), batch[1]).to(a.dtype)
    out = wide_a.new_empty(ends.shape[0], a.shape[1], b.shape[1])
    stretches = list(_stretches(ends, a.shape[0]))
    room = wide_a.new_empty(max(last - first for _, _, first, last in stretches), a.shape[1])
    for (start, end, first, last), place in zip(stretches, out.unbind(0), strict=True):
        rows = wide_a[first:last]
        if start == end:
            place.zero_()
            continue
        if (first, last) != (start, end):
            rows = room[: last - first]
            rows[: start - first].zero_()
            rows[start - first : end - first] = wide_a[start:end]
            rows[end - first :].zero_()
        torch.mm(rows.t(), wide_b[first:last], out=place)
    return out.to(a.dtype)


class _GroupedLinear(torch.autograd.Function):
    """Inputs as those of `matmul._Linear`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ends: Tensor, put: Defer | None, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(weight, ends, *inputs)
        ctx.put = put
        x = input_of(inputs)
        return grouped_product(x, weight.to(x.dtype).transpose(1, 2), ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, ends, *inputs = ctx.saved_tensors
        grad = grads[0].contiguous()

        def of_x() -> Tensor:
            return grouped_product(grad, weight.to(grad.dtype), ends)

        x, grad_inputs = input_and_gradients(ctx.needs_input_grad[3:], inputs, of_x)
        grad_w = None
        if ctx.put is not None or ctx.needs_input_grad[0]:
            grad_w = compute_or_defer(ctx.put, lambda: grouped_sum(grad, x, ends))
        return grad_w, None, None, *grad_inputs


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, put: Defer | None = None) -> Tensor:
    """x [P, I] sorted by expert, weight [E, O, I], ``ends`` [E] int32: the row after each expert's last → [P, O].

    Experts without rows, and no rows at all, are fine; their weight gradient is zero. ``put`` as in `linear`.
    """
    return _grouped((x,), weight, ends, put)


def grouped_gated_linear(gate: Tensor, up: Tensor, weight: Tensor, ends: Tensor, put: Defer | None = None) -> Tensor:
    """`grouped_linear` of x = silu(gate) · up [P, I], which no graph keeps."""
    return _grouped((gate, up), weight, ends, put)


def _grouped(inputs: tuple[Tensor, ...], weight: Tensor, ends: Tensor, put: Defer | None) -> Tensor:
    weight = source_of(weight, put, *inputs)
    width, height = weight.shape[2], weight.shape[1]
    align = 16 // inputs[0].element_size()  # grouped_mm wants rows of whole 16 bytes
    pad_in, pad_out = -width % align, -height % align
    if not pad_in and not pad_out:
        return _GroupedLinear.apply(weight, ends, put, *inputs)  # type: ignore[no-any-return]

    def put_cut(compute: Callable[[], Tensor]) -> None:
        assert put is not None
        put(lambda: compute()[:, :height, :width])

    padded = _GroupedLinear.apply(
        pad(weight, (0, pad_in, 0, pad_out)),
        ends,
        None if put is None else put_cut,
        *(pad(one, (0, pad_in)) for one in inputs),
    )
    return padded[:, :height]  # type: ignore[no-any-return]
