"""Causal attention over heads whose keys and values differ in width (MLA), with optional document masks.

On a GPU this is one of torch's fused kernels (`fused_attention.py`). On a CPU they run far below the GEMM rate, so the
lower triangle is split into blocks of queries, and each block is a few batched GEMMs over the keys that its queries
attend to; keys of documents that ended before the block are left out. The backward
recomputes a block's probabilities (bitwise identical) unless rows are short, so nothing of size S² outlives a block.
"""

# B sequences, H heads, S positions, C query/key width, V value width

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longcat.documents import Documents
from longcat.faults import Place, passed, passed_all
from longcat.ops.calls import observed
from longcat.ops.fused_attention import fused_attention
from longcat.ops.fusion import Fusible, add_to
from longcat.ops.matmul import product, raw_product
from longcat.ops.permuted import along
from longcat.ops.recomputed import recomputable
from longcat.ops.torch_internals import softmax_backward
from longcat.recompute_values import Value

QUERY_BLOCK = 128  # queries in a block: smaller blocks waste less work above the diagonal
MAX_SAVED_ROW_BYTES = 1024  # longer rows of probabilities are recomputed in the backward instead of saved
KEY_ALIGNMENT = 64  # blocks begin at a multiple of this many keys: odd offsets slow products down
LONG_SEQUENCE = 1024  # from this many keys on, blocks are twice as large: less of the work lies above the diagonal


Ranges = list[tuple[int, int]]  # (start, stop) of ranges of positions


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    documents: Documents | None,
    ranges: Ranges | None = None,
    value_width: int | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ + causal mask) v.

    query [B, q, H, C], key [B, S, H, C], value [B, S, H, V] → [B, q, H, V]. ``ranges`` are the positions of the
    queries, one range after another; None means all S. With ``documents`` a position attends only to its own document;
    None means one document per sequence. On a GPU values may have finite numbers before their last ``value_width`` V
    columns.
    """
    ranges = [(0, key.shape[1])] if ranges is None else ranges
    if query.device.type != "cpu":
        return fused_attention(query, key, value, scale, documents, ranges, value_width)
    heads_first = [recomputable(Value.expansion, _heads_first, x) for x in (query, key, value)]
    numbers = None if documents is None else documents.numbers
    firsts = None if documents is None else first_keys(documents, ranges, key.shape[1])
    out = _BlockedAttention.apply(*heads_first, scale, numbers, ranges, firsts)
    return out.transpose(1, 2)  # type: ignore[no-any-return]


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


def first_keys(documents: Documents, ranges: Ranges, num_keys: int) -> list[int]:
    """By block of queries, the first key that it reads: no query of the block sees an earlier one."""
    starts = (start for _, start, _, _ in query_blocks(ranges, num_keys))
    return [documents.first_key(start) // KEY_ALIGNMENT * KEY_ALIGNMENT for start in starts]


def query_blocks(
    ranges: Ranges, num_keys: int, firsts: list[int] | None = None
) -> Iterator[tuple[slice, int, int, int]]:
    """Each block's slice of the local queries, their (start, stop) in the sequence, and the first key that is read."""
    size, local, number = QUERY_BLOCK if num_keys < LONG_SEQUENCE else 2 * QUERY_BLOCK, 0, 0
    for range_start, range_stop in ranges:
        for start in range(range_start, range_stop, size):
            stop = min(start + size, range_stop)
            yield slice(local, local + stop - start), start, stop, 0 if firsts is None else firsts[number]
            local, number = local + stop - start, number + 1


def _mask(start: int, stop: int, first: int, documents: Tensor | None) -> Tensor:
    """-1 where the queries ``start`` … ``stop`` may not attend to a key from ``first`` on, 0 elsewhere.

    Its shape is [1 or B, 1, stop - start, stop - first].

    In float32, because compiled code converts vectors of integers or booleans slowly.
    """
    position = torch.arange(first, stop, device="cpu")
    hidden = (position > position[start - first :, None])[None]
    if documents is not None:
        hidden = hidden | (documents[:, start:stop, None] != documents[:, None, first:stop])
    return hidden[:, None].to(torch.float32).neg_()


@Fusible
def _softmax(scores: Tensor, mask: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """softmax(scale · scores) [B, H, rows, keys] over the keys that the mask allows."""
    scores_fp32 = (scores.float() * scale).masked_fill_(mask < 0, float("-inf"))
    return torch.softmax(scores_fp32, -1).to(dtype)


@_softmax.permuted_by
def _softmax_permuted(scores: Tensor, mask: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The heads are rolled: the mask is the same for each."""
    return along(1, lambda heads: _softmax.compute(heads, mask, scale, dtype), scores)  # type: ignore[no-any-return]


@Fusible
def _scores_gradient(grad: Tensor, probabilities: Tensor, scale: float) -> Tensor:
    """The gradient of the scores from that of the probabilities, in the dtype of the probabilities."""
    grad = softmax_backward(grad.float(), probabilities.float())
    return grad.mul_(scale).to(probabilities.dtype)


@_scores_gradient.permuted_by
def _scores_gradient_permuted(grad: Tensor, probabilities: Tensor, scale: float) -> Tensor:
    run = _scores_gradient.compute
    return along(0, lambda g, p: run(g, p, scale), grad, probabilities)  # type: ignore[no-any-return]


@observed("attention")
class _BlockedAttention(torch.autograd.Function):
    """The heads of all sequences are one batch [B·H, ...], so that a range of positions is a view and not a copy."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        documents: Tensor | None,
        ranges: Ranges,
        firsts: list[int] | None,
    ) -> Tensor:
        ctx.scale, ctx.ranges, ctx.firsts, ctx.shape = scale, ranges, firsts, query.shape[:2]
        query, key, value = (x.flatten(0, 1) for x in (query, key, value))
        shape, blocks = ctx.shape, list(query_blocks(ranges, key.shape[1], firsts))

        def attend(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None) -> tuple[Tensor, ...]:
            """→ the result, and the probabilities of each block if they are saved."""
            saved = []
            # In memory [B, q, H, V], the layout that the next product reads
            out = value.new_empty(shape[0], query.shape[1], shape[1], value.shape[2]).transpose(1, 2)
            for local, start, stop, first in blocks:
                mask = _mask(start, stop, first, documents)
                probabilities = _probabilities(query[:, local], key[:, first:stop], mask, shape, scale)
                out[:, :, local] = product(probabilities, value[:, first:stop]).unflatten(0, shape)
                if key.shape[1] * key.element_size() <= MAX_SAVED_ROW_BYTES:
                    saved.append(probabilities)
            return out, *saved

        out, *saved = recomputable(Value.attention, attend, query, key, value, documents)
        ctx.save_for_backward(query, key, value, documents, *saved)
        return passed(Place.activation, "attention", out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, documents, *saved = ctx.saved_tensors
        grad_out = grads[0].flatten(0, 1)
        grad_query = torch.empty_like(query)
        grad_key = torch.zeros_like(key, dtype=torch.float32)
        grad_value = torch.zeros_like(value, dtype=torch.float32)
        blocks = query_blocks(ctx.ranges, key.shape[1], ctx.firsts)
        for number, (local, start, stop, first) in enumerate(blocks):
            grad = grad_out[:, local]
            if saved:
                probabilities = saved[number]
            else:
                mask = _mask(start, stop, first, documents)
                probabilities = _probabilities(query[:, local], key[:, first:stop], mask, ctx.shape, ctx.scale)
            add_to(grad_value[:, first:stop], product(probabilities.mT, grad))
            grad_scores = _scores_gradient(raw_product(grad, value[:, first:stop].mT), probabilities, ctx.scale)
            grad_query[:, local] = product(grad_scores, key[:, first:stop])
            add_to(grad_key[:, first:stop], product(grad_scores.mT, query[:, local]))
        grads_in = passed_all(
            Place.attention_backward, "attention", (grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype))
        )
        return *(x.unflatten(0, ctx.shape) for x in grads_in), None, None, None, None


def _probabilities(query: Tensor, key: Tensor, mask: Tensor, shape: tuple[int, int], scale: float) -> Tensor:
    """Probabilities [B·H, rows, keys] of a block's queries over the keys that its mask is for; ``shape`` is (B, H)."""
    return _softmax(raw_product(query, key.mT).unflatten(0, shape), mask, scale, query.dtype).flatten(0, 1)
