"""Cross-entropy of a linear head in chunks of tokens: the logits of the whole batch never exist at once.

The gradients are computed in the forward pass, while a chunk's logits are at hand, and scaled in the backward pass.
"""

# T tokens, D width, V vocabulary

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longcat.ops.matmul import product, wide_product

CHUNK_LOGITS = 1 << 22  # at most this many logits at once: 16 MiB in float32


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        losses = torch.empty(labels.shape, dtype=torch.float32, device=labels.device)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        ctx.weight_dtype = weight.dtype
        weight = weight.to(hidden.dtype)
        rows = max(1, CHUNK_LOGITS // weight.shape[0])
        for start in range(0, labels.shape[0], rows):
            chunk = slice(start, start + rows)
            logits = wide_product(hidden[chunk], weight.t())
            target = labels[chunk, None]
            keep = valid[chunk, None].float()
            peak = logits.amax(1, keepdim=True)
            chosen = logits.gather(1, target)
            weights = logits.sub_(peak).exp_()
            total = weights.sum(1, keepdim=True)
            losses[chunk] = ((total.log() + peak - chosen) * keep)[:, 0]
            if not (need_hidden or need_weight):
                continue
            grad = weights.mul_(keep / total)  # the softmax, 0 where the label does not count
            grad = grad.scatter_(1, target, grad.gather(1, target) - keep).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = product(grad, weight)
            if grad_weight is not None:
                grad_weight += product(grad.t(), hidden[chunk])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled_hidden = None if grad_hidden is None else (grad_hidden * grads[0]).to(grad_hidden.dtype)
        scaled_weight = None if grad_weight is None else (grad_weight * grads[0]).to(ctx.weight_dtype)
        return scaled_hidden, scaled_weight, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over valid tokens of -log softmax(hidden weightᵀ)[label], and the loss of each token [T] (no gradient).

    hidden [T, D], weight [V, D], labels [T] int64, valid [T] bool; float32 results.
    """
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()  # the forward computes the gradients: ask for none
    return _LinearCrossEntropy.apply(hidden, weight, labels, valid)  # type: ignore[no-any-return]
