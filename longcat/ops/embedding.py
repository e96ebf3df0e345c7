"""Embedding look-up with a gradient that is summed in a fixed order and rounded once.

The gradient of a row is a sum over all positions of its id. Ids are sorted once; each run of equal ids is split into
blocks of BLOCK positions, which are summed in order, and then the blocks' sums in order, all in float32.
"""

# T ids, V rows of the table, D width, R runs of equal ids, G blocks

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from longcat.faults import Place, passed
from longcat.ops.calls import observed
from longcat.ops.rows import gather_rows
from longcat.ops.torch_library import accumulate_dtype, operator

BLOCK = 32  # positions of one id that are summed in order before the blocks are


@operator("embedding_gradient(Tensor grad, Tensor ids, int num_rows) -> Tensor")
def embedding_gradient(grad: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    """grad [T, D], ids [T] → [V, D], row i the sum of ``grad`` over id i's positions; ids of V or more drop."""
    out = grad.new_zeros(num_rows, grad.shape[1])
    ids, order = torch.sort(ids, stable=True)
    runs, lengths = torch.unique_consecutive(ids, return_counts=True)
    num_blocks = (lengths + BLOCK - 1) // BLOCK
    last = num_blocks.cumsum(0)
    run = torch.repeat_interleave(torch.arange(runs.shape[0], device=ids.device), num_blocks)  # [G]
    block_in_run = torch.arange(run.shape[0], device=ids.device) - (last - num_blocks)[run]
    first = (lengths.cumsum(0) - lengths)[run] + block_in_run * BLOCK  # [G]
    sums = embedding_bag(order, grad.to(accumulate_dtype(grad.dtype)), first, mode="sum")  # [G, D]
    if run.shape[0] > runs.shape[0]:
        sums = embedding_bag(torch.arange(run.shape[0], device=ids.device), sums, last - num_blocks, mode="sum")
    known = int((runs < num_rows).sum())
    return out.index_copy_(0, runs[:known], sums[:known].to(grad.dtype))


@observed("embedding")
class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, allow_out_of_range: bool) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.num_rows = weight.shape[0]
        index = ids.clamp_max(weight.shape[0] - 1) if allow_out_of_range else ids
        rows: Tensor = gather_rows(weight, index.reshape(-1)).view(*ids.shape, weight.shape[1])
        out = rows.masked_fill_((index != ids)[..., None], 0.0) if allow_out_of_range else rows
        return passed(Place.activation, "embedding", out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        ids = ctx.saved_tensors[0].reshape(-1)
        grad = grads[0].reshape(ids.shape[0], -1).contiguous()
        return None, passed(Place.gradient, "embedding", embedding_gradient(grad, ids, ctx.num_rows)), None


def embedding(ids: Tensor, weight: Tensor, allow_out_of_range: bool = False) -> Tensor:
    """ids [...], weight [V, D] → rows [..., D]. With ``allow_out_of_range``, ids of V or more give zeros."""
    return _Embedding.apply(ids, weight, allow_out_of_range)
