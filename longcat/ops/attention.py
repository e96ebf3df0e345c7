"""Causal attention over heads whose keys and values differ in width (MLA), with optional document masks.

On a GPU torch's fused kernel is right. On a CPU it runs far below the GEMM rate, so there the lower triangle is cut
into blocks of queries, and each block is a few batched GEMMs over just the keys that it may see.
"""

# B sequences, H heads, S positions, C query/key width, V value width

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from longcat.ops.matmul import product, wide_product

QUERY_BLOCK = 128  # rows of the triangle computed at once: smaller wastes less above the diagonal


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


def _blocks(runs: Runs) -> Iterator[tuple[slice, int, int]]:
    """Stretches of at most QUERY_BLOCK queries: where they are held, and their (start, stop) in the sequence."""
    held = 0
    for run_start, run_stop in runs:
        for start in range(run_start, run_stop, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, run_stop)
            yield slice(held, held + stop - start), start, stop
            held += stop - start


def _hide(scores: Tensor, start: int, documents: Tensor | None) -> Tensor:
    """Set to -inf what the queries ``start``... may not see, in place; scores [B, H, rows, start + rows]."""
    rows, stop = scores.shape[-2], scores.shape[-1]
    future = torch.ones(rows, rows, dtype=torch.bool, device=scores.device).triu(1)
    scores[..., start:].masked_fill_(future, float("-inf"))
    if documents is not None:
        other = documents[:, start:stop, None] != documents[:, None, :stop]
        scores.masked_fill_(other[:, None], float("-inf"))
    return scores


class _BlockedAttention(torch.autograd.Function):
    """Saves the probabilities of the lower triangle: S²/2 numbers a head, and no GEMM is done twice."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, documents: Tensor | None, runs: Runs
    ) -> Tensor:
        out = torch.empty(*query.shape[:-1], value.shape[-1], dtype=value.dtype, device=value.device)
        saved = []
        for held, start, stop in _blocks(runs):
            scores = wide_product(query[:, :, held], key[:, :, :stop].transpose(-1, -2)).mul_(scale)
            probabilities = torch.softmax(_hide(scores, start, documents), -1).to(value.dtype)
            out[:, :, held] = product(probabilities, value[:, :, :stop])
            saved.append(probabilities)
        ctx.scale, ctx.runs = scale, runs
        ctx.save_for_backward(query, key, value, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, *saved = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        grad_key = torch.zeros(key.shape, dtype=torch.float32, device=key.device)
        grad_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
        for (held, _, stop), probabilities in zip(_blocks(ctx.runs), saved, strict=True):
            grad = grads[0][:, :, held]
            grad_value[:, :, :stop] += product(probabilities.transpose(-1, -2), grad)
            grad_scores = wide_product(grad, value[:, :, :stop].transpose(-1, -2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_scores, probabilities.float(), -1, torch.float32)
            grad_scores = grad_scores.mul_(ctx.scale).to(query.dtype)
            grad_query[:, :, held] = product(grad_scores, key[:, :, :stop])
            grad_key[:, :, :stop] += product(grad_scores.transpose(-1, -2), query[:, :, held])
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None
