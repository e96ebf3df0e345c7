"""One routing at random, and each kernel against its plain version in bits: in the interpreter and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from longcat.ops import elementwise, fp32_linear, fusion, rotation
from longcat.ops.permute import Permutation, plan_permutation
from longcat.ops.permuted import permuting

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_bits(ours: Tensor, plain: Tensor) -> None:
    """Same shape, dtype and bits, the signs of zeros included."""
    assert ours.shape == plain.shape and ours.dtype is plain.dtype
    integer = INTEGERS[ours.element_size()]
    ours, plain = ours.cpu().contiguous(), plain.cpu().contiguous()
    different = ours.view(integer) != plain.view(integer)
    assert not bool(different.any()), f"{int(different.sum())} of {ours.numel()}: {ours[different]} {plain[different]}"


def tensors(plan: Permutation) -> tuple[Tensor, ...]:
    """The outputs of the `plan` operator."""
    return plan.token, plan.selection, plan.row_index, plan.counts


@dataclass(frozen=True)
class Case:
    """A routing of random numbers; ``skew`` prefers the first FFN experts (below zero, it avoids all of them)."""

    tokens: int
    experts: int
    zero: int
    top_k: int
    width: int
    dtype: torch.dtype
    skew: float
    seed: int
    device: str = "cpu"

    @cached_property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    @cached_property
    def indices(self) -> Tensor:
        """[T, K], on the CPU."""
        top_k = min(self.top_k, self.experts + self.zero)
        scores = torch.rand(self.tokens, self.experts + self.zero, generator=self.generator)
        scores[:, : self.experts] += self.skew * torch.linspace(1, 0.1, self.experts)
        return scores.topk(top_k).indices

    @cached_property
    def plan(self) -> Permutation:
        """The plain version's, on the case's device."""
        plan = plan_permutation(self.indices, self.experts, self.experts + self.zero)
        return Permutation(*(part.to(self.device) for part in tensors(plan)))

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Numbers of mixed sizes on the case's device; some are zero."""
        values = torch.randn(*shape, generator=self.generator)
        values *= 10.0 ** torch.randint(-2, 3, shape, generator=self.generator)
        values[torch.rand(shape, generator=self.generator) < 0.1] = 0.0
        return values.to(dtype or self.dtype).to(self.device)


def check_plan(case: Case) -> None:
    from parallel.kernels.permute import plan

    ours = plan(case.indices.to(case.device), case.experts, case.experts + case.zero)
    for mine, expected in zip(ours, tensors(case.plan), strict=True):
        assert_bits(mine, expected)


def check_selections(case: Case) -> None:
    from longcat.ops import selections
    from parallel.kernels.permute import count_selections, spread_gates

    num_routed, indices = case.experts + case.zero, case.indices.to(case.device)
    assert_bits(count_selections(indices, num_routed), selections.count_selections(case.indices, num_routed))
    grad = case.draw(*indices.shape, dtype=torch.float32)
    plain = selections.spread_gates(grad.cpu(), case.indices, num_routed)
    assert_bits(spread_gates(grad, indices, num_routed), plain)


def check_gather(case: Case) -> None:
    from parallel.kernels.rows import gather_rows

    x = case.draw(case.tokens, case.width)
    assert_bits(gather_rows(x, case.plan.token), torch.ops.longcat.gather_rows(x.cpu(), case.plan.token.cpu()))


def check_sum(case: Case) -> None:
    from parallel.kernels.rows import sum_rows

    rows = case.draw(case.plan.token.shape[0], case.width)
    assert_bits(sum_rows(rows, case.plan.row_index), torch.ops.longcat.sum_rows(rows.cpu(), case.plan.row_index.cpu()))


def check_combine(case: Case, identity: bool) -> None:
    from parallel.kernels.rows import combine_rows, combine_rows_backward, dot_rows

    plan, plain = case.plan, torch.ops.longcat
    rows = case.draw(plan.token.shape[0], case.width)
    gates = case.draw(*plan.row_index.shape, dtype=torch.float32)
    x = case.draw(case.tokens, case.width) if identity else None
    grad = case.draw(case.tokens, case.width)
    cpu_inputs = rows.cpu(), gates.cpu()
    cpu_x = None if x is None else x.cpu()
    assert_bits(
        combine_rows(rows, gates, plan.row_index, x), plain.combine_rows(*cpu_inputs, plan.row_index.cpu(), cpu_x)
    )
    indices = plan.token, plan.selection, plan.row_index
    ours = combine_rows_backward(grad, gates, *indices, x)
    expected = plain.combine_rows_backward(grad.cpu(), gates.cpu(), *(part.cpu() for part in indices), cpu_x)
    other = case.draw(*rows.shape)
    assert_bits(dot_rows(rows, other), plain.dot_rows(rows.cpu(), other.cpu()))
    for mine, wanted in zip(ours, expected, strict=True):
        assert_bits(mine, wanted)


def check_grouped(case: Case, outputs: int) -> None:
    """Against products in float64: the order of a GEMM's sums is no contract, so not by bits."""
    from parallel.kernels.grouped import grouped_rows, grouped_sums

    counts = case.plan.counts[: case.experts]
    ends = counts.cumsum(0).to(torch.int32)
    rows = case.draw(case.plan.token.shape[0], case.width)
    weight = case.draw(case.experts, outputs, case.width)
    grad = case.draw(rows.shape[0], outputs)
    tolerance = 1e-5 if case.dtype is torch.float32 else 2**-8
    parts = [part.double() for part in rows.split(counts.tolist())]
    grads = [part.double() for part in grad.split(counts.tolist())]
    wanted = torch.cat([part @ one.double().t() for part, one in zip(parts, weight, strict=True)])
    sums = torch.stack([of_grad.t() @ part for of_grad, part in zip(grads, parts, strict=True)])
    for found, exact in (
        (grouped_rows(rows, weight.transpose(1, 2), ends), wanted),
        (grouped_sums(grad, rows, ends), sums),
    ):
        assert found.shape == exact.shape and found.dtype is case.dtype
        assert torch.linalg.vector_norm(found - exact) <= tolerance * torch.linalg.vector_norm(exact)


def check_embedding(places: int, num_rows: int, width: int, dtype: torch.dtype, seed: int, device: str = "cpu") -> None:
    """Ids of which low ones are frequent, and some are out of range."""
    from parallel.kernels.embedding import embedding_gradient

    case = Case(0, 1, 0, 1, width, dtype, 0.0, seed, device)
    ids = (torch.rand(places, generator=case.generator) ** 3 * (num_rows + 1)).long()
    grad = case.draw(places, width)
    plain = torch.ops.longcat.embedding_gradient(grad.cpu(), ids, num_rows)
    assert_bits(embedding_gradient(grad, ids.to(device), num_rows), plain)


def permuted(module: ModuleType, kernels: tuple[Callable[..., Any], ...], function: str, *operands: Any) -> Any:
    """``function`` of a module of `longcat.ops`, which calls the kernels, of permuted operands."""
    with ExitStack() as stack:
        for name in ("is_on_gpu", "can_permute"):
            stack.enter_context(patch.object(fusion, name, lambda _: True))
        for kernel in kernels:
            stack.enter_context(patch.object(module, kernel.__name__, kernel))
        stack.enter_context(permuting())
        return getattr(module, function)(*operands)


def assert_all_bits(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for mine, wanted in zip(ours, expected, strict=True):
        assert_bits(mine, wanted)


def check_norm(case: Case) -> None:
    """Rows that are apart in memory, as a latent beside a rotary key is."""
    from parallel.kernels.one_pass import add_norm_rows, add_norm_rows_backward, norm_rows, norm_rows_backward

    x = case.draw(case.tokens, case.width + 3)[:, : case.width]
    gain, grad = case.draw(case.width, dtype=torch.float32), case.draw(case.tokens, case.width)
    plain = torch.ops.longcat.norm_rows(x.cpu(), gain.cpu(), 1e-6)
    assert_all_bits(norm_rows(x, gain, 1e-6), plain)
    kernels = norm_rows, norm_rows_backward, add_norm_rows, add_norm_rows_backward
    assert_all_bits(permuted(elementwise, kernels, "_norm", x, gain, 1e-6), plain)
    plain_backward = torch.ops.longcat.norm_rows_backward(grad.cpu(), x.cpu(), gain.cpu(), plain[1])
    operands = grad, x, gain, plain[1].to(case.device)
    assert_all_bits(norm_rows_backward(*operands), plain_backward)
    assert_all_bits(permuted(elementwise, kernels, "_norm_backward", *operands), plain_backward)
    y = case.draw(case.tokens, case.width)
    plain = torch.ops.longcat.add_norm_rows(x.cpu(), y.cpu(), gain.cpu(), 1e-6)
    assert_all_bits(add_norm_rows(x, y, gain, 1e-6), plain)
    assert_all_bits(permuted(elementwise, kernels, "_add_norm", x, y, gain, 1e-6), plain)
    operands = y, grad, plain[0].to(case.device), gain, plain[2].to(case.device)
    expected_backward = torch.ops.longcat.add_norm_rows_backward(*(one.cpu() for one in operands))
    assert_all_bits(add_norm_rows_backward(*operands), expected_backward)
    assert_all_bits(permuted(elementwise, kernels, "_add_norm_backward", *operands), expected_backward)


def check_sums(case: Case) -> None:
    """Three tensors added, of rows that are apart; float32 numbers in three bfloat16 parts."""
    from parallel.kernels.sums import add_three, split_rows

    x, y, z = (case.draw(case.tokens, case.width + 3)[:, : case.width] for _ in range(3))
    plain = torch.ops.longcat.add_three(x.cpu(), y.cpu(), z.cpu())
    assert_bits(add_three(x, y, z), plain)
    assert_bits(add_three(*(one[None] for one in (x, y, z)))[0], plain)
    assert_bits(permuted(elementwise, (add_three,), "sum_of_three", x, y, z), plain)
    whole = case.draw(case.tokens, case.width + 1, dtype=torch.float32)[:, 1:]
    plain = torch.ops.longcat.split_rows(whole.cpu())
    assert_bits(split_rows(whole), plain)
    assert_bits(permuted(fp32_linear, (split_rows,), "_split", whole), plain)


def check_gate(case: Case) -> None:
    """The halves of one tensor, as experts have them; some numbers are beyond the range of exp."""
    from parallel.kernels.one_pass import gate_rows, gate_rows_backward

    gate, up = case.draw(case.tokens, 2 * case.width).chunk(2, -1)
    grad, plain = case.draw(case.tokens, case.width), torch.ops.longcat
    assert_bits(gate_rows(gate, up), plain.gate_rows(gate.cpu(), up.cpu()))
    ours = gate_rows_backward(grad, gate, up)
    expected = plain.gate_rows_backward(grad.cpu(), gate.cpu(), up.cpu())
    for mine, wanted in zip(ours, expected, strict=True):
        assert_bits(mine, wanted)


@dataclass(frozen=True)
class Heads:
    """Sizes of queries, keys and values: sequences, positions, heads, their width without positions, pairs, values."""

    batch: int
    positions: int
    heads: int
    nope: int
    pairs: int
    value: int
    padded: int


def check_rotation(sizes: Heads, dtype: torch.dtype, seed: int, device: str = "cpu") -> None:
    """Queries there and back, keys with values, and their gradients."""
    from parallel.kernels import rotary

    case, plain = Case(0, 1, 0, 1, 1, dtype, 0.0, seed, device), torch.ops.longcat
    tokens, turned = (sizes.batch, sizes.positions), 2 * sizes.pairs
    angles = torch.polar(*torch.rand(2, sizes.positions, sizes.pairs, generator=case.generator) * 3)
    on_device = angles.to(device)
    kernels = rotary.rotate_, rotary.rotate_back, rotary.join_keys, rotary.keys_and_values_backward
    query = case.draw(*tokens, sizes.heads, sizes.nope + turned)
    wanted = plain.rotate_back(query.cpu(), angles)
    assert_bits(rotary.rotate_back(query, on_device), wanted)
    assert_bits(permuted(rotation, kernels, "_rotate_back", query, on_device), wanted)
    ours, again, wanted = query.clone(), query.clone(), query.cpu().clone()
    assert rotary.rotate_(ours[..., sizes.nope :], on_device).data_ptr() == ours[..., sizes.nope :].data_ptr()
    permuted(rotation, kernels, "_rotate_in_place", again[..., sizes.nope :], on_device)
    plain.rotate_(wanted[..., sizes.nope :], angles)
    assert_all_bits((ours, again), (wanted, wanted))
    expanded = case.draw(*tokens, sizes.heads, sizes.nope + sizes.value)
    k_rope = case.draw(*tokens, turned + 3)[..., 3:]
    k_nope = expanded[..., : sizes.nope]
    wanted = plain.join_keys(k_nope.cpu(), k_rope.cpu(), angles)
    assert_bits(rotary.join_keys(k_nope, k_rope, on_device), wanted)
    assert_bits(permuted(rotation, kernels, "_join_keys", k_nope, k_rope, on_device), wanted)
    grads = query, case.draw(*tokens, sizes.heads, sizes.padded)
    operands = *grads, on_device, sizes.value
    expected = plain.keys_and_values_backward(*(grad.cpu() for grad in grads), angles, sizes.value)
    assert_all_bits(rotary.keys_and_values_backward(*operands), expected)
    assert_all_bits(permuted(rotation, kernels, "_keys_and_values_backward", *operands), expected)
