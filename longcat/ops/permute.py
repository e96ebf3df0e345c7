"""Tokens to the order of their experts and back: gathers and sums in a fixed order, never an atomic.

The plan of one routing sorts the FFN selections by expert (stably, so by token within an expert). Identity
experts are in no plan: they cost a multiplication where the results are combined.
"""

# T tokens, K chosen, N FFN experts, Z identity experts, P FFN selections (rows), D width

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


@dataclass(frozen=True)
class Permutation:
    """Where each FFN selection of a routing goes."""

    is_ffn: Tensor  # [T, K] bool
    token: Tensor  # [P] the token of each row, rows sorted by (expert, token)
    selection: Tensor  # [P] the flat (token · K + k) selection of each row
    row: Tensor  # [P] the row of each FFN selection, in the order of selections
    ffn_selection: Tensor  # [P] the FFN selections in that order: by token, then by choice
    first: Tensor  # [T] the first place in ``row`` of each token
    counts: Tensor  # [N + Z] int64, selections of each expert


def plan_permutation(indices: Tensor, num_experts: int, num_routed: int, num_rows: int | None = None) -> Permutation:
    """Plan for expert numbers ``indices`` [T, K] below ``num_routed``; from ``num_experts`` on they are identity.

    ``num_rows`` is the number of FFN selections where the host knows it; it waits for the device to tell otherwise.
    """
    top_k = indices.shape[1]
    flat = indices.reshape(-1)
    counts = torch.zeros(num_routed, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))  # integers: any order gives the same sum
    is_ffn = indices < num_experts
    per_token = is_ffn.sum(1)
    if num_rows is None:
        num_rows = int(counts[:num_experts].sum())
    ffn_selection = torch.nonzero_static(is_ffn.reshape(-1), size=num_rows)[:, 0]
    selection = torch.sort(flat, stable=True).indices[:num_rows]
    place = torch.empty_like(flat)
    place.scatter_(0, selection, torch.arange(num_rows, device=flat.device))
    return Permutation(
        is_ffn=is_ffn,
        token=selection // top_k,
        selection=selection,
        row=place[ffn_selection],
        ffn_selection=ffn_selection,
        first=per_token.cumsum(0) - per_token,
        counts=counts,
    )


def _sum_rows(rows: Tensor, plan: Permutation, weights: Tensor | None) -> Tensor:
    """For each token the (weighted) sum of its rows, in the order of its selections: [P, D] → [T, D]."""
    if rows.shape[0] == 0:
        return rows.new_zeros(plan.first.shape[0], rows.shape[1])
    return embedding_bag(plan.row, rows, plan.first, mode="sum", per_sample_weights=weights)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Permutation) -> Tensor:
        ctx.plan = plan
        return x.index_select(0, plan.token)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return unpermute(grads[0], ctx.plan), None


def unpermute(rows: Tensor, plan: Permutation) -> Tensor:
    """The adjoint of `permute`: for each token the sum of its rows, [P, D] → [T, D]."""
    return _sum_rows(rows.contiguous(), plan, None)


def permute(x: Tensor, plan: Permutation) -> Tensor:
    """x [T, D] → rows [P, D] sorted by expert."""
    return _Permute.apply(x, plan)  # type: ignore[no-any-return]


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, gates: Tensor, plan: Permutation, x: Tensor | None) -> Tensor:
        ctx.plan, ctx.identity = plan, x is not None
        out = _sum_rows(rows, plan, gates.reshape(-1)[plan.ffn_selection].to(rows.dtype))
        if x is None:
            ctx.save_for_backward(rows, gates)
            return out
        identity_gate = gates.masked_fill(plan.is_ffn, 0.0).sum(1, keepdim=True)
        ctx.save_for_backward(rows, gates, x, identity_gate)
        return out.add_((x * identity_gate).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None]:
        rows, gates, *others = ctx.saved_tensors
        plan: Permutation = ctx.plan
        grad = grads[0].contiguous()
        grad_rows = grad.index_select(0, plan.token)
        grad_row_gates = (rows * grad_rows).sum(1, dtype=gates.dtype)
        grad_rows.mul_(gates.reshape(-1)[plan.selection].to(rows.dtype)[:, None])
        if ctx.identity:
            x, identity_gate = others
            grad_identity = (x * grad).sum(1, keepdim=True, dtype=gates.dtype)
            grad_gates = torch.where(plan.is_ffn, 0.0, grad_identity).reshape(-1)
            grad_x = (grad * identity_gate).to(x.dtype)
        else:
            grad_gates, grad_x = torch.zeros_like(gates).reshape(-1), None
        grad_gates = grad_gates.scatter(0, plan.selection, grad_row_gates)
        return grad_rows, grad_gates.view_as(gates), None, grad_x


def combine(rows: Tensor, gates: Tensor, plan: Permutation, x: Tensor | None) -> Tensor:
    """Σ_k gate · expert output for each token [T, D]: FFN experts from ``rows`` [P, D], identity experts from x [T, D].

    ``gates`` [T, K] float32 are γ·R of the selections (section 3 of the model's equations). Without ``x`` the
    identity experts' share is left out.
    """
    return _Combine.apply(rows, gates, plan, x)  # type: ignore[no-any-return]
