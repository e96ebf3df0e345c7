"""Causal attention over heads whose keys and values differ in width (MLA), with optional document masks.

On a GPU this is torch's fused kernel. On a CPU that kernel runs far below the GEMM rate, so the lower triangle is split
into blocks of queries, and each block is a few batched GEMMs over the keys that its queries attend to. The backward
recomputes a block's probabilities (bitwise identical) unless rows are short, so nothing of size S² outlives a block.
"""

# B sequences, H heads, S positions, C query/key width, V value width

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from longcat.faults import Place, passed, passed_all
from longcat.ops.calls import observed
from longcat.ops.fusion import Fusible, add_to
from longcat.ops.matmul import product, raw_product
from longcat.ops.permuted import along
from longcat.ops.torch_internals import softmax_backward

QUERY_BLOCK = 128  # queries in a block: smaller blocks waste less work above the diagonal
MAX_SAVED_ROW_BYTES = 1024  # longer rows of probabilities are recomputed in the backward instead of saved
LONG_SEQUENCE = 1024  # from this many keys on, blocks are twice as large: less of the work lies above the diagonal


Ranges = list[tuple[int, int]]  # (start, stop) of ranges of positions


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, documents: Tensor | None, ranges: Ranges | None = None
) -> Tensor:
    """softmax(scale · q kᵀ + causal mask) v.

    query [B, H, q, C], key [B, H, S, C], value [B, H, S, V] → [B, H, q, V]. ``ranges`` are the positions of the
    queries, one range after another; None means all S. ``documents`` [B, S] are document numbers: a position attends
    only to its own document. None means one document per sequence.
    """
    ranges = [(0, key.shape[2])] if ranges is None else ranges
    if query.device.type == "cpu":
        return _BlockedAttention.apply(query, key, value, scale, documents, ranges)
    outputs, offset = [], 0
    for start, stop in ranges:
        local_query = query[:, :, offset : offset + stop - start]
        offset += stop - start
        mask = _causal_bias(start, stop) if documents is None else None
        if documents is not None:
            visible = torch.ones(stop - start, stop, dtype=torch.bool, device=query.device).tril(start)
            mask = (visible & (documents[:, start:stop, None] == documents[:, None, :stop]))[:, None]
        keys, values = key[:, :, :stop], value[:, :, :stop]
        is_causal = mask is None
        outputs.append(
            scaled_dot_product_attention(local_query, keys, values, attn_mask=mask, is_causal=is_causal, scale=scale)
        )
    return torch.cat(outputs, 2)


def _causal_bias(start: int, stop: int) -> Tensor | None:
    """torch's causal mask of the queries start … stop over the keys before stop; None where plain `is_causal` says it.

    Imported late: the module of torch's biases imports its compiler, two seconds of every start.
    """
    if not start:
        return None
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(stop - start, stop)


def _blocks(ranges: Ranges, num_keys: int) -> Iterator[tuple[slice, int, int]]:
    """The queries of each block: their slice of the local queries, and their (start, stop) in the sequence."""
    size, local = QUERY_BLOCK if num_keys < LONG_SEQUENCE else 2 * QUERY_BLOCK, 0
    for range_start, range_stop in ranges:
        for start in range(range_start, range_stop, size):
            stop = min(start + size, range_stop)
            yield slice(local, local + stop - start), start, stop
            local += stop - start


def _mask(start: int, stop: int, documents: Tensor | None) -> Tensor:
    """-1 where the queries from ``start`` on may not attend to a key, 0 elsewhere: [1 or B, 1, stop - start, stop].

    In float32, because compiled code converts vectors of integers or booleans slowly.
    """
    position = torch.arange(stop, device="cpu")
    hidden = (position > position[start:, None])[None]
    if documents is not None:
        hidden = hidden | (documents[:, start:stop, None] != documents[:, None, :stop])
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
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, documents: Tensor | None, ranges: Ranges
    ) -> Tensor:
        ctx.scale, ctx.ranges, ctx.shape = scale, ranges, query.shape[:2]
        query, key, value = (x.flatten(0, 1) for x in (query, key, value))
        saved = []
        # In memory [B, q, H, V], the layout that the next product reads
        out = value.new_empty(ctx.shape[0], query.shape[1], ctx.shape[1], value.shape[2]).transpose(1, 2)
        for local, start, stop in _blocks(ranges, key.shape[1]):
            probabilities = _probabilities(ctx, query[:, local], key, start, stop, documents)
            out[:, :, local] = product(probabilities, value[:, :stop]).unflatten(0, ctx.shape)
            saved.append(probabilities if key.shape[1] * key.element_size() <= MAX_SAVED_ROW_BYTES else None)
        ctx.save_for_backward(query, key, value, documents, *saved)
        return passed(Place.activation, "attention", out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, documents, *saved = ctx.saved_tensors
        grad_out = grads[0].flatten(0, 1)
        grad_query = torch.empty_like(query)
        grad_key = torch.zeros_like(key, dtype=torch.float32)
        grad_value = torch.zeros_like(value, dtype=torch.float32)
        for (local, start, stop), probabilities in zip(_blocks(ctx.ranges, key.shape[1]), saved, strict=True):
            grad = grad_out[:, local]
            if probabilities is None:
                probabilities = _probabilities(ctx, query[:, local], key, start, stop, documents)
            add_to(grad_value[:, :stop], product(probabilities.mT, grad))
            grad_scores = _scores_gradient(raw_product(grad, value[:, :stop].mT), probabilities, ctx.scale)
            grad_query[:, local] = product(grad_scores, key[:, :stop])
            add_to(grad_key[:, :stop], product(grad_scores.mT, query[:, local]))
        grads_in = passed_all(
            Place.attention_backward, "attention", (grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype))
        )
        return *(x.unflatten(0, ctx.shape) for x in grads_in), None, None, None


def _probabilities(ctx: Any, query: Tensor, key: Tensor, start: int, stop: int, documents: Tensor | None) -> Tensor:
    """Probabilities [B·H, rows, stop] of the queries from ``start`` on [B·H, rows, C] over the keys before ``stop``."""
    scores = raw_product(query, key[:, :stop].mT).unflatten(0, ctx.shape)
    return _softmax(scores, _mask(start, stop, documents), ctx.scale, query.dtype).flatten(0, 1)
