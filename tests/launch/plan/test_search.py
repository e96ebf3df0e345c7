"""What a search leaves out before it traces, and the nearest layout that fits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.plan.cluster import find_cluster
from launch.plan.nearest import fitting_near
from launch.plan.plan import plan, read
from parallel.capacity import needs
from tests.launch.plan.allocations import COMMON
from tests.support.distributed import run_ranks
from train.check import batch_shape

LIMIT = 600.0


def bounds_and_peaks(overrides: Sequence[str]) -> list[tuple[float, float]]:
    """(bytes by `needs`, planned peak) of each place in the pipeline."""
    config, options = read([*COMMON, *overrides])
    found = plan(config, options, with_knobs=False, factors=(1.0,))
    batch = batch_shape(config, found.sizes)
    least = needs(config.model, config.parallel, found.sizes, batch, on_gpu=True)
    return [(need.total, one.peak[1.0]) for need, one in zip(least, found.memory, strict=True)]


LONG_MODEL = ["model.num_layers=200", "train.sequence_length=7168", "train.micro_batch_size=1"]


@pytest.mark.parametrize(
    "overrides",
    [
        # As many bytes of layer inputs as of gradients, which take their place in the backward
        [*LONG_MODEL, "train.global_batch_size=1", "parallel.recompute=full"],
        pytest.param(
            ["plan.ranks=2", "parallel.ep=2", "parallel.recompute=full", "train.micro_batch_size=1"],
            marks=pytest.mark.long,
        ),
        pytest.param([*LONG_MODEL, "train.global_batch_size=4", "parallel.recompute=full"], marks=pytest.mark.long),
        pytest.param(["plan.ranks=2", "parallel.pp=2", "model.num_layers=4"], marks=pytest.mark.long),
        pytest.param(["plan.ranks=2", "parallel.sharding=zero2", "parallel.recompute=full"], marks=pytest.mark.long),
    ],
    ids=" ".join,
)
def test_no_layout_needs_less_than_its_bound(overrides: list[str]) -> None:
    (found,) = run_ranks(bounds_and_peaks, 1, overrides, timeout=LIMIT)
    for least, peak in found:
        assert 0 < least <= peak


def nearest_that_fits(overrides: Sequence[str], cluster: str) -> tuple[str, bool]:
    """(the sentence, whether a plan of the layout that it names fits)."""
    arguments = [*COMMON, *overrides, "plan.ranks=1", f"plan.cluster={cluster}"]
    config, options = read(arguments)
    sentence = fitting_near(config, options, find_cluster(cluster))
    named = [word for word in sentence.split() if "=" in word]
    return sentence, plan(*read([*arguments, *named]), factors=(1.0,)).fits()


@pytest.mark.parametrize(
    ("overrides", "mib", "said"),
    [
        (["model.num_layers=1"], 35, "plan.ranks=2 parallel.pp=1"),
        pytest.param(["train.micro_batch_size=8"], 70, "parallel.recompute=full", marks=pytest.mark.long),
    ],
)
def test_nearest_that_fits(overrides: list[str], mib: int, said: str, tmp_path: Path) -> None:
    """Another recomputation where that is enough, else more GPUs."""
    path = tmp_path / "small.yaml"
    path.write_text(f"like: h800\nmemory_gib: {mib / 1024}\nreserved_gib: 0\nfragmented: 0\n")
    ((sentence, fits),) = run_ranks(nearest_that_fits, 1, overrides, str(path), timeout=LIMIT)
    assert sentence.startswith("The nearest that fits: ") and said in sentence
    assert fits
