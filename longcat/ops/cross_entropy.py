"""Cross-entropy of a linear head in chunks of tokens: the logits of a long batch never exist at once.

The forward pass computes the gradients of each chunk while its logits exist; the backward pass only scales them. Where
several losses share a head, all but the last can compute their gradients in the backward pass, from logits that are
computed again: the head's float32 gradient then exists once.
"""

# T tokens, D width, V vocabulary

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longcat.faults import Place, passed, passed_all
from longcat.ops.calls import is_observed, named
from longcat.ops.fusion import Fusible, add_to, scaled
from longcat.ops.matmul import logits_product, product, writes_float32
from longcat.ops.permuted import along, can_permute, mm_float32

CHUNK_LOGITS = 1 << 22  # logits of a chunk, 16 MiB in float32: they stay in a processor's cache
MIN_ROWS, MIN_ROWS_GPU = 256, 4096  # tokens; a chunk reads the head twice and adds to its gradient: 16 bytes a weight

SCALED_ROWS = 8192  # rows of the head's gradient that are scaled at once

# A chunk's hidden [T, D], weight [V, D], labels [T], valid [T] → losses [T], gradient of their sum by the logits [T, V]
ChunkLoss = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def chunk_rows(weight: Tensor) -> int:
    """Tokens in a chunk for a head ``weight`` [V, D]."""
    return max(MIN_ROWS if weight.device.type == "cpu" else MIN_ROWS_GPU, CHUNK_LOGITS // weight.shape[0])


@Fusible
def softmax_loss(logits: Tensor, labels: Tensor, valid: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
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


@softmax_loss.permuted_by
def _softmax_loss_permuted(
    logits: Tensor, labels: Tensor, valid: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    run = softmax_loss.compute
    if not can_permute(logits[:, :1].float()):  # the labels' logits, one a row
        return run(logits, labels, valid, dtype)
    return along(0, lambda x, label, mask: run(x, label, mask, dtype), logits, labels, valid)  # type: ignore[no-any-return]


def _chunk_loss(hidden: Tensor, weight: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits_product(hidden, weight.t())
    losses, grad, label_grad = softmax_loss(logits, labels, valid, hidden.dtype)
    grad[torch.arange(grad.shape[0], device=grad.device), labels] = label_grad[:, 0]  # scatter_ would copy
    return passed(Place.activation, "cross-entropy", losses), grad


_observed_chunk_loss = named("cross-entropy", _chunk_loss)
_hidden_gradient = named("cross-entropy, hidden gradient", product)
_weight_gradient = named("cross-entropy, weight gradient", product)
_added_gradient = named("cross-entropy, added weight gradient", mm_float32)


def runs_again(device_type: str) -> bool:
    """Whether the first of several losses computes its gradients in the backward pass: a GPU's memory is the scarcer.

    A CPU's products take longer than its memory is worth.
    """
    return device_type != "cpu"


def _add_weight_gradient(total: Tensor, grad: Tensor, hidden: Tensor) -> Tensor:
    """total [V, D] float32 + gradᵀ hidden; in place, unless what observes the product may repeat it."""
    if writes_float32(grad.device.type, grad.dtype):
        return _added_gradient(grad.t(), hidden, total, not is_observed())
    add_to(total, _weight_gradient(grad.t(), hidden))
    return total


def _scaled_rows(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`scaled` of x [V, D], some rows at a time: without a second tensor of its size in float32."""
    out = torch.empty_like(x, dtype=dtype)
    for part, result in zip(x.split(SCALED_ROWS), out.split(SCALED_ROWS), strict=True):
        result.copy_(scaled(part, factor, dtype))
    return out


class _Chunks:
    """The chunks of one cross-entropy, and what is computed of them."""

    def __init__(self, hidden: Tensor, weight: Tensor, labels: Tensor, valid: Tensor, chunk_loss: ChunkLoss) -> None:
        self.hidden, self.labels, self.valid, self.chunk_loss = hidden, labels, valid, chunk_loss
        self.weight = weight.to(hidden.dtype)

    def run(self, need_hidden: bool, need_weight: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """→ losses [T], and the gradients of their sum by hidden [T, D] and weight [V, D] float32 where needed."""
        hidden, labels, weight = self.hidden, self.labels, self.weight
        losses = torch.empty(labels.shape, dtype=torch.float32, device=labels.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        rows = chunk_rows(weight)
        for start in range(0, labels.shape[0], rows):
            chunk = slice(start, start + rows)
            operands = hidden[chunk], weight, labels[chunk], self.valid[chunk]
            if self.chunk_loss is _chunk_loss:
                losses[chunk], grad = _observed_chunk_loss(*operands)
            else:  # tensor parallelism's has collectives
                losses[chunk], grad = self.chunk_loss(*operands)
            if grad_hidden is not None:
                grad_hidden[chunk] = _hidden_gradient(grad, weight)
            if grad_weight is not None:
                grad_weight = _add_weight_gradient(grad_weight, grad, hidden[chunk])
            del grad  # before the next chunk has its own
        return losses, grad_hidden, grad_weight


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        valid: Tensor,
        chunk_loss: ChunkLoss,
        run_again: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.weight_dtype, ctx.chunk_loss, ctx.run_again = weight.dtype, chunk_loss, run_again
        needed = (False, False) if run_again else ctx.needs_input_grad[:2]
        losses, *grads = _Chunks(hidden, weight, labels, valid, chunk_loss).run(*needed)
        ctx.save_for_backward(*((hidden, weight, labels, valid) if run_again else grads))
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        if ctx.run_again:
            hidden, weight, labels, valid = ctx.saved_tensors
            chunks = _Chunks(hidden, weight, labels, valid, ctx.chunk_loss)
            _, grad_hidden, grad_weight = chunks.run(*ctx.needs_input_grad[:2])
        else:
            grad_hidden, grad_weight = ctx.saved_tensors
        scaled_hidden = None if grad_hidden is None else scaled(grad_hidden, grads[0], grad_hidden.dtype)
        scaled_weight = None if grad_weight is None else _scaled_rows(grad_weight, grads[0], ctx.weight_dtype)
        return *passed_all(Place.gradient, "cross-entropy", (scaled_hidden, scaled_weight)), None, None, None, None


AUTOGRAD_NAME = _ChunkedCrossEntropy.__name__  # by which a profile recognises the head and the loss


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    valid: Tensor,
    chunk_loss: ChunkLoss = _chunk_loss,
    run_again: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sum over valid tokens of -log softmax(hidden weightᵀ)[label], and the loss of each token [T] (no gradient).

    hidden [T, D], weight [V, D], labels [T] int64, valid [T] bool; float32 results. ``chunk_loss`` computes a chunk;
    tensor parallelism passes its own, for a ``weight`` of this rank's rows. With ``run_again`` the backward runs the
    chunks a second time, bit for bit, and nothing of the head's size is kept until then.
    """
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()  # so that the forward computes no gradients
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, valid, chunk_loss, run_again)
