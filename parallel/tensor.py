"""Tensor parallelism: a plan of DTensor placements, and a vocabulary whose rows are spread over ranks.

MLA is split by heads, dense FFNs by columns, embedding and head by rows of the vocabulary. What produces latents, the
router and the norms stay whole and work on a rank's own positions (`sequence.py`): projecting first and gathering
the small latents moves fewer bytes than gathering the hidden states. Their gradients are then partial sums over
tp, and are summed where they are sharded, over fsdp × cp × tp (`sharding.py`).
"""

# T tokens, D width, V vocabulary, v = V/tp rows here

from __future__ import annotations

import re
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from longcat.config import ModelConfig
from longcat.errors import ConfigError
from longcat.interfaces import install
from longcat.model import LongCat
from longcat.ops.cross_entropy import chunk_rows
from longcat.ops.embedding import embedding
from longcat.ops.fusion import add_to, scaled
from longcat.ops.matmul import product, raw_product
from parallel.mesh import Axis, Topology
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import wait_span

ROWS, COLUMNS = Shard(0), Shard(1)
PLAN = {  # stored name → what of the matrix [out, in] a rank holds
    r"self_attn(\.\d)?\.(q_b_proj|kv_b_proj)\.weight": ROWS,  # heads
    r"self_attn(\.\d)?\.o_proj\.weight": COLUMNS,
    r"(mlps\.\d|transformer_layer\.mlp)\.(gate_proj|up_proj)\.weight": ROWS,
    r"(mlps\.\d|transformer_layer\.mlp)\.down_proj\.weight": COLUMNS,
    r"^embed_tokens\.weight": ROWS,
    r"^lm_head\.weight": ROWS,
}


def check_tensor(config: ModelConfig, tp: int) -> None:
    """Raise ConfigError where heads, columns or vocabulary cannot be shared equally."""
    for key in ("num_heads", "ffn_hidden_size", "vocab_size"):
        if getattr(config, key) % tp:
            raise ConfigError(f"parallel.tp={tp} does not divide model.{key}={getattr(config, key)}; change either")


def apply_tensor_parallel(model: LongCat, topology: Topology) -> None:
    """Split a model's matrices over the tensor-parallel ranks by the plan, in place; weights are on the meta device."""
    if topology.sizes.tp == 1:
        return
    mesh = topology.mesh[Axis.TP]
    for name, weight in list(model.named_parameters()):
        placement = next((shard for pattern, shard in PLAN.items() if re.search(pattern, name)), None)
        if placement is None:
            continue
        owner, _, leaf = name.rpartition(".")
        part = weight.tensor_split(topology.sizes.tp, placement.dim)[topology.coordinate(Axis.TP)]
        spread = DTensor.from_local(torch.empty_like(part), mesh, [placement], run_check=False)
        model.get_submodule(owner).register_parameter(leaf, nn.Parameter(spread))
    vocabulary = ShardedVocabulary(topology.group(Axis.TP))
    install(model, vocabulary=lambda _: vocabulary)


class ShardedVocabulary:
    """Rank p of the group holds rows p·v ... (p + 1)·v - 1."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.place = dist.get_rank(group)

    def lookup(self, tokens: Tensor, weight: Tensor) -> Tensor:
        row = tokens - self.place * weight.shape[0]
        here = (row >= 0) & (row < weight.shape[0])
        return embedding(torch.where(here, row, weight.shape[0]), weight, allow_out_of_range=True)

    def cross_entropy(self, hidden: Tensor, weight: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():
            hidden, weight = hidden.detach(), weight.detach()  # the forward computes the gradients: ask for none
        return _ShardedCrossEntropy.apply(hidden, weight, labels, valid, self)  # type: ignore[no-any-return]


class _ShardedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a linear head whose rows are spread, in chunks of tokens.

    Each rank has its columns of the logits; the largest, the sum of exponentials and the label's logit are reduced.
    Gradients are of this rank's columns: the one by ``hidden`` is a partial sum over the group.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, valid: Tensor, vocabulary: ShardedVocabulary
    ) -> tuple[Tensor, Tensor]:
        losses = torch.empty(labels.shape, dtype=torch.float32, device=labels.device)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        rows = chunk_rows(weight)
        for start in range(0, labels.shape[0], rows):
            chunk = slice(start, start + rows)
            keep = valid[chunk, None].float()
            losses[chunk], grad = _one_chunk(hidden[chunk], weight, labels[chunk, None], keep, vocabulary)
            if grad_hidden is not None:
                grad_hidden[chunk] = product(grad, weight)
            if grad_weight is not None:
                add_to(grad_weight, product(grad.t(), hidden[chunk]))
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled_hidden = None if grad_hidden is None else scaled(grad_hidden, grads[0], grad_hidden.dtype)
        scaled_weight = None if grad_weight is None else scaled(grad_weight, grads[0], ctx.weight_dtype)
        return scaled_hidden, scaled_weight, None, None, None


def _one_chunk(
    hidden: Tensor, weight: Tensor, labels: Tensor, keep: Tensor, vocabulary: ShardedVocabulary
) -> tuple[Tensor, Tensor]:
    """hidden [T, D], labels and keep [T, 1] → losses [T] and their gradient by this rank's logits [T, v]."""
    logits = raw_product(hidden, weight.t()).float()
    peak = logits.amax(1, keepdim=True)
    with wait_span(Event(SpanKind.VOCABULARY_MAX), vocabulary.group):
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=vocabulary.group)
    row = labels - vocabulary.place * weight.shape[0]
    here = (row >= 0) & (row < weight.shape[0])
    row = torch.where(here, row, 0)
    chosen = (logits.gather(1, row) - peak) * here
    weights = logits.sub_(peak).exp_()
    sums = torch.cat((weights.sum(1, keepdim=True), chosen), 1)
    with wait_span(Event(SpanKind.VOCABULARY_SUM), vocabulary.group):
        dist.all_reduce(sums, group=vocabulary.group)
    total, chosen = sums.split(1, 1)
    losses = ((total.log() - chosen) * keep)[:, 0]
    grad = weights.mul_(keep / total)
    grad.scatter_(1, row, grad.gather(1, row) - keep * here)
    return losses, grad.to(hidden.dtype)
