"""Every layout computes what one process computes: losses, gradients, norm, weights, moments, biases, selections."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.parity.conftest import ERRORS
from tests.parity.layouts import LAYOUTS, PROBLEMS, Layout
from tests.parity.measure import Measured, assemble, measure
from tests.parity.pool import close_pools, pool

STEPS = 3
FIRST, LATER = 2e-6, 1e-5  # ‖Δ‖/‖ref‖ of each tensor: gradients of step 1, and everything after 3 steps


@pytest.fixture(scope="module", autouse=True)
def _pools() -> Iterator[None]:
    yield
    close_pools()


@cache
def reference(problem: str) -> Measured:
    """What one process computes."""
    (measured,) = pool(1).run(measure, PROBLEMS[problem], STEPS)
    assert measured.smallest_gap > 1e-5, "this seed has a near-tie in its routing: choose another"
    return measured


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).double().norm() / theirs.double().norm().clamp_min(1e-30))


def largest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """DeepSpeed has zeros where torch has no gradient: MTP's before it joins."""
    assert ours.keys() >= theirs.keys()
    assert not any(ours[name].any() for name in ours.keys() - theirs.keys())
    return max(relative(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_equals_one_process(layout: Layout) -> None:
    expected = reference(layout.problem)
    errors = compare(measured_on(layout), expected)
    ERRORS[layout.name] = (layout.ranks, " ".join(layout.overrides), errors)
    check(errors)


@pytest.mark.parametrize(
    ("mutation", "layout"),
    [
        ("double_one_expert", "ep2"),
        ("drop_a_shard_from_the_norm", "ep2"),
        ("count_a_chunk_twice", "ep2-chunks2"),
        ("read_the_mesh_in_the_balance_loss", "ep2"),
        ("normalise_by_rank", "fsdp2"),
        ("count_replicas_in_the_norm", "dp2"),
    ],
)
def test_suite_detects(mutation: str, layout: str) -> None:
    chosen = next(one for one in LAYOUTS if one.name == layout)
    ranks = pool(chosen.ranks).run(measure, chosen.overrides, STEPS, True, mutation)
    with pytest.raises(AssertionError):
        check(compare(ranks, reference(chosen.problem)))


@pytest.mark.parametrize("layout", ["ep2-chunks2", "cp2-ep2-chunks2"])
def test_blocking_collectives_are_bitwise_identical(layout: str) -> None:
    overlapped, awaited = (
        measured_on(next(one for one in LAYOUTS if one.name == name)) for name in (layout, f"{layout}-awaited")
    )
    assert overlapped[0].hashes == awaited[0].hashes
    for ours, theirs in zip(overlapped, awaited, strict=True):
        pairs = zip(ours.first_gradients, theirs.first_gradients, strict=True)
        assert all(one[:3] == other[:3] and torch.equal(one[3], other[3]) for one, other in pairs)


@pytest.mark.parametrize("layout", ["ep2", "tp2-ep2", "cp2-tp2-ep4"])
def test_bfloat16_losses_stay_close_for_20_steps(layout: str) -> None:
    """|Δloss| ≤ 0.01 nat against one process in bfloat16."""
    chosen = next(one for one in LAYOUTS if one.name == layout)
    # few micro-batches: it is messages that take time
    words = ["train.dtype=bfloat16", "train.global_batch_size=4", "train.micro_batch_size=2"]
    (expected,) = pool(1).run(measure, [*PROBLEMS[chosen.problem], *words], 20, False)
    ours = pool(chosen.ranks).run(measure, [*chosen.overrides, *words], 20, False)[0]
    pairs = zip(ours.losses, expected.losses, strict=True)
    assert max(abs(a["loss"] - b["loss"]) for a, b in pairs) <= 1e-2


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_bytes_held_equal_the_formula(layout: Layout) -> None:
    """Sum over ranks within 2 % for weights, gradients and moments."""
    ranks = measured_on(layout)
    for kind in ("weights", "gradients", "moments"):
        local_boxes = sum(getattr(rank.measured_bytes, kind) for rank in ranks)
        formula = sum(getattr(rank.bytes_by_formula, kind) for rank in ranks)
        assert abs(local_boxes / formula - 1) <= 0.02, (
            f"{kind}: {local_boxes / len(ranks):.0f} bytes a rank, {formula / len(ranks):.0f}"
        )


@cache
def measured_on(layout: Layout) -> list[Measured]:
    return pool(layout.ranks).run(measure, layout.overrides, STEPS)


def check(errors: dict[str, float]) -> None:
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
