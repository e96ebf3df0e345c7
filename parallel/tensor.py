"""Tensor parallelism: a plan of DTensor placements, and a vocabulary whose rows are sharded over ranks.

MLA is split by heads, dense FFNs by columns, embedding and head by rows of the vocabulary. The projections to latents,
the router and the norms are not split and work on a rank's own positions (`sequence.py`): projecting first and
gathering the small latents sends fewer bytes than gathering the hidden states. Their gradients are partial sums over
tp, added up by the reduce-scatter over fsdp × cp × tp (`fsdp/sharding.py`).
"""

# T tokens, D width, V vocabulary, v = V/tp rows here

from __future__ import annotations

import re

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from longcat.interfaces import install
from longcat.model import LongCat
from longcat.ops.cross_entropy import linear_cross_entropy
from longcat.ops.embedding import embedding
from longcat.ops.matmul import logits_product
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
        sharded = DTensor.from_local(torch.empty_like(part), mesh, [placement], run_check=False)
        model.get_submodule(owner).register_parameter(leaf, nn.Parameter(sharded))
    vocabulary = ShardedVocabulary(topology.group(Axis.TP))
    install(model, vocabulary=lambda _: vocabulary)


class ShardedVocabulary:
    """Rank p of the group holds rows p·v ... (p + 1)·v - 1."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)

    def lookup(self, tokens: Tensor, weight: Tensor) -> Tensor:
        row = tokens - self.rank * weight.shape[0]
        is_local = (row >= 0) & (row < weight.shape[0])
        return embedding(torch.where(is_local, row, weight.shape[0]), weight, allow_out_of_range=True)

    def cross_entropy(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, valid: Tensor, run_again: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As `linear_cross_entropy`; the gradient of ``hidden`` is a partial sum over the group."""
        return linear_cross_entropy(hidden, weight, labels, valid, self._chunk_loss, run_again)

    def _chunk_loss(self, hidden: Tensor, weight: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [T, D], labels and valid [T] → losses [T], and the gradient of this rank's logits [T, v].

        The maximum, the sum of exponentials and the label's logit are reduced over the group.
        """
        labels, mask = labels[:, None], valid[:, None].float()
        logits = logits_product(hidden, weight.t()).float()
        maximum = logits.amax(1, keepdim=True)
        with wait_span(Event(SpanKind.VOCABULARY_MAX), self.group):
            dist.all_reduce(maximum, dist.ReduceOp.MAX, group=self.group)
        row = labels - self.rank * weight.shape[0]
        is_local = (row >= 0) & (row < weight.shape[0])
        row = torch.where(is_local, row, 0)
        label_logits = (logits.gather(1, row) - maximum) * is_local
        exponentials = logits.sub_(maximum).exp_()
        sums = torch.cat((exponentials.sum(1, keepdim=True), label_logits), 1)
        with wait_span(Event(SpanKind.VOCABULARY_SUM), self.group):
            dist.all_reduce(sums, group=self.group)
        total, label_logits = sums.split(1, 1)
        losses = ((total.log() - label_logits) * mask)[:, 0]
        grad = exponentials.mul_(mask / total)
        grad.scatter_(1, row, grad.gather(1, row) - mask * is_local)
        return losses, grad.to(hidden.dtype)
