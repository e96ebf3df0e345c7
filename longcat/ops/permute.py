"""Permute tokens into the order of their experts, and combine the results: sums in a fixed order, without atomics.

The plan of a routing sorts the FFN selections by expert (stably, so by token within an expert). Identity experts are
not in the plan: they cost one multiplication when the results are combined.
"""

# T tokens, K chosen, N FFN experts, Z identity experts, P FFN selections (rows), D width, C rows for each expert

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from longcat.faults import Place, passed, passed_all
from longcat.ops.calls import observed
from longcat.ops.rows import combine_rows, combine_rows_backward, gather_rows, sum_rows
from longcat.ops.torch_library import operator


@dataclass(frozen=True)
class Permutation:
    """The row of each FFN selection of a routing, and the token and selection of each row."""

    token: Tensor  # [P] the token of each row, rows sorted by (expert, token), -1 for a padding row
    selection: Tensor  # [P] the flat (token · K + k) selection of each row, -1 for a padding row
    row_index: Tensor  # [T, K] the row of each selection, -1 for an identity expert
    counts: Tensor  # [N + Z] int64, selections of each expert; rows of each FFN expert
    is_padded: bool = False  # has padding rows

    def pad_to_capacity(self, capacity: int, num_experts: int) -> Permutation:
        """The plan with ``capacity`` C rows for each FFN expert, [N · C]: its own, then padding rows.

        A padding row is zero, its result is not used, and its gradient is zero. For the plain operators only: the GPU
        kernels leave its gradient undefined.
        """
        row = padded_positions(self.counts[:num_experts], capacity)
        empty = self.token.new_full((num_experts * capacity,), -1)
        token, selection = empty.index_copy(0, row, self.token), empty.index_copy(0, row, self.selection)
        row_index = torch.where(self.row_index >= 0, row[self.row_index], -1)
        counts = self.counts.clone()
        counts[:num_experts] = capacity
        return Permutation(token, selection, row_index, counts, is_padded=True)


def padded_positions(counts: Tensor, capacity: int) -> Tensor:
    """Rows [P], sorted by expert with ``counts`` [N] each → their positions if each expert has ``capacity`` rows."""
    num_experts = counts.shape[0]
    shift = torch.arange(num_experts) * capacity - (counts.cumsum(0) - counts)
    return torch.arange(int(counts.sum())) + shift.repeat_interleave(counts)


def gather_rows_padded(source: Tensor, index: Tensor) -> Tensor:
    """`gather_rows`, with zeros where the index is -1."""
    rows: Tensor = gather_rows(source, index.clamp_min(0))
    return rows.index_fill_(0, (index < 0).nonzero()[:, 0], 0.0)


@operator(
    "plan(Tensor indices, int num_experts, int num_routed, int? num_rows=None) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _plan(
    indices: Tensor, num_experts: int, num_routed: int, num_rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """indices [T, K] → the fields of a `Permutation`."""
    flat = indices.reshape(-1)
    counts = torch.zeros(num_routed, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))  # integers: any order gives the same sum
    order = torch.sort(flat, stable=True).indices
    if num_rows is None:
        num_rows = int(counts[:num_experts].sum())
    selection = order[:num_rows]
    row_index = torch.full_like(flat, -1)
    row_index.scatter_(0, selection, torch.arange(num_rows, device=flat.device))
    return selection // indices.shape[1], selection.clone(), row_index.view(indices.shape), counts


def plan_permutation(indices: Tensor, num_experts: int, num_routed: int, num_rows: int | None = None) -> Permutation:
    """The plan for expert numbers ``indices`` [T, K] below ``num_routed``; from ``num_experts`` on they are identity.

    ``num_rows`` is the number of FFN selections; without it the host waits for the device to count them.
    """
    return Permutation(*_plan(indices, num_experts, num_routed, num_rows))


@observed("permute")
class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Permutation) -> Tensor:
        ctx.save_for_backward(plan.row_index)
        gather = gather_rows_padded if plan.is_padded else gather_rows
        return passed(Place.activation, "permute", gather(x, plan.token))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return passed(Place.gradient, "permute", unpermute(grads[0], *ctx.saved_tensors)), None


def unpermute(rows: Tensor, row_index: Tensor) -> Tensor:
    """The adjoint (backward) of `permute`: for each token the sum of its rows, [P, D] → [T, D]."""
    return sum_rows(rows.contiguous(), row_index)


def permute(x: Tensor, plan: Permutation) -> Tensor:
    """x [T, D] → rows [P, D] sorted by expert."""
    return _Permute.apply(x.contiguous(), plan)


@observed("combine")
class Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, gates: Tensor, plan: Permutation, x: Tensor | None) -> Tensor:
        rows, gates, x = rows.contiguous(), gates.contiguous(), None if x is None else x.contiguous()
        ctx.save_for_backward(gates, plan.token, plan.selection, plan.row_index, x)
        return passed(Place.activation, "combine", combine_rows(rows, gates, plan.row_index, x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None]:
        saved = ctx.saved_tensors
        grad_rows, grad_gates, grad_x = passed_all(
            Place.gradient, "combine", combine_rows_backward(grads[0].contiguous(), *saved)
        )
        return grad_rows, grad_gates, None, None if saved[-1] is None else grad_x


def combine(rows: Tensor, gates: Tensor, plan: Permutation, x: Tensor | None) -> Tensor:
    """Σ_k gate · expert output for each token [T, D]: FFN experts from ``rows`` [P, D], identity experts from x [T, D].

    ``gates`` [T, K] float32 are γ·R of the selections (section 3 of the model's equations). Without ``x`` the
    identity experts are left out.

    The results are not saved: the gates of FFN experts get their gradients by `log_gates` alone.
    """
    return Combine.apply(rows, gates, plan, x)


@observed("log_gates")
class _LogGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, plan: Permutation, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(gates, plan.row_index)
        ctx.dtype = dtype
        return gates.new_zeros(plan.token.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        gates, row_index = ctx.saved_tensors
        return passed(Place.gradient, "log_gates", gate_gradients(grads[0], gates, row_index, ctx.dtype)), None, None


def gate_gradients(grad: Tensor, gates: Tensor, row_index: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradients of ``gates`` [T, K] from ``grad`` [P], those of their logarithms; zero where a gate is zero.

    `combine` rounds the gates to ``dtype``.
    """
    of_selection = pad(grad, (0, 1)).index_select(0, row_index.clamp_min(0).reshape(-1)).view_as(gates)
    rounded = gates.to(dtype).to(gates.dtype)
    return torch.where((row_index >= 0) & (rounded != 0), of_selection / rounded, 0.0)


def log_gates(gates: Tensor, plan: Permutation, dtype: torch.dtype) -> Tensor:
    """Zeros [P] float32, one for each row of `permute`; their gradient is ∂loss/∂log gate of the row's selection.

    `grouped_gated_linear` computes that gradient without the experts' results, which would otherwise be saved for it
    alone; ∂loss/∂gate follows from it (`gate_gradients`). ``dtype`` is that of the results.
    """
    return _LogGates.apply(gates.contiguous(), plan, dtype)
