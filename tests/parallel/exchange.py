"""A plain, blocking dispatcher of tokens over expert-parallel ranks: the reference for tests of other parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longcat.dispatch import Routing
from longcat.ops.permute import Permutation, combine, permute, plan_permutation

Splits = list[int]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: Splits, received: Splits, group: dist.ProcessGroup) -> Tensor:
        ctx.splits, ctx.group = (sent, received), group
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received = ctx.splits
        return _Exchange.apply(grads[0], received, sent, ctx.group), None, None, None


@dataclass
class Pending:
    """What one chunk carries from call to call."""

    x: Tensor
    gates: Tensor
    plan: Permutation
    rows: Tensor
    order: Tensor  # of the received rows, by expert
    counts: Tensor
    splits: tuple[Splits, Splits]


class BlockingDispatcher:
    """Expert e lives on rank e // (N / ranks) of ``group``."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def start(self, x: Tensor, routing: Routing) -> Pending:
        plan = plan_permutation(routing.indices, routing.num_experts, routing.num_routed)
        table = plan.counts[: routing.num_experts].view(dist.get_world_size(self.group), -1).contiguous()
        incoming = torch.empty_like(table)  # [ranks, E]
        dist.all_to_all_single(incoming, table, group=self.group)
        splits = table.sum(1).tolist(), incoming.sum(1).tolist()
        rows = _Exchange.apply(permute(x, plan), *splits, self.group)
        experts = torch.arange(table.shape[1]).expand_as(incoming).flatten().repeat_interleave(incoming.flatten())
        order = torch.sort(experts, stable=True).indices
        return Pending(x, routing.gates, plan, rows, order, incoming.sum(0), splits)

    def wait(self, pending: Pending) -> tuple[Tensor, Tensor]:
        return pending.rows[pending.order], pending.counts

    def start_back(self, rows: Tensor, pending: Pending) -> Pending:
        sent, received = pending.splits
        by_source = torch.zeros_like(rows).index_copy(0, pending.order, rows)
        pending.rows = _Exchange.apply(by_source, received, sent, self.group)
        return pending

    def wait_back(self, pending: Pending) -> Tensor:
        return combine(pending.rows, pending.gates, pending.plan, pending.x)
