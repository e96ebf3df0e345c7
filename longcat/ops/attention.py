"""Causal attention over heads whose keys and values differ in width (MLA), with optional document masks.

On a GPU torch's fused kernel is right. On a CPU it runs far below the GEMM rate, so there the lower triangle is cut
into blocks, and each block is a few batched GEMMs over just what may see and be seen. As in FlashAttention (Dao et al.
2022) nothing of size S² outlives a block: the backward takes the probabilities again from the scores and one number a
row, the logarithm of its sum of exponentials.
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

QUERY_BLOCK = 128  # positions of the triangle computed at once: smaller wastes less above the diagonal
LONG = 1024  # keys from which on twice as many are: their rows are long enough not to waste more


Runs = list[tuple[int, int]]  # (start, stop) of stretches of positions


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, documents: Tensor | None, runs: Runs | None = None
) -> Tensor:
    """softmax(scale · q kᵀ + causal mask) v.

    query [B, H, q, C], key [B, H, S, C], value [B, H, S, V] → [B, H, q, V]. ``runs`` are the positions of the
    queries, stretch after stretch in their order; None means all S. ``documents`` [B, S] are document numbers: a
    position sees only its own document. None means one document a sequence.
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


def _block_of(num_keys: int) -> int:
    return QUERY_BLOCK if num_keys < LONG else 2 * QUERY_BLOCK


def _query_blocks(runs: Runs, size: int) -> Iterator[tuple[slice, int, int]]:
    """Stretches of at most ``size`` queries: where they are held, and their (start, stop) in the sequence."""
    held = 0
    for run_start, run_stop in runs:
        for start in range(run_start, run_stop, size):
            stop = min(start + size, run_stop)
            yield slice(held, held + stop - start), start, stop
            held += stop - start


def _key_blocks(runs: Runs, size: int) -> Iterator[tuple[int, slice]]:
    """Stretches of ``size`` keys that some query sees: the first query held that does, and the keys.

    Runs are in the order of positions, so all queries from that one on see the stretch's first key.
    """
    end = runs[-1][1]
    for start in range(0, end, size):
        first = sum(min(max(start - run_start, 0), run_stop - run_start) for run_start, run_stop in runs)
        yield first, slice(start, min(start + size, end))


def _mask(queries: Tensor, keys: Tensor, documents: Tensor | None) -> Tensor:
    """What is added to the scores of these positions, 0 or -inf: [1 or B, 1, queries, keys] float32."""
    hidden = (keys[None, :] > queries[:, None])[None]
    if documents is not None:
        hidden = hidden | (documents[:, queries, None] != documents[:, None, keys])
    return torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None]


@Fusible
def _probabilities(scores: Tensor, mask: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """softmax(x) of x = scale · scores + mask, [..., keys], and log Σ exp x of each row [..., 1] float32."""
    x = scores.float() * scale + mask
    log_total = torch.logsumexp(x, -1, keepdim=True)
    return (x - log_total).exp().to(dtype), log_total


@Fusible
def _row_products(a: Tensor, b: Tensor) -> Tensor:
    """Σ a · b over each row [..., V] → [...] float32."""
    return (a.float() * b.float()).sum(-1)


@Fusible
def _scores_gradient(
    scores: Tensor, grad: Tensor, mask: Tensor, log_total: Tensor, mean: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Probabilities p and gradient of scores [..., keys, queries], from the ``grad`` of the probabilities.

    It is p · (grad - mean) · scale; the mean of ``grad`` over a query's keys, Σ p · grad, is Σ out · grad_out.
    """
    share = (scores.float() * scale + mask - log_total).exp()
    return share.to(dtype), (share * (grad.float() - mean) * scale).to(dtype)


class _BlockedAttention(torch.autograd.Function):
    """The forward goes by blocks of queries, the backward by blocks of keys: each has one sum that it keeps in place.

    Heads of all sequences are one batch here [B·H, ...], so that a stretch of positions is a view and not a copy.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, documents: Tensor | None, runs: Runs
    ) -> Tensor:
        shape = query.shape[:2]
        query, key, value = (x.flatten(0, 1) for x in (query, key, value))
        # In memory [B, q, H, V], as the next product wants it
        out = value.new_empty(shape[0], query.shape[1], shape[1], value.shape[2]).transpose(1, 2)
        log_total = torch.empty(query.shape[:-1], dtype=torch.float32)
        for held, start, stop in _query_blocks(runs, _block_of(key.shape[1])):
            mask = _mask(torch.arange(start, stop), torch.arange(stop), documents)
            scores = raw_product(query[:, held], key[:, :stop].mT).unflatten(0, shape)
            shares, of_block = _probabilities(scores, mask, scale, value.dtype)
            out[:, :, held] = product(shares.flatten(0, 1), value[:, :stop]).unflatten(0, shape)
            log_total[:, held] = of_block.flatten(0, 1)[..., 0]
        ctx.scale, ctx.runs, ctx.shape = scale, runs, shape
        ctx.save_for_backward(query, key, value, out, log_total, documents)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, out, log_total, documents = ctx.saved_tensors
        grad_out = grads[0].flatten(0, 1)
        grad_query = torch.zeros(query.shape, dtype=torch.float32)
        grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
        mean = _row_products(grads[0], out).flatten(0, 1)
        positions = torch.cat([torch.arange(start, stop) for start, stop in ctx.runs])
        for grad in (grad_key, grad_value):
            grad[:, ctx.runs[-1][1] :] = 0  # no query sees them
        for first, keys in _key_blocks(ctx.runs, _block_of(key.shape[1])):
            # Keys are the rows here: of three products over the probabilities just one reads them column by column
            mask = _mask(positions[first:], torch.arange(keys.start, keys.stop), documents).mT.contiguous()
            scores, grad_shares = (
                raw_product(rows[:, keys], columns[:, first:].mT).unflatten(0, ctx.shape)
                for rows, columns in ((key, query), (value, grad_out))
            )
            total_of, mean_of = (x[:, None, first:].unflatten(0, ctx.shape) for x in (log_total, mean))
            parts = _scores_gradient(scores, grad_shares, mask, total_of, mean_of, ctx.scale, value.dtype)
            shares, grad_scores = (x.flatten(0, 1) for x in parts)
            grad_value[:, keys] = product(shares, grad_out[:, first:])
            grad_key[:, keys] = product(grad_scores, query[:, first:])
            add_to(grad_query[:, first:], product(grad_scores.mT, key[:, keys]))
        grads_in = (grad_query.to(query.dtype), grad_key, grad_value)
        return *(x.unflatten(0, ctx.shape) for x in grads_in), None, None, None  # type: ignore[return-value]
