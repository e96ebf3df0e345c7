"""Cases for test_kernels.py, which runs this file with Triton's interpreter: each kernel against its plain version.

Not collected by name: TRITON_INTERPRET has to be set before the kernels are imported.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import longcat.ops.one_pass
from longcat.ops.permute import plan_permutation
from tests.support.kernel_cases import (
    Case,
    Heads,
    assert_bits,
    check_combine,
    check_embedding,
    check_gate,
    check_gather,
    check_grouped,
    check_norm,
    check_plan,
    check_rotation,
    check_selections,
    check_sum,
    check_sums,
)


def share_of(examples: int) -> int:
    """The number of random examples to run: a share of them, as test_kernels.py says."""
    return round(examples * float(os.environ.get("LONGCAT_EXAMPLES", "1")))


cases = st.builds(
    Case,
    tokens=st.integers(0, 40),
    experts=st.integers(1, 9),
    zero=st.integers(0, 5),
    top_k=st.integers(1, 6),
    width=st.sampled_from([1, 3, 8, 40, 257, 600]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    skew=st.sampled_from([0.0, 3.0, 1e6]),
    seed=st.integers(0, 2**20),
)
ALL_IDENTITY = Case(tokens=5, experts=2, zero=4, top_k=3, width=40, dtype=torch.bfloat16, skew=-1e6, seed=1)
EMPTY_EXPERTS = Case(tokens=33, experts=9, zero=0, top_k=2, width=257, dtype=torch.float32, skew=1e6, seed=2)
NO_TOKENS = Case(tokens=0, experts=3, zero=1, top_k=2, width=8, dtype=torch.bfloat16, skew=0.0, seed=3)
SEVERAL_BLOCKS = Case(tokens=70, experts=5, zero=3, top_k=6, width=3, dtype=torch.bfloat16, skew=0.0, seed=4)


@given(case=cases)
@example(case=ALL_IDENTITY)
@example(case=EMPTY_EXPERTS)
@example(case=NO_TOKENS)
@example(case=SEVERAL_BLOCKS)
@settings(max_examples=share_of(30))
def test_plan(case: Case) -> None:
    check_plan(case)


@given(case=cases)
@example(case=ALL_IDENTITY)
@example(case=NO_TOKENS)
@example(case=SEVERAL_BLOCKS)
@settings(max_examples=share_of(15))
def test_selections(case: Case) -> None:
    check_selections(case)


@given(case=cases)
@example(case=ALL_IDENTITY)
@example(case=EMPTY_EXPERTS)
@example(case=NO_TOKENS)
@settings(max_examples=share_of(15))
def test_gather(case: Case) -> None:
    check_gather(case)


@given(case=cases)
@example(case=ALL_IDENTITY)
@example(case=EMPTY_EXPERTS)
@example(case=NO_TOKENS)
@settings(max_examples=share_of(25))
def test_sum(case: Case) -> None:
    check_sum(case)


@given(case=cases, identity=st.booleans())
@example(case=ALL_IDENTITY, identity=True)
@example(case=ALL_IDENTITY, identity=False)
@example(case=EMPTY_EXPERTS, identity=True)
@example(case=NO_TOKENS, identity=True)
@settings(max_examples=share_of(40))
def test_combine_and_its_backward(case: Case, identity: bool) -> None:
    check_combine(case, identity)


@given(
    places=st.integers(0, 150),
    num_rows=st.sampled_from([1, 2, 5, 300]),
    width=st.sampled_from([1, 3, 40, 1030]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**20),
)
@example(places=0, num_rows=5, width=3, dtype=torch.float32, seed=0)
@example(places=129, num_rows=1, width=3, dtype=torch.bfloat16, seed=0)
@settings(max_examples=share_of(25))
def test_embedding_gradient(places: int, num_rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    check_embedding(places, num_rows, width, dtype, seed)


@given(case=cases, outputs=st.sampled_from([1, 24, 130]))
@example(case=ALL_IDENTITY, outputs=24)
@example(case=EMPTY_EXPERTS, outputs=130)
@example(case=NO_TOKENS, outputs=8)
@settings(max_examples=share_of(15))
def test_grouped_products(case: Case, outputs: int) -> None:
    check_grouped(case, outputs)


@given(case=cases)
@example(case=NO_TOKENS)
@example(case=SEVERAL_BLOCKS)
@settings(max_examples=share_of(15))
def test_norm(case: Case) -> None:
    check_norm(case)


@given(case=cases)
@example(case=NO_TOKENS)
@settings(max_examples=share_of(15))
def test_sums(case: Case) -> None:
    check_sums(case)


def test_norm_of_more_blocks_than_are_added_by_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five blocks of rows, of which two at a time are added by halves; few numbers, so some sums are zeros."""
    from parallel.kernels import one_pass as kernels

    for module in (longcat.ops.one_pass, kernels):
        monkeypatch.setattr(module, "BLOCKS", 2)
    check_norm(Case(tokens=140, experts=1, zero=0, top_k=1, width=2, dtype=torch.float32, skew=0.0, seed=5))


@given(case=cases)
@example(case=NO_TOKENS)
@settings(max_examples=share_of(15))
def test_gate(case: Case) -> None:
    check_gate(case)


@given(
    sizes=st.builds(
        Heads,
        batch=st.integers(0, 2),
        positions=st.integers(1, 4),
        heads=st.integers(1, 5),
        nope=st.integers(1, 9),
        pairs=st.integers(1, 5),
        value=st.integers(1, 8),
        padded=st.integers(8, 12),
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=share_of(25))
def test_rotation(sizes: Heads, dtype: torch.dtype, seed: int) -> None:
    check_rotation(sizes, dtype, seed)


def test_negative_zeros_and_infinities() -> None:
    """The signs of zeros agree, and a non-finite value reaches its own token only."""
    from parallel.kernels import rows as kernels

    plan = plan_permutation(torch.tensor([[0, 2], [1, 0], [2, 2]]), 2, 3)
    rows = torch.tensor([[-0.0, -0.0, float("inf")], [1.0, -0.0, 2.0], [-1.0, -0.0, 3.0]], dtype=torch.bfloat16)
    gates, x = torch.full((3, 2), 0.5), torch.full((3, 3), -0.0, dtype=torch.bfloat16)
    plain = torch.ops.longcat.combine_rows(rows, gates, plan.row_index, x)
    assert_bits(kernels.combine_rows(rows, gates, plan.row_index, x), plain)
    assert torch.isfinite(plain).sum() == plain.numel() - 1
