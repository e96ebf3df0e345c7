"""Compares the results of ranks with one process: relative errors of each kind, and their bounds."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tests.support.measure import Measured, assemble, measure
from tests.support.pool import pool

STEPS = 3
FIRST, LATER = 2e-6, 1e-5  # ‖Δ‖/‖ref‖ of each tensor: gradients of step 1, and everything after 3 steps


@cache
def one_process(*overrides: str) -> Measured:
    """The results of one process; computed once per configuration."""
    (measured,) = pool(1).run(measure, list(overrides), STEPS)
    assert measured.smallest_gap > 1e-5, "this seed has a near-tie in its routing: choose another"
    return measured


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).double().norm() / theirs.double().norm().clamp_min(1e-30))


def largest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest relative error. DeepSpeed has zeros where torch has no gradient: MTP's before it is switched on."""
    assert ours.keys() >= theirs.keys()
    assert not any(ours[name].any() for name in ours.keys() - theirs.keys())
    return max(relative(ours[name], theirs[name]) for name in theirs)


def check(errors: dict[str, float]) -> None:
    assert errors["first gradients"] <= FIRST, errors
    assert max(errors.values()) <= LATER, errors


def compare(ranks: list[Measured], expected: Measured) -> dict[str, float]:
    """Largest relative error of each kind; asserts what must be bitwise identical."""
    for measured in ranks:
        assert measured.hashes == ranks[0].hashes, "ranks disagree on the state hash"
        assert [c.tolist() for c in measured.counts] == [c.tolist() for c in expected.counts], "expert counts differ"
        assert torch.equal(measured.biases, ranks[0].biases), "ranks disagree on the biases"
    assert ranks[0].hashes[0] == expected.hashes[0], "initial states are not bitwise identical"
    initial, wanted = assemble([rank.initial for rank in ranks]), assemble([expected.initial])
    assert all(torch.equal(initial[name], wanted[name]) for name in wanted)
    chosen = [sum(rank.selections[step] for rank in ranks) for step in range(STEPS)]
    assert chosen == expected.selections, "selections differ"
    errors = {}
    kinds = ("first_gradients", "last_gradients", "weights", "exp_avg", "exp_avg_sq")
    for kind in kinds:
        ours = assemble([getattr(rank, kind) for rank in ranks])
        errors[kind.replace("_", " ", 1)] = largest(ours, assemble([getattr(expected, kind)]))
    errors["biases"] = relative(ranks[0].biases, expected.biases)
    for key in ("loss", "loss_mtp", "loss_balance", "loss_z", "grad_norm", "router_grad_ratio", "hidden_norm"):
        pairs = [(a[key], b[key]) for a, b in zip(ranks[0].losses, expected.losses, strict=True) if key in b]
        errors[key] = max([abs(a - b) / max(abs(b), 1e-30) for a, b in pairs], default=0.0)
    errors["grad_norm by layer"] = largest_difference(ranks[0].grad_norms, expected.grad_norms)
    return errors


def largest_difference(ours: list[dict[str, float | None]], theirs: list[dict[str, float | None]]) -> float:
    """Largest relative difference of the gradient norms of any part in any step; both must lack the same ones."""
    worst = 0.0
    for step, wanted in zip(ours, theirs, strict=True):
        assert step.keys() == wanted.keys()
        for name, norm in wanted.items():
            found = step[name]
            assert (found is None) == (norm is None), name
            if found is not None and norm is not None:
                worst = max(worst, abs(found - norm) / max(norm, 1e-30))
    return worst
