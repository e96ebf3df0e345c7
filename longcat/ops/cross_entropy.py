"""Cross-entropy of a linear head in chunks of tokens: the logits of a long batch never exist at once.

The gradients are computed in the forward pass, while a chunk's logits are at hand, and scaled in the backward pass.
"""

# T tokens, D width, V vocabulary

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longcat.ops.fusion import Fusible, add_to, scaled
from longcat.ops.matmul import product, raw_product

CHUNK_LOGITS = 1 << 22  # logits at once, 16 MiB in float32: they stay in a processor's cache
MIN_ROWS, MIN_ROWS_GPU = 256, 1024  # each chunk reads the head twice and adds to its gradient: 16 bytes a weight


def chunk_rows(weight: Tensor) -> int:
    """Tokens of a chunk for a head of these rows [V, D]."""
    return max(MIN_ROWS if weight.device.type == "cpu" else MIN_ROWS_GPU, CHUNK_LOGITS // weight.shape[0])


@Fusible
def _softmax_loss(logits: Tensor, labels: Tensor, valid: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """logits [T, V], which may be overwritten → losses [T] float32, and their sum's gradient in two parts: of all
    logits [T, V] as if none were a label's, and of those that are [T, 1].
    """
    wide, keep = logits.float(), valid[:, None].float()
    peak = wide.amax(1, keepdim=True)
    chosen = wide.gather(1, labels[:, None]) - peak
    weights = wide.sub_(peak).exp_()
    total = weights.sum(1, keepdim=True)
    share = keep / total  # 0 where the label does not count
    at_labels = chosen.exp() * share - keep
    return ((total.log() - chosen) * keep)[:, 0], weights.mul_(share).to(dtype), at_labels.to(dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        losses = torch.empty(labels.shape, dtype=torch.float32, device=labels.device)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        ctx.weight_dtype = weight.dtype
        weight = weight.to(hidden.dtype)
        rows = chunk_rows(weight)
        for start in range(0, labels.shape[0], rows):
            chunk = slice(start, start + rows)
            logits = raw_product(hidden[chunk], weight.t())
            losses[chunk], grad, at_labels = _softmax_loss(logits, labels[chunk], valid[chunk], hidden.dtype)
            grad[torch.arange(grad.shape[0], device=grad.device), labels[chunk]] = at_labels[
                :, 0
            ]  # scatter_ would copy
            if grad_hidden is not None:
                grad_hidden[chunk] = product(grad, weight)
            if grad_weight is not None:
                add_to(grad_weight, product(grad.t(), hidden[chunk]))
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled_hidden = None if grad_hidden is None else scaled(grad_hidden, grads[0], grad_hidden.dtype)
        scaled_weight = None if grad_weight is None else scaled(grad_weight, grads[0], ctx.weight_dtype)
        return scaled_hidden, scaled_weight, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over valid tokens of -log softmax(hidden weightᵀ)[label], and the loss of each token [T] (no gradient).

    hidden [T, D], weight [V, D], labels [T] int64, valid [T] bool; float32 results.
    """
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()  # the forward computes the gradients: ask for none
    return _LinearCrossEntropy.apply(hidden, weight, labels, valid)  # type: ignore[no-any-return]
