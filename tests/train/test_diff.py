"""`longcat diff`: the first step, layer and tensor in which two runs differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from launch.__main__ import main as longcat
from longcat.errors import ConfigError
from tests.support.running import NARROW, train_here
from train.diff import compare_health, compare_metrics, compare_runs, network_order
from train.step import Stepper, StepRequests, StepResult

STEPS = ["train.steps=4", "checkpoint.every=1", "checkpoint.keep=0", "logging.routing_every=1", *NARROW]


@pytest.fixture
def runs(overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Path]:
    """Two equal runs, and one in which a bit of an expert's weight flips after step 2."""
    words = [*overrides, *STEPS]
    assert train_here([*words, "run.name=one"]) == 0
    assert train_here([*words, "run.name=two"]) == 0
    plain = Stepper.step

    def flipping(self: Stepper, requests: StepRequests) -> StepResult:
        result = plain(self, requests)
        if self.state.counters.step == 2:
            layer = next(iter(self.state.models[0].shortcut_layers()))
            weight = layer.mlp.experts.down.data
            weight[3, 5, 7:8].view(torch.int32).bitwise_xor_(1 << 20)
        return result

    monkeypatch.setattr(Stepper, "step", flipping)
    assert train_here([*words, "run.name=flipped", "sdc.at_rest=false"]) == 0
    return tmp_path / "one", tmp_path / "two", tmp_path / "flipped"


def test_diff_names_the_flipped_tensor(runs: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    one, two, flipped = runs
    assert compare_runs(one, two).same
    assert longcat(["diff", str(one), str(two)]) == 0

    found = compare_runs(one, flipped)
    assert found.equal_checkpoints == [1]
    assert found.checkpoint == 2
    (tensor,) = found.tensors
    assert (tensor.kind, tensor.name) == ("weight", "model.layers.0.mlp.experts.3.down_proj.weight")
    assert (tensor.num_different, tensor.num_values) == (1, 32 * 16)
    assert found.metrics is not None
    assert found.metrics.step == 2
    assert list(found.metrics.values) == ["state_hash"]

    capsys.readouterr()
    assert longcat(["diff", str(one), str(flipped)]) == 1
    printed = capsys.readouterr().out
    assert "first differ at step 2" in printed
    assert "model.layers.0.mlp.experts.3.down_proj.weight (weight): 1 of 512 values" in printed

    checkpoints = [str(run / "checkpoints" / "step-00000002") for run in (one, flipped)]
    assert longcat(["diff", *checkpoints]) == 1
    assert "layer 0: 1" in capsys.readouterr().out


def test_clock_metrics_are_left_out() -> None:
    one = {1: {"step": 1, "loss": 2.5, "step_seconds": 1.0, "mfu": 0.1}}
    two = {1: {"step": 1, "loss": 2.5, "step_seconds": 2.0, "mfu": 0.2}}
    assert compare_metrics(one, two) is None
    two[1]["loss"] = 2.5000000000000004
    found = compare_metrics(one, two)
    assert found is not None
    assert found.values == {"loss": (2.5, 2.5000000000000004)}


def test_equal_nans_are_no_difference() -> None:
    rows = [{1: json.loads('{"step": 1, "loss": NaN}')} for _ in range(2)]
    assert compare_metrics(*rows) is None


def test_differing_health_states_are_named() -> None:
    stored = {"losses": [1.0, 2.0], "skipped": [[4, 8]]}
    assert list(compare_health(stored, dict(stored))) == []
    (window,) = compare_health(stored, {**stored, "losses": [1.0, 2.5]})
    assert str(window) == "losses (health checks): 1 of 2 values, largest difference 0.5"
    (ranges,) = compare_health(stored, {"losses": [1.0, 2.0]})
    assert (ranges.name, ranges.num_different, ranges.num_values) == ("skipped", 2, 2)


def test_network_order_is_embedding_layers_head_mtp() -> None:
    keys = ["weight/mtp.layers.0.x", "weight/lm_head.weight", "weight/layers.10.a", "weight/layers.2.a"]
    ordered = sorted([*keys, "weight/embed_tokens.weight"], key=network_order)
    assert ordered == ["weight/embed_tokens.weight", keys[3], keys[2], keys[1], keys[0]]


def test_runs_without_common_steps_are_refused(tmp_path: Path) -> None:
    for name, step in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"step": step, "loss": 1.0}) + "\n")
    with pytest.raises(ConfigError, match="no step in common"):
        compare_runs(tmp_path / "one", tmp_path / "two")
    with pytest.raises(ConfigError, match="is no run"):
        compare_runs(tmp_path / "one", tmp_path / "three")


def test_diff_wants_two_folders(capsys: pytest.CaptureFixture[str]) -> None:
    assert longcat(["diff", "one"]) == 2
    assert "compares two folders" in capsys.readouterr().err
