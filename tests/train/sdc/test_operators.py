"""Faults inside operators end a training step on all ranks, with the rank, the operator and a file that repeats it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.__main__ import main
from longcat.errors import CorruptionError
from longcat.faults import install_hook
from longcat.ops.calls import set_observer
from parallel.mesh import make_topology, resolve_sizes, world_from_environment
from parallel.sdc.inject import Injector
from parallel.sdc.spec import parse_faults
from tests.support.measure import MODEL, samples
from tests.support.pool import close_pools, pool
from train.batches import BatchReader
from train.compose import compose
from train.run import build_state
from train.sdc.operators import OperatorReport, operator_finding
from train.step import Stepper

SMALL = [
    "model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=64", "model.expert_hidden_size=32",
    "train.global_batch_size=2", "balance.num_groups=2",
]  # fmt: skip
STUCK = "product/lane/step:3"


@pytest.fixture(scope="module", autouse=True)
def _pools() -> Iterator[None]:
    yield
    close_pools()


def train(words: list[str], steps: int) -> tuple[int, str, dict[str, Any]]:
    """The step that ended in a finding (0: none did), the message and the finding. A collective."""
    config = compose([*MODEL, *SMALL, *words])
    rank, _, world_size = world_from_environment()
    topology = make_topology(resolve_sizes(config.parallel, world_size), rank, world_size, torch.device("cpu"))
    state = build_state(config, topology)
    stepper = Stepper(state, BatchReader(samples(config), config, topology), config, topology)  # type: ignore[arg-type]
    try:
        for step in range(1, steps + 1):
            try:
                stepper.step()
            except CorruptionError as error:
                return step, str(error), error.details["finding"]
        return 0, "", {}
    finally:
        install_hook(None)
        set_observer(None)
        state.engine.close()


def test_stuck_products_of_one_rank_end_all_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"run.dir={tmp_path}", "run.name=a", f"sdc.inject={STUCK}/rank:1/persistent"]
    ends = pool(2).run(train, words, 12)
    assert ends[0] == ends[1]
    step, message, finding = ends[0]
    assert 3 <= step <= 5
    assert (finding["kind"], finding["rank"], finding["layer"]) == ("operator", 1, 0)
    assert "the fault is lasting" in message and "rank 1 (" in message and finding["operator"] in message
    assert 1 <= finding["since"] < step, "its call had its turn before the fault began"
    (bundle,) = (tmp_path / "a" / "sdc").iterdir()
    assert f"longcat replay {bundle}" in message
    assert main(["replay", str(bundle)]) == 5, "the recorded result is wrong"
    assert "computed something else" in capsys.readouterr().out
    injector = Injector(parse_faults("product/lane/persistent"), 0)
    injector.begin_step(1)
    injector.install()
    try:
        assert main(["replay", str(bundle)]) == 5
    finally:
        install_hook(None)
    assert "this machine shows it too" in capsys.readouterr().out


def test_wrong_update_never_gets_past_the_next_step(tmp_path: Path) -> None:
    """Every tensor is one tile here; the tile that is redone rotates, so the fault strikes all tensors."""
    words = [f"run.dir={tmp_path}", "sdc.inject=optimizer/bits/step:2/persistent"]
    ((step, message, finding),) = pool(1).run(train, words, 6)
    assert step == 3 and finding["kind"] == "update" and finding["operator"] == "AdamW", message


def test_nothing_is_found_in_clean_steps(tmp_path: Path) -> None:
    assert {one[0] for one in pool(2).run(train, [f"run.dir={tmp_path}", "parallel.ep=2"], 8)} == {0}
    assert not (tmp_path / "default" / "sdc").exists()


def test_without_checks_nothing_is_observed(tmp_path: Path) -> None:
    fault = f"sdc.inject={STUCK}/persistent"
    ((step, *_),) = pool(1).run(train, [f"run.dir={tmp_path}", "sdc.every=0", fault], 6)
    assert step == 0


def test_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "default").mkdir()
    (tmp_path / "default" / "sdc").write_text("in the way")
    ((step, message, _),) = pool(1).run(train, [f"run.dir={tmp_path}", f"sdc.inject={STUCK}/persistent"], 12)
    assert step and "could not be saved" in message


def test_all_ranks_alike_do_not_accuse_a_device() -> None:
    report = OperatorReport("linear, forward", "layers.0.mlps.0", "lasting", 3, 0.5, "", 4)
    assert "suspect the program" in operator_finding(9, [report, report]).detail
    for others in ([report], [report, None], [report, replace(report, persistence="transient")]):
        assert "suspect the program" not in operator_finding(9, others).detail
    assert operator_finding(9, [None, report]).since == 4
