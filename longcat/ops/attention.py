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

from longcat.ops.fusion import Fusible, add_to
from longcat.ops.matmul import product, raw_product

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


@Fusible
def _probabilities(scores: Tensor, scale: float, start: int, documents: Tensor | None, dtype: torch.dtype) -> Tensor:
    """softmax(scale · scores) [B, H, rows, start + rows], without what the queries ``start``... may not see."""
    stop = scores.shape[-1]
    wide = scores.float() * scale
    position = torch.arange(stop, device=scores.device)
    hidden = position[None, :] > position[start:, None]
    if documents is not None:
        other = documents[:, start:stop, None] != documents[:, None, :stop]
        hidden = (hidden | other)[:, None]
    return torch.softmax(wide.masked_fill_(hidden, float("-inf")), -1).to(dtype)


@Fusible
def _scores_gradient(grad: Tensor, probabilities: Tensor, scale: float) -> Tensor:
    """Of the scores, from that of the probabilities and in their dtype."""
    grad = torch.ops.aten._softmax_backward_data(grad.float(), probabilities.float(), -1, torch.float32)
    return grad.mul_(scale).to(probabilities.dtype)


class _BlockedAttention(torch.autograd.Function):
    """Saves the probabilities of the lower triangle: S²/2 numbers a head, and no GEMM is done twice.

    Heads of all sequences are one batch here [B·H, ...], so that a stretch of positions is a view and not a copy.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, documents: Tensor | None, runs: Runs
    ) -> Tensor:
        shape = query.shape[:2]
        query, key, value = (x.flatten(0, 1) for x in (query, key, value))
        out = torch.empty(*query.shape[:-1], value.shape[-1], dtype=value.dtype, device=value.device)
        saved = []
        for held, start, stop in _blocks(runs):
            scores = raw_product(query[:, held], key[:, :stop].mT).unflatten(0, shape)
            probabilities = _probabilities(scores, scale, start, documents, value.dtype).flatten(0, 1)
            out[:, held] = product(probabilities, value[:, :stop])
            saved.append(probabilities)
        ctx.scale, ctx.runs, ctx.shape = scale, runs, shape
        ctx.save_for_backward(query, key, value, *saved)
        return out.unflatten(0, shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, *saved = ctx.saved_tensors
        grad_out = grads[0].flatten(0, 1)
        grad_query = torch.empty_like(query)
        grad_key = torch.zeros(key.shape, dtype=torch.float32, device=key.device)
        grad_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
        for (held, _, stop), probabilities in zip(_blocks(ctx.runs), saved, strict=True):
            grad = grad_out[:, held]
            add_to(grad_value[:, :stop], product(probabilities.mT, grad))
            grad_scores = raw_product(grad, value[:, :stop].mT)
            grad_scores = _scores_gradient(grad_scores, probabilities, ctx.scale)
            grad_query[:, held] = product(grad_scores, key[:, :stop])
            add_to(grad_key[:, :stop], product(grad_scores.mT, query[:, held]))
        grad_key, grad_value = grad_key.to(key.dtype), grad_value.to(value.dtype)
        return *(x.unflatten(0, ctx.shape) for x in (grad_query, grad_key, grad_value)), None, None, None  # type: ignore[return-value]
