"""`train.elastic_bits`: the same bits at every data-parallel size; without any one of its cures, others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.elastic import CURES, Values, train
from tests.support.pool import pool

STEPS = 2
DOCUMENTS = "data.mask_documents=true train.sequence_length=32"
PACKED = f"{DOCUMENTS} data.packing=best_fit"
Layout = tuple[int, str]  # ranks, overrides of parallel.*
EP: list[Layout] = [(2, "fsdp=2 ep=2"), (4, "fsdp=4 ep=2"), (4, "dp=2 fsdp=2 ep=2")]
FAMILIES: dict[str, tuple[str, list[Layout]]] = {  # name → overrides, layouts of different data-parallel sizes
    "fsdp": ("", [(1, "fsdp=1"), (2, "fsdp=2"), (4, "fsdp=4"), (4, "dp=2 fsdp=2"), (2, "dp=2 fsdp=1"), (4, "dp=4")]),
    "bfloat16": ("train.dtype=bfloat16", [(1, "fsdp=1"), (2, "fsdp=2"), (4, "fsdp=4"), (4, "dp=2 fsdp=2")]),
    "documents": (DOCUMENTS, [(1, "fsdp=1"), (2, "fsdp=2"), (4, "fsdp=4"), (4, "dp=2 fsdp=2")]),
    "ep": (DOCUMENTS, EP),
    "cp": (DOCUMENTS, [(2, "fsdp=1 cp=2"), (4, "fsdp=2 cp=2"), (8, "fsdp=4 cp=2"), (8, "dp=2 fsdp=2 cp=2")]),
    "tp": ("", [(2, "fsdp=1 tp=2"), (4, "fsdp=2 tp=2"), (8, "fsdp=4 tp=2"), (8, "dp=2 fsdp=2 tp=2")]),
    "pp": (
        "model.num_layers=4 train.global_batch_size=16",
        [(2, "pp=2 fsdp=1"), (4, "pp=2 fsdp=2"), (8, "pp=2 fsdp=4"), (8, "pp=2 dp=2 fsdp=2")],
    ),
    "cp and ep": ("", [(2, "fsdp=1 cp=2 ep=2"), (4, "fsdp=2 cp=2 ep=2"), (4, "dp=2 fsdp=1 cp=2 ep=2")]),
    "late MTP": ("loss.mtp_start_tokens=256", [(1, "fsdp=1"), (4, "fsdp=4"), (4, "dp=2 fsdp=2")]),
}


def words(layout: str, problem: str) -> list[str]:
    return [*(f"parallel.{word}" for word in layout.split()), *problem.split()]


def trained(
    layout: Layout, problem: str, steps: int, without: str = "", start: str = "", end: str = ""
) -> list[Values]:
    """The values of each step, which all ranks report alike."""
    ranks, overrides = layout
    first, *others = pool(ranks).run(train, words(overrides, problem), steps, without, start, end, timeout=3000)
    assert all(str(other) == str(first) for other in others)
    return first  # type: ignore[no-any-return]


def different(one: list[Values], other: list[Values]) -> list[str]:
    """The names of the values that differ in any step; the number of steps must be equal."""
    pairs = zip(one, other, strict=True)
    return sorted({name for left, right in pairs for name in left.keys() | right.keys() if left[name] != right[name]})


def test_ep_layouts_agree_in_every_value() -> None:
    """Losses, norms, router metrics, state hash and validation loss; packed documents, MTP, expert groups of two."""
    smallest, *others = (trained(layout, PACKED, STEPS) for layout in EP)
    assert 0 < smallest[-1]["padding_share"] < 0.5
    assert smallest[-1]["loss_mtp"] > 0 and smallest[-1]["router_grad_ratio"] > 0
    assert [different(smallest, other) for other in others] == [[], []]


def test_size_may_change_in_mid_run(tmp_path: Path) -> None:
    """Two steps on fsdp 4, then from its checkpoint one on fsdp 2."""
    whole = trained(EP[0], "", 3)
    first = trained(EP[1], "", 2, end=str(tmp_path))
    (checkpoint,) = tmp_path.glob("step-*")
    first[-1].pop("val_loss")  # measured where a training ends
    assert different([*first, *trained(EP[0], "", 3, start=str(checkpoint))], whole) == []


@pytest.mark.parametrize("cure", ["tree of sums", "exact norm", "whole vectors", "dealing by groups"])
def test_each_cure_is_needed(cure: str) -> None:
    problem = "train.sequence_length=32 model.num_layers=1"
    assert different(trained(EP[0], problem, 2, cure), trained(EP[1], problem, 2, cure))


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_all_sizes_agree_over_50_steps(family: str) -> None:
    problem, (first, *others) = FAMILIES[family]
    smallest = trained(first, problem, 50)
    assert [different(smallest, trained(layout, problem, 50)) for layout in others] == [[] for _ in others]


@pytest.mark.long
@pytest.mark.parametrize("family", ["documents", "ep", "pp"])
def test_size_changes_every_ten_steps(family: str, tmp_path: Path) -> None:
    problem, layouts = FAMILIES[family]
    whole = trained(layouts[0], problem, 50)
    found: list[Values] = []
    start = ""
    for turn in range(5):
        folder = tmp_path / str(turn)
        found += trained(layouts[-1 - turn % len(layouts)], problem, 10 * (turn + 1), "", start, str(folder))
        (checkpoint,) = folder.glob("step-*")
        start = str(checkpoint)
        if turn < 4:
            found[-1].pop("val_loss")
    assert different(found, whole) == []


@pytest.mark.long
@pytest.mark.parametrize("cure", CURES)
def test_every_cure_is_needed_between_some_sizes(cure: str) -> None:
    problem = "train.sequence_length=32"
    sizes = [(2, "fsdp=2 ep=2"), (4, "fsdp=4 ep=2"), (4, "dp=2 fsdp=2 ep=2"), (8, "dp=4 fsdp=2 ep=2")]
    first, *others = (trained(size, f"{problem} train.elastic_bits=8", 2, cure) for size in sizes)
    assert any(different(first, other) for other in others)
