"""Attention on GPUs: which of torch's fused kernels runs, and calls of theirs that need no mask in memory.

A kernel gets its mask as bounds of segments (documents) or as "causal, aligned at the last query and key". Nothing of
size S² exists. Widths that flash attention refuses are filled with zero columns, which is exact.
"""

# B sequences, H heads, S positions, q local queries, C query/key width, V value width, W padded width

from __future__ import annotations

from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, scaled_dot_product_attention

from longcat.documents import Documents
from longcat.faults import Place, passed, passed_all
from longcat.ops.calls import observed
from longcat.ops.recomputed import recomputable
from longcat.ops.torch_internals import AttentionKernel, EfficientAttention, FlashAttention, KernelCall
from longcat.recompute_values import Value

FLASH_MAX_WIDTH = 256
LOADED_BYTES = 16  # that kernels load at once, from a multiple of as many
CUDNN_WIDTHS = (128, 192)  # cuDNN's backward: query, key and value up to 128 wide, or 192 with values of 128


class Backend(StrEnum):
    """Kernels for attention on a GPU."""

    flash = "flash"  # bit for bit repeatable under deterministic algorithms; float16 and bfloat16
    cudnn = "cudnn"  # the fastest on Hopper and Blackwell; its backward adds in any order
    efficient = "efficient"  # float32 and older GPUs; its deterministic backward fills B·H multiprocessors only


def choose_backend(
    capability: tuple[int, int],
    dtype: torch.dtype,
    deterministic: bool,
    widths: tuple[int, int],
    is_square: bool,
    has_documents: bool,
) -> Backend:
    """The fastest kernel that can do what is asked.

    Args:
        capability: the device's compute capability.
        deterministic: whether two runs must give the same bits.
        widths: (C, V).
        is_square: whether queries and keys are the same positions; with context parallelism they are not.
    """
    key_width, value_width = widths
    half = dtype in (torch.float16, torch.bfloat16)
    if not half or capability < (8, 0) or max(widths) > FLASH_MAX_WIDTH:
        return Backend.efficient
    narrow = max(widths) <= CUDNN_WIDTHS[0] or (key_width == CUDNN_WIDTHS[1] and value_width == CUDNN_WIDTHS[0])
    aligned = key_width % 8 == 0 and value_width % 8 == 0
    if capability >= (9, 0) and not deterministic and is_square and not has_documents and narrow and aligned:
        return Backend.cudnn
    return Backend.flash


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    documents: Documents | None,
    ranges: list[tuple[int, int]],
    value_width: int | None = None,
) -> Tensor:
    """`causal_attention` by one of torch's kernels; shapes as there."""
    value_width = value.shape[-1] if value_width is None else value_width
    backend = choose_backend(
        torch.cuda.get_device_capability(query.device),
        query.dtype,
        torch.are_deterministic_algorithms_enabled(),
        (key.shape[-1], value_width),
        ranges == [(0, key.shape[1])],
        documents is not None,
    )
    if backend != Backend.flash:
        value = value[..., value.shape[-1] - value_width :]
    value = recomputable(Value.expansion, _aligned, value)
    if backend == Backend.cudnn:
        return _cudnn_attention(query, key, value, scale)
    segments = [] if documents is None else [documents.segments(*one) for one in ranges]
    bounds = [bound for one in segments for bound in (one.query_bounds, one.key_bounds)]
    shapes = [(one.firsts, one.longest_queries, one.longest_keys) for one in segments]
    return _FusedAttention.apply(query, key, value, value_width, scale, backend.value, ranges, shapes, *bounds)  # type: ignore[no-any-return]


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy where a row is not at a multiple of `LOADED_BYTES`: values are a view behind columns of keys."""
    places = x.storage_offset(), *x.stride()[:-1]
    is_aligned = all(place * x.element_size() % LOADED_BYTES == 0 for place in places)
    return x if is_aligned else x.clone(memory_format=torch.contiguous_format)


def _cudnn_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """torch's own function; its node keeps the result within the call, so recomputing it would save no memory."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return out.transpose(1, 2)


KERNELS: dict[str, type[AttentionKernel]] = {
    Backend.flash: FlashAttention,
    Backend.efficient: EfficientAttention,
}  # a saved call names its kernel by a plain string
Shapes = list[tuple[tuple[int, ...], int, int]]  # by range: first keys by sequence, longest queries, longest keys


@observed("fused_attention")
class _FusedAttention(torch.autograd.Function):
    """One kernel call for each range of queries; with documents, sequences in one row and bounds of segments."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        value_width: int,
        scale: float,
        backend: str,
        ranges: list[tuple[int, int]],
        shapes: Shapes,
        *bounds: Tensor,
    ) -> Tensor:
        ctx.scale, ctx.backend, ctx.ranges, ctx.shapes = scale, backend, ranges, shapes
        ctx.widths, ctx.given_width = (key.shape[-1], value_width), value.shape[-1]
        width = _kernel_width(backend, ctx.widths)
        query, key = (recomputable(Value.expansion, _widen, x, width) for x in (query, key))
        value = recomputable(Value.expansion, _widen_before, value, width)
        calls = _calls(ctx, bounds)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
            """→ the result, and what the kernels need for the backward."""
            outputs, states = [], []
            for call, (local, stop, firsts) in calls:
                out, *state = KERNELS[backend].forward(
                    _pack(query[:, local], firsts),
                    _pack_keys(key, stop, firsts),
                    _pack_keys(value, stop, firsts),
                    call,
                )
                outputs.append(_unpack(out, query.shape[0], firsts)[..., -value_width:])
                states += state
            return outputs[0].contiguous() if len(outputs) == 1 else torch.cat(outputs, 1), *states

        out, *states = recomputable(Value.attention, attend, query, key, value)
        ctx.num_bounds, ctx.num_states = len(bounds), len(states) // len(ranges)
        ctx.save_for_backward(query, key, value, out, *bounds, *states)
        return passed(Place.activation, "attention", out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *saved = ctx.saved_tensors
        bounds, states = saved[: ctx.num_bounds], saved[ctx.num_bounds :]
        width = _kernel_width(ctx.backend, ctx.widths)
        out, grad_out = _widen_before(out, width), _widen_before(grads[0], width)
        whole = ctx.ranges == [(0, key.shape[1])]
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (key, value) if whole else (torch.zeros_like(key), torch.zeros_like(value))
        for number, (call, (local, stop, firsts)) in enumerate(_calls(ctx, bounds)):
            of_query, of_key, of_value = KERNELS[ctx.backend].backward(
                _pack(grad_out[:, local], firsts),
                _pack(query[:, local], firsts),
                _pack_keys(key, stop, firsts),
                _pack_keys(value, stop, firsts),
                _pack(out[:, local], firsts),
                states[number * ctx.num_states : (number + 1) * ctx.num_states],
                call,
            )
            if whole:
                grad_query, grad_key, grad_value = (
                    _unpack(grad, query.shape[0], firsts) for grad in (of_query, of_key, of_value)
                )
                continue
            grad_query[:, local] = _unpack(of_query, query.shape[0], firsts)
            _add_keys(grad_key, of_key, stop, firsts)
            _add_keys(grad_value, of_value, stop, firsts)
        key_width = ctx.widths[0]
        grads_in = grad_query[..., :key_width], grad_key[..., :key_width], grad_value[..., -ctx.given_width :]
        return *passed_all(Place.attention_backward, "attention", grads_in), *(None,) * (5 + ctx.num_bounds)


Operands = tuple[slice, int, tuple[int, ...] | None]  # local queries, end of the keys, first keys by sequence


def _calls(ctx: Any, bounds: Any) -> list[tuple[KernelCall, Operands]]:
    """The kernel call of each range, and where its operands are."""
    calls: list[tuple[KernelCall, Operands]] = []
    local = 0
    for number, (start, stop) in enumerate(ctx.ranges):
        here = slice(local, local + stop - start)
        local += stop - start
        if not ctx.shapes:
            calls.append((KernelCall(None, None, stop - start, stop, ctx.scale), (here, stop, None)))
            continue
        firsts, longest_queries, longest_keys = ctx.shapes[number]
        of_queries, of_keys = bounds[2 * number : 2 * number + 2]
        calls.append((KernelCall(of_queries, of_keys, longest_queries, longest_keys, ctx.scale), (here, stop, firsts)))
    return calls


def _kernel_width(backend: str, widths: tuple[int, int]) -> int | None:
    """The common width that a kernel wants; None where it takes any."""
    return -(-max(widths) // 8) * 8 if backend == Backend.flash else None


def _widen(x: Tensor, width: int | None) -> Tensor:
    return x if width is None or x.shape[-1] == width else pad(x, (0, width - x.shape[-1]))


def _widen_before(x: Tensor, width: int | None) -> Tensor:
    """Values end with V columns, and so do results: what is before them belongs to no result."""
    return x if width is None or x.shape[-1] == width else pad(x, (width - x.shape[-1], 0))


def _pack(x: Tensor, firsts: tuple[int, ...] | None) -> Tensor:
    """[B, n, H, W] → [B·n, H, W] where segments are given."""
    return x if firsts is None else x.flatten(0, 1)


def _unpack(x: Tensor, num_sequences: int, firsts: tuple[int, ...] | None) -> Tensor:
    return x if firsts is None else x.unflatten(0, (num_sequences, -1))


def _pack_keys(x: Tensor, stop: int, firsts: tuple[int, ...] | None) -> Tensor:
    """The keys from each sequence's first to ``stop``, in one row; a view where there is one sequence."""
    if firsts is None:
        return x[:, :stop]
    if not any(firsts):
        return x[:, :stop].flatten(0, 1)
    rows = [x[sequence, first:stop] for sequence, first in enumerate(firsts)]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _add_keys(total: Tensor, grad: Tensor, stop: int, firsts: tuple[int, ...] | None) -> None:
    """Add the gradient of what `_pack_keys` gave."""
    if firsts is None:
        total[:, :stop] += grad
        return
    for sequence, (first, rows) in enumerate(zip(firsts, grad.split([stop - first for first in firsts]), strict=True)):
        total[sequence, first:stop] += rows
