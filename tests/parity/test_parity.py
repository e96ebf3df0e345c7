"""Every layout computes what one process computes: losses, gradients, norm, weights, moments, biases, selections."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch

from tests.parity.conftest import ERRORS
from tests.parity.layouts import COMPILED, COMPILED_PACKED, LAYOUTS, PACKED, PROBLEMS, QUANTILE, YARN, Layout, marked
from tests.parity.mutations import MUTATIONS
from tests.support.comparison import STEPS, check, compare, one_process
from tests.support.measure import LENGTH, Measured, measure
from tests.support.pool import close_pools, pool


@pytest.fixture(scope="module", autouse=True)
def _pools() -> Iterator[None]:
    yield
    close_pools()


@pytest.mark.parametrize("layout", marked(LAYOUTS))
def test_layout_equals_one_process(layout: Layout) -> None:
    expected = one_process(*PROBLEMS[layout.problem])
    errors = compare(measured_on(layout), expected)
    ERRORS[layout.name] = (layout.ranks, " ".join(layout.overrides), errors)
    check(errors)


@pytest.mark.parametrize("layout", YARN, ids=lambda layout: layout.name)
def test_layouts_scale_positions_as_one_process(layout: Layout) -> None:
    """Context parallelism and pipelines use the frequencies and scales of YaRN; they change the loss."""
    expected = one_process(*PROBLEMS[layout.problem])
    check(compare(measured_on(layout), expected))
    assert abs(expected.losses[0]["loss"] - one_process().losses[0]["loss"]) > 1e-4


@pytest.mark.parametrize("layout", marked(QUANTILE))
def test_layouts_count_margins_as_one_process(layout: Layout) -> None:
    """The biases of quantile balancing come from histograms over all tokens of the global batch."""
    expected = one_process(*PROBLEMS[layout.problem])
    check(compare(measured_on(layout), expected))
    assert expected.losses[1]["loss"] != one_process("train.seed=5").losses[1]["loss"]


@pytest.mark.parametrize("layout", marked(PACKED))
def test_layouts_leave_out_padding_as_one_process(layout: Layout) -> None:
    """Samples with padding, whose share differs between ranks; biases come from histograms without it."""
    expected = one_process(*PROBLEMS[layout.problem])
    check(compare(measured_on(layout), expected))
    assert all(0.1 < step["padding_share"] < 0.5 for step in expected.losses)
    tokens = 8 * LENGTH * (1 - expected.losses[0]["padding_share"])
    assert expected.counts[0].sum(1).tolist() == pytest.approx([3 * tokens] * 4), "top_k selections of each token"


@pytest.mark.parametrize(
    "layout", [COMPILED, pytest.param(COMPILED_PACKED, marks=pytest.mark.long)], ids=lambda one: one.name
)
def test_compiled_layout_equals_one_process(layout: Layout) -> None:
    check(compare(measured_on(layout), one_process(*PROBLEMS[layout.problem])))


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
    ranks = pool(chosen.ranks).run(measure, chosen.overrides, STEPS, True, MUTATIONS[mutation])
    with pytest.raises(AssertionError):
        check(compare(ranks, one_process(*PROBLEMS[chosen.problem])))


@pytest.mark.parametrize("layout", [pytest.param("ep2-chunks2", marks=pytest.mark.long), "cp2-ep2-chunks2"])
def test_blocking_collectives_are_bitwise_identical(layout: str) -> None:
    overlapped, blocking = (
        measured_on(next(one for one in LAYOUTS if one.name == name)) for name in (layout, f"{layout}-blocking")
    )
    assert overlapped[0].hashes == blocking[0].hashes
    for ours, theirs in zip(overlapped, blocking, strict=True):
        pairs = zip(ours.first_gradients, theirs.first_gradients, strict=True)
        assert all(one[:3] == other[:3] and torch.equal(one[3], other[3]) for one, other in pairs)


@pytest.mark.parametrize(
    "layout,steps",
    [("ep2", 8), *(pytest.param(name, 20, marks=pytest.mark.long) for name in ("ep2", "tp2-ep2", "cp2-tp2-ep4"))],
)
def test_bfloat16_losses_stay_close(layout: str, steps: int) -> None:
    """|Δloss| ≤ 0.01 nat against one process in bfloat16; rounded sums differ from the first steps on."""
    chosen = next(one for one in LAYOUTS if one.name == layout)
    # few micro-batches, as messages take most of the time
    words = ["train.dtype=bfloat16", "train.global_batch_size=4", "train.micro_batch_size=2"]
    (expected,) = pool(1).run(measure, [*PROBLEMS[chosen.problem], *words], steps, False)
    ours = pool(chosen.ranks).run(measure, [*chosen.overrides, *words], steps, False)[0]
    pairs = zip(ours.losses, expected.losses, strict=True)
    assert max(abs(a["loss"] - b["loss"]) for a, b in pairs) <= 1e-2


@pytest.mark.parametrize("layout", marked(LAYOUTS))
def test_bytes_held_equal_the_formula(layout: Layout) -> None:
    """Summed over ranks, within 2 %, for weights, gradients and moments."""
    ranks = measured_on(layout)
    for kind in ("weights", "gradients", "moments"):
        held = sum(getattr(rank.measured_bytes, kind) for rank in ranks)
        formula = sum(getattr(rank.bytes_by_formula, kind) for rank in ranks)
        assert abs(held / formula - 1) <= 0.02, (
            f"{kind}: {held / len(ranks):.0f} bytes per rank, {formula / len(ranks):.0f} by formula"
        )


@cache
def measured_on(layout: Layout) -> list[Measured]:
    return pool(layout.ranks).run(measure, layout.overrides, STEPS)
