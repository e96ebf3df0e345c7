"""Cross-entropy of a linear head in chunks of tokens: the logits of a long batch never exist at once.

The forward pass computes the gradients of each chunk while its logits exist; the backward pass only scales them.
"""

# T tokens, D width, V vocabulary

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longcat.faults import Place, passed, passed_all
from longcat.ops.calls import named
from longcat.ops.fusion import Fusible, add_to, scaled
from longcat.ops.matmul import product, raw_product
from longcat.ops.permuted import along, can_permute

CHUNK_LOGITS = 1 << 22  # logits of a chunk, 16 MiB in float32: they stay in a processor's cache
MIN_ROWS, MIN_ROWS_GPU = 256, 1024  # tokens; a chunk reads the head twice and adds to its gradient: 16 bytes a weight

# A chunk's hidden [T, D], weight [V, D], labels [T], valid [T] → losses [T], gradient of their sum by the logits [T, V]
ChunkLoss = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def chunk_rows(weight: Tensor) -> int:
    """Tokens in a chunk for a head ``weight`` [V, D]."""
    return max(MIN_ROWS if weight.device.type == "cpu" else MIN_ROWS_GPU, CHUNK_LOGITS // weight.shape[0])


@Fusible
def _softmax_loss(logits: Tensor, labels: Tensor, valid: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """logits [T, V], which may be overwritten → losses [T] float32, and the gradient of their sum in two parts:
    for every logit as if it were not its token's label [T, V], and for the labels' logits [T, 1].
    """
    logits_fp32, mask = logits.float(), valid[:, None].float()
    maximum = logits_fp32.amax(1, keepdim=True)
    label_logits = logits_fp32.gather(1, labels[:, None]) - maximum
    exponentials = logits_fp32.sub_(maximum).exp_()
    total = exponentials.sum(1, keepdim=True)
    inverse_total = mask / total  # 0 for invalid tokens
    label_grad = label_logits.exp() * inverse_total - mask
    return ((total.log() - label_logits) * mask)[:, 0], exponentials.mul_(inverse_total).to(dtype), label_grad.to(dtype)


@_softmax_loss.permuted_by
def _softmax_loss_permuted(
    logits: Tensor, labels: Tensor, valid: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    run = _softmax_loss.compute
    if not can_permute(logits[:, :1].float()):  # the labels' logits, one a row
        return run(logits, labels, valid, dtype)
    return along(0, lambda x, label, mask: run(x, label, mask, dtype), logits, labels, valid)  # type: ignore[no-any-return]


def _chunk_loss(hidden: Tensor, weight: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    logits = raw_product(hidden, weight.t())
    losses, grad, label_grad = _softmax_loss(logits, labels, valid, hidden.dtype)
    grad[torch.arange(grad.shape[0], device=grad.device), labels] = label_grad[:, 0]  # scatter_ would copy
    return passed(Place.activation, "cross-entropy", losses), grad


_observed_chunk_loss = named("cross-entropy", _chunk_loss)
_hidden_gradient = named("cross-entropy, hidden gradient", product)
_weight_gradient = named("cross-entropy, weight gradient", product)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, valid: Tensor, chunk_loss: ChunkLoss
    ) -> tuple[Tensor, Tensor]:
        losses = torch.empty(labels.shape, dtype=torch.float32, device=labels.device)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        ctx.weight_dtype = weight.dtype
        weight = weight.to(hidden.dtype)
        rows = chunk_rows(weight)
        for start in range(0, labels.shape[0], rows):
            chunk = slice(start, start + rows)
            operands = hidden[chunk], weight, labels[chunk], valid[chunk]
            if chunk_loss is _chunk_loss:
                losses[chunk], grad = _observed_chunk_loss(*operands)
            else:  # tensor parallelism's has collectives
                losses[chunk], grad = chunk_loss(*operands)
            if grad_hidden is not None:
                grad_hidden[chunk] = _hidden_gradient(grad, weight)
            if grad_weight is not None:
                add_to(grad_weight, _weight_gradient(grad.t(), hidden[chunk]))
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled_hidden = None if grad_hidden is None else scaled(grad_hidden, grads[0], grad_hidden.dtype)
        scaled_weight = None if grad_weight is None else scaled(grad_weight, grads[0], ctx.weight_dtype)
        return *passed_all(Place.gradient, "cross-entropy", (scaled_hidden, scaled_weight)), None, None, None


AUTOGRAD_NAME = _ChunkedCrossEntropy.__name__  # by which a profile recognises the head and the loss


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, valid: Tensor, chunk_loss: ChunkLoss = _chunk_loss
) -> tuple[Tensor, Tensor]:
    """Sum over valid tokens of -log softmax(hidden weightᵀ)[label], and the loss of each token [T] (no gradient).

    hidden [T, D], weight [V, D], labels [T] int64, valid [T] bool; float32 results. ``chunk_loss`` computes a chunk;
    tensor parallelism passes its own, for a ``weight`` of this rank's rows.
    """
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()  # so that the forward computes no gradients
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, valid, chunk_loss)
