"""`longcat merge`: the mean of checkpoints bit for bit, training and export from it; refusals end with code 2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from launch.__main__ import main as longcat
from tests.support.exporting import SMALL, trained
from tests.support.fixtures import Refused
from tests.support.running import contents, train_here, train_two
from train.checkpoint import streamed
from train.checkpoint.manifest import STATE
from train.checkpoint.offline_reader import Checkpoint, full_box


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps with the checkpoint of each."""
    words = ["checkpoint.every=1", "checkpoint.keep=0", "train.steps=4", "schedule=constant", "balance.ki=0.5"]
    return trained(corpus, tmp_path_factory.mktemp("runs"), *words).parents[1]


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step-{number:08d}"


def state(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its key."""
    source = Checkpoint(folder)
    stored = source.metadata.state_dict_metadata
    return {key: source.read_key(key, full_box(tuple(one.size))) for key, one in stored.items()}


def test_merge_is_the_mean_bit_for_bit(run: Path, tmp_path: Path) -> None:
    """Weights, biases and the controller; moments are zero; nothing of the sources changes."""
    before = contents(run)
    assert longcat(["merge", f"source={run}", f"target={tmp_path / 'merged'}", "last=3"]) == 0
    assert contents(run) == before
    assert longcat(["checkpoint", "verify", str(tmp_path / "merged")]) == 0
    parts, merged = [state(step(run, number)) for number in (2, 3, 4)], state(tmp_path / "merged")
    assert merged.keys() == parts[0].keys()
    for key, tensor in merged.items():
        assert tensor.dtype == parts[0][key].dtype
        if key.startswith(("exp_avg", "optimizer_step")):
            assert not tensor.any()
        elif not tensor.is_floating_point():
            assert torch.equal(tensor, parts[2][key])
        else:
            mean = (parts[0][key] + parts[1][key] + parts[2][key]) / 3.0
            assert torch.equal(tensor, mean), key
    moved = [
        key for key in merged if key.startswith(("weight/", "bias/")) and not torch.equal(merged[key], parts[2][key])
    ]
    assert any(key.startswith("bias/") for key in moved) and any(".experts" in key for key in moved)


def test_the_last_are_those_of_the_highest_steps(run: Path, tmp_path: Path) -> None:
    """Also where a folder's name does not say its step, as that of a merged or imported checkpoint."""
    shutil.copytree(step(run, 4), tmp_path / "renamed")
    target = tmp_path / "merged"
    words = [f"source={tmp_path / 'renamed'},{step(run, 1)},{step(run, 2)}", "last=2", f"target={target}"]
    assert longcat(["merge", *words]) == 0
    assert [one["step"] for one in json.loads((target / STATE).read_text())["merged"]] == [2, 4]


def test_weights_follow_the_listed_order(run: Path, tmp_path: Path) -> None:
    """The later checkpoint comes first in the list; sums are in the order of steps all the same."""
    target = tmp_path / "merged"
    words = [f"source={step(run, 4)},{step(run, 1)}", "weights=3,1", f"target={target}"]
    assert longcat(["merge", *words]) == 0
    early, late, merged = state(step(run, 1)), state(step(run, 4)), state(target)
    for key in (key for key in merged if key.startswith(("weight/", "bias/"))):
        assert torch.equal(merged[key], (early[key] * 1.0 + late[key] * 3.0) / 4.0), key
    stored = json.loads((target / STATE).read_text())
    assert [(one["step"], one["weight"]) for one in stored["merged"]] == [(1, 1.0), (4, 3.0)]
    assert stored["counters"] == json.loads((step(run, 4) / STATE).read_text())["counters"]


def test_training_and_export_start_from_a_merge(run: Path, corpus: Path, tmp_path: Path) -> None:
    target = tmp_path / "merged"
    assert longcat(["merge", f"source={run}", f"target={target}"]) == 0
    words = [*SMALL, f"data.paths=[{corpus}]", f"run.dir={tmp_path}", "run.name=on", f"checkpoint.resume={target}"]
    assert train_here([*words, "train.steps=6", "schedule=constant", "balance.ki=0.5"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "on" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 6]
    assert longcat(["export", f"source={target}", f"target={tmp_path / 'exported'}"]) == 0
    assert longcat(["generate", f"source={target}", "prompt=def", "max_tokens=2"]) == 0


def test_checkpoints_of_two_layouts_have_one_mean(
    run: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them is cut in boxes of experts, and shards are many small files."""
    words = [
        *SMALL,
        f"data.paths=[{corpus}]",
        f"run.dir={tmp_path}",
        "run.name=two",
        f"checkpoint.resume={step(run, 3)}",
    ]
    words += ["train.steps=4", "schedule=constant", "balance.ki=0.5", "parallel.ep=2"]
    assert train_two(words) == [0]
    monkeypatch.setattr(streamed, "FILE_BYTES", 20_000)
    other = step(tmp_path / "two", 4)
    assert longcat(["merge", f"source={step(run, 2)},{other}", f"target={tmp_path / 'merged'}"]) == 0
    assert len(list((tmp_path / "merged").glob("*.distcp"))) > 2
    first, second, merged = state(step(run, 2)), state(other), state(tmp_path / "merged")
    for key in (key for key in merged if key.startswith(("weight/", "bias/"))):
        assert torch.equal(merged[key], (first[key] + second[key]) / 2.0), key


REFUSED = {
    "nothing": ([], ["needs source=", "source=RUN target=DIR"]),
    "no-target": (["source={run}"], ["needs target="]),
    "no-folder": (["source={run},nothing", "target={new}"], ["source=nothing is no folder"]),
    "one": (["source={run}/checkpoints/step-00000001", "target={new}"], ["has 1 checkpoint,", "needs at least 2"]),
    "too-few": (["source={run}", "target={new}", "last=9"], ["has 4 checkpoints", "at least 9"]),
    "last": (["source={run}", "target={new}", "last=1"], ["last=1", "2 or more"]),
    "twice": (["source={run},{run}/checkpoints/step-00000002", "target={new}"], ["twice"]),
    "weights": (["source={run}", "target={new}", "weights=1,2"], ["2 numbers for 4 checkpoints"]),
    "text": (["source={run}", "target={new}", "weights=a"], ["weights=a must be numbers"]),
    "zero": (["source={run}", "target={new}", "weights=1,0,1,1"], ["above 0"]),
    "target": (["source={run}", "target={run}"], ["exists and is not overwritten"]),
    "other-step": (["source={run}", "target={new}/step-00000009"], ["names another step"]),
    "inside": (["source={run}", "target={run}/checkpoints/step-00000001/x"], ["is inside the checkpoint"]),
    "unknown": (["sources={run}"], ["unknown key 'sources'", "'source'"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_merges_are_refused(name: str, run: Path, tmp_path: Path, refused: Refused) -> None:
    before = contents(run)
    words, fragments = REFUSED[name]
    refused(["merge", *(word.format(run=run, new=tmp_path / "merged") for word in words)], *fragments)
    assert contents(run) == before
    assert not (tmp_path / "merged").exists()


def test_a_name_among_the_runs_checkpoints_is_refused(run: Path, tmp_path: Path, refused: Refused) -> None:
    """The newest checkpoint is elsewhere, so that its name would be free."""
    folder = tmp_path / "run" / "checkpoints"
    for number in (1, 2):
        shutil.copytree(step(run, number), folder / f"step-{number:08d}")
    source = f"source={folder},{step(run, 4)}"
    refused(["merge", source, f"target={folder / 'step-00000004'}"], "one of the run's own checkpoints")


def test_damaged_and_other_models_are_refused(run: Path, corpus: Path, tmp_path: Path, refused: Refused) -> None:
    damaged, target = tmp_path / "step-00000003", f"target={tmp_path / 'merged'}"
    shutil.copytree(step(run, 3), damaged)
    shard = next(damaged.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    refused(["merge", f"source={step(run, 2)},{damaged}", target], "not a valid checkpoint", shard.name)
    other = trained(corpus, tmp_path, "model.num_layers=1", "train.steps=2")
    words = ["merge", f"source={step(run, 2)},{other}", target]
    refused(words, "are of different models", "model.num_layers was 2 and is now 1")
    assert not (tmp_path / "merged").exists()
