"""Every layout computes what one process computes: losses, gradients, norm, weights, moments, biases, selections."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.parity.layouts import LAYOUTS, PROBLEMS, Layout
from tests.parity.measure import Measured, assemble, measure
from tests.parity.pool import close_pools, pool

STEPS = 3
FIRST, LATER = 2e-6, 1e-5  # ‖Δ‖/‖ref‖ of each tensor: gradients of step 1, and everything after 3 steps
ERRORS: dict[str, dict[str, float]] = {}


@pytest.fixture(scope="module", autouse=True)
def _pools() -> Iterator[None]:
    yield
    close_pools()
    for name, errors in ERRORS.items():
        print(f"{name:32}", "  ".join(f"{kind} {error:.1e}" for kind, error in errors.items()))


@cache
def reference(problem: str) -> Measured:
    """What one process computes."""
    (measured,) = pool(1).run(measure, PROBLEMS[problem], STEPS)
    assert measured.smallest_gap > 1e-5, "this seed has a near-tie in its routing: choose another"
    return measured


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).double().norm() / theirs.double().norm().clamp_min(1e-30))


def largest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(relative(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_equals_one_process(layout: Layout) -> None:
    expected = reference(layout.problem)
    ranks: list[Measured] = pool(layout.ranks).run(measure, layout.overrides, STEPS)
    errors = compare(ranks, expected)
    ERRORS[layout.name] = errors
    assert errors["first gradients"] <= FIRST, errors
    assert max(errors.values()) <= LATER, errors


def compare(ranks: list[Measured], expected: Measured) -> dict[str, float]:
    """Largest relative error of each kind; what must be equal to the bit is asserted."""
    for measured in ranks:
        assert measured.hashes == ranks[0].hashes, "ranks disagree on the hash of the whole state"
        assert [c.tolist() for c in measured.counts] == [c.tolist() for c in expected.counts], "other counts"
        assert torch.equal(measured.biases, ranks[0].biases), "ranks disagree on the biases"
    assert ranks[0].hashes[0] == expected.hashes[0], "initial state is not equal to the bit"
    initial, wanted = assemble([rank.initial for rank in ranks]), assemble([expected.initial])
    assert all(torch.equal(initial[name], wanted[name]) for name in wanted)
    chosen = [sum(rank.selections[step] for rank in ranks) for step in range(STEPS)]
    assert chosen == expected.selections, "other selections"
    errors = {}
    kinds = ("first_gradients", "last_gradients", "weights", "exp_avg", "exp_avg_sq")
    for kind in kinds:
        ours = assemble([getattr(rank, kind) for rank in ranks])
        errors[kind.replace("_", " ", 1)] = largest(ours, assemble([getattr(expected, kind)]))
    errors["biases"] = relative(ranks[0].biases, expected.biases)
    for key in ("loss", "loss_mtp", "loss_balance", "loss_z", "grad_norm", "router_grad_ratio", "hidden_norm"):
        pairs = [(a[key], b[key]) for a, b in zip(ranks[0].losses, expected.losses, strict=True) if key in b]
        errors[key] = max([abs(a - b) / max(abs(b), 1e-30) for a, b in pairs], default=0.0)
    return errors
