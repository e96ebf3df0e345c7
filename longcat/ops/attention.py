"""Causal attention over heads whose keys and values differ in width (MLA), with optional document masks.

On a GPU torch's fused kernel is right. On a CPU it runs far below the GEMM rate, so there the lower triangle is cut
into blocks of queries, and each block is a few batched GEMMs over just the keys that it may see.
"""

# B sequences, H heads, S positions, C query/key width, V value width

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longcat.ops.matmul import product, wide_product

QUERY_BLOCK = 128  # rows of the triangle computed at once: smaller wastes less above the diagonal


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, documents: Tensor | None) -> Tensor:
    """softmax(scale · q kᵀ + causal mask) v.

    query, key [B, H, S, C]; value [B, H, S, V] → [B, H, S, V]. ``documents`` [B, S] are document numbers: a position
    sees only its own document. None means one document a sequence.
    """
    if query.device.type == "cpu":
        return _BlockedAttention.apply(query, key, value, scale, documents)  # type: ignore[no-any-return]
    mask = None
    if documents is not None:
        mask = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + QUERY_BLOCK, length)) for start in range(0, length, QUERY_BLOCK)]


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
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, documents: Tensor | None) -> Tensor:
        out = torch.empty(*query.shape[:-1], value.shape[-1], dtype=value.dtype, device=value.device)
        saved = []
        for start, stop in _blocks(query.shape[2]):
            scores = wide_product(query[:, :, start:stop], key[:, :, :stop].transpose(-1, -2)).mul_(scale)
            probabilities = torch.softmax(_hide(scores, start, documents), -1).to(value.dtype)
            out[:, :, start:stop] = product(probabilities, value[:, :, :stop])
            saved.append(probabilities)
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, *saved = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        grad_key = torch.zeros(key.shape, dtype=torch.float32, device=key.device)
        grad_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
        for (start, stop), probabilities in zip(_blocks(query.shape[2]), saved, strict=True):
            grad = grads[0][:, :, start:stop]
            grad_value[:, :, :stop] += product(probabilities.transpose(-1, -2), grad)
            grad_scores = wide_product(grad, value[:, :, :stop].transpose(-1, -2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_scores, probabilities.float(), -1, torch.float32)
            grad_scores = grad_scores.mul_(ctx.scale).to(query.dtype)
            grad_query[:, :, start:stop] = product(grad_scores, key[:, :, :stop])
            grad_key[:, :, :stop] += product(grad_scores.transpose(-1, -2), query[:, :, start:stop])
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None
