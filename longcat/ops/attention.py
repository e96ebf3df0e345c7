"""Causal attention over heads whose keys and values differ in width (MLA), with optional document masks.

On a GPU torch's fused kernel is right. On a CPU it runs far below the GEMM rate, so there the lower triangle is cut
into blocks of queries, and each block is a few batched GEMMs over just the keys that it may see. The backward computes
a block's probabilities again, to the same bits, unless rows are short: so nothing of size S² outlives a block.
"""

# B sequences, H heads, S positions, C query/key width, V value width

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from longcat.ops.fusion import Fusible, add_to
from longcat.ops.matmul import product, raw_product

QUERY_BLOCK = 128  # rows of the triangle computed at once: smaller wastes less above the diagonal
KEPT_BYTES = 1024  # the longest row of probabilities that is kept for the backward; longer ones cost too much memory
LONG = 1024  # keys from which on twice as many rows are: the share that lies above the diagonal is small


Runs = list[tuple[int, int]]  # (start, stop) of stretches of positions


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, documents: Tensor | None, runs: Runs | None = None
) -> Tensor:
    """softmax(scale · q kᵀ + causal mask) v.

    query [B, H, q, C], key [B, H, S, C], value [B, H, S, V] → [B, H, q, V]. ``runs`` are the positions of the
    queries, stretch after stretch; None means all S. ``documents`` [B, S] are document numbers: a position sees only
    its own document. None means one document a sequence.
    """
    runs = [(0, key.shape[2])] if runs is None else runs
    if query.device.type == "cpu":
        return _BlockedAttention.apply(query, key, value, scale, documents, runs)  # type: ignore[no-any-return]
    parts, first = [], 0
    for start, stop in runs:
        part = query[:, :, first : first + stop - start]
        first += stop - start
        mask: Tensor = causal_lower_right(stop - start, stop)  # type: ignore[assignment]
        if documents is not None:
            seen = torch.ones(stop - start, stop, dtype=torch.bool, device=query.device).tril(start)
            mask = (seen & (documents[:, start:stop, None] == documents[:, None, :stop]))[:, None]
        keys, values = key[:, :, :stop], value[:, :, :stop]
        parts.append(scaled_dot_product_attention(part, keys, values, attn_mask=mask, scale=scale))
    return torch.cat(parts, 2)


def _blocks(runs: Runs, num_keys: int) -> Iterator[tuple[slice, int, int]]:
    """The queries of each block: where they are held, and their (start, stop) in the sequence."""
    size, held = QUERY_BLOCK if num_keys < LONG else 2 * QUERY_BLOCK, 0
    for run_start, run_stop in runs:
        for start in range(run_start, run_stop, size):
            stop = min(start + size, run_stop)
            yield slice(held, held + stop - start), start, stop
            held += stop - start


def _mask(start: int, stop: int, documents: Tensor | None) -> Tensor:
    """-1 where the queries ``start``... may not see a key, 0 elsewhere: [1 or B, 1, stop - start, stop].

    In float32, since a vector of comparisons of integers or booleans is slow to widen.
    """
    position = torch.arange(stop, device="cpu")
    hidden = (position > position[start:, None])[None]
    if documents is not None:
        hidden = hidden | (documents[:, start:stop, None] != documents[:, None, :stop])
    return hidden[:, None].to(torch.float32).neg_()


@Fusible
def _softmax(scores: Tensor, mask: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """softmax(scale · scores) [B, H, rows, keys], without what the mask hides."""
    wide = (scores.float() * scale).masked_fill_(mask < 0, float("-inf"))
    return torch.softmax(wide, -1).to(dtype)


@Fusible
def _scores_gradient(grad: Tensor, probabilities: Tensor, scale: float) -> Tensor:
    """Of the scores, from that of the probabilities and in their dtype."""
    grad = torch.ops.aten._softmax_backward_data(grad.float(), probabilities.float(), -1, torch.float32)
    return grad.mul_(scale).to(probabilities.dtype)


class _BlockedAttention(torch.autograd.Function):
    """Heads of all sequences are one batch here [B·H, ...], so that a stretch of positions is a view and not a copy."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, documents: Tensor | None, runs: Runs
    ) -> Tensor:
        ctx.scale, ctx.runs, ctx.shape = scale, runs, query.shape[:2]
        query, key, value = (x.flatten(0, 1) for x in (query, key, value))
        kept = []
        # In memory [B, q, H, V], as the next product wants it
        out = value.new_empty(ctx.shape[0], query.shape[1], ctx.shape[1], value.shape[2]).transpose(1, 2)
        for held, start, stop in _blocks(runs, key.shape[1]):
            probabilities = _probabilities(ctx, query[:, held], key, start, stop, documents)
            out[:, :, held] = product(probabilities, value[:, :stop]).unflatten(0, ctx.shape)
            kept.append(probabilities if key.shape[1] * key.element_size() <= KEPT_BYTES else None)
        ctx.save_for_backward(query, key, value, documents, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, documents, *kept = ctx.saved_tensors
        grad_out = grads[0].flatten(0, 1)
        grad_query = torch.empty_like(query)
        grad_key = torch.zeros_like(key, dtype=torch.float32)
        grad_value = torch.zeros_like(value, dtype=torch.float32)
        for (held, start, stop), probabilities in zip(_blocks(ctx.runs, key.shape[1]), kept, strict=True):
            grad = grad_out[:, held]
            if probabilities is None:
                probabilities = _probabilities(ctx, query[:, held], key, start, stop, documents)
            add_to(grad_value[:, :stop], product(probabilities.mT, grad))
            grad_scores = _scores_gradient(raw_product(grad, value[:, :stop].mT), probabilities, ctx.scale)
            grad_query[:, held] = product(grad_scores, key[:, :stop])
            add_to(grad_key[:, :stop], product(grad_scores.mT, query[:, held]))
        grads_in = (grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype))
        return *(x.unflatten(0, ctx.shape) for x in grads_in), None, None, None  # type: ignore[return-value]


def _probabilities(ctx: Any, query: Tensor, key: Tensor, start: int, stop: int, documents: Tensor | None) -> Tensor:
    """Of the queries ``start``... [B·H, rows, C] over keys [B·H, S, C] up to theirs: [B·H, rows, stop]."""
    scores = raw_product(query, key[:, :stop].mT).unflatten(0, ctx.shape)
    return _softmax(scores, _mask(start, stop, documents), ctx.scale, query.dtype).flatten(0, 1)
