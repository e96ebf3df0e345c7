"""A grown checkpoint: every tensor is bitwise the old one's, any layout loads it, growth needs constant memory."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from benchmarks.common import peak_memory_gib
from longcat.errors import ConfigError
from longcat.growth import Growth, layer_of
from longcat.model import LongCat
from longcat.names import stored_state
from parallel.mesh import Topology, make_topology, resolve_sizes, world_from_environment
from tests.support.measure import MODEL, samples
from tests.support.pool import close_pools, pool
from tests.support.running import TINY, RandomSamples, contents, trained_state
from train.batches import BatchReader
from train.checkpoint import grow as growing
from train.checkpoint.files import file_hash, is_locked
from train.checkpoint.grow import GrowConfig, GrowthOptions, grow
from train.checkpoint.load import load
from train.checkpoint.manifest import MANIFEST, STATE, commit, verify
from train.checkpoint.save import save
from train.checkpoint.state_hash import state_hash
from train.compose import compose
from train.config import Config
from train.run import build_state
from train.run_dir.folder import as_mapping
from train.state import TrainState
from train.step import Stepper

SHALLOW = [*TINY, "model.num_layers=2", "model.hidden_std=0.2", "balance.ki=0.1", "balance.kp=0.5"]
LAYOUTS = {
    "ep2": ["parallel.ep=2"],
    "tp2-ep2": ["parallel.tp=2", "parallel.ep=2"],
    "pp2-zbv": ["parallel.pp=2"],
    "zero1-ep2": ["parallel.sharding=zero1", "parallel.ep=2"],
    "zero3": ["parallel.sharding=zero3"],
}


class Old(NamedTuple):
    """A trained shallow state, and its checkpoint."""

    state: TrainState
    topology: Topology
    config: Config
    path: Path


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Old]:
    state, topology, config = trained_state(SHALLOW, steps=3)
    folder = tmp_path_factory.mktemp("shallow") / "checkpoints"
    yield Old(state, topology, config, save(state, folder, as_mapping(config), topology))
    dist.destroy_process_group()
    close_pools()


def options(source: Path, target: Path, factor: int = 2, method: str = "stack") -> GrowConfig:
    return GrowConfig(str(source), str(target), GrowthOptions(factor, method))


def everything(state: TrainState) -> dict[str, Tensor]:
    """All tensors of a state by their keys."""
    local_boxes = {one.key: one.values.clone() for one in state.store.local_boxes()}
    steps = {f"optimizer_step/{name}": step.clone() for name, step in state.store.steps()}
    return local_boxes | steps | {name: tensor.clone() for name, tensor in state.replicated()}


def loaded(path: Path, old: Old, num_layers: int) -> TrainState:
    config = compose([*SHALLOW, f"model.num_layers={num_layers}"])
    state = build_state(config, old.topology)
    load(state, path, as_mapping(config))
    return state


@pytest.mark.parametrize("method", ["stack", "interpose"])
@pytest.mark.parametrize("factor", [2, 3])
def test_grown_state_is_bitwise_the_repeated_one(old: Old, tmp_path: Path, factor: int, method: str) -> None:
    before = contents(old.path)
    grow(options(old.path, tmp_path / "grown", factor, method))
    assert contents(old.path) == before
    assert verify(tmp_path / "grown").problem is None
    state, growth = loaded(tmp_path / "grown", old, 2 * factor), Growth(2, factor, method)
    expected, found = everything(old.state), everything(state)
    assert {key.partition("/")[0] for key in found} >= {"weight", "exp_avg", "exp_avg_sq", "bias", "controller"}
    for key, tensor in found.items():
        kind, _, name = key.partition("/")
        layer = layer_of(name)
        if kind == "controller":
            same = expected[key][growth.sources] if tensor.ndim else expected[key]
        elif layer is None:
            same = expected[key]
        else:
            same = expected[f"{kind}/layers.{growth.sources[layer]}.{name.split('.', 2)[2]}"]
        assert torch.equal(tensor, same), key
    assert vars(state.counters) == vars(old.state.counters)
    assert any(bool(tensor.any()) for key, tensor in found.items() if key.startswith("bias/"))
    for number, router in state.routers():
        assert torch.equal(
            router.e_score_correction_bias, found[f"bias/layers.{number}.mlp.router.e_score_correction_bias"]
        )


def plain(state: TrainState, num_layers: int) -> LongCat:
    """The model of a state, without sharding."""
    model, values = LongCat(compose([*SHALLOW, f"model.num_layers={num_layers}"]).model), everything(state)
    with torch.no_grad():
        for name, tensor in stored_state(model):
            tensor.copy_(values[f"bias/{name}" if name.endswith("correction_bias") else f"weight/{name}"])
    return model


@torch.no_grad()
def test_stacked_checkpoint_is_bitwise_the_trunk_twice(old: Old, tmp_path: Path) -> None:
    grow(options(old.path, tmp_path / "grown"))
    shallow, deep = plain(old.state, 2), plain(loaded(tmp_path / "grown", old, 4), 4)
    tokens = torch.randint(0, 97, (3, 8))
    once, _ = shallow.trunk(tokens, None)
    twice, _ = shallow.trunk(tokens, None, once)
    assert torch.equal(deep.trunk(tokens, None)[0], twice) and not torch.equal(once, twice)
    assert shallow.norm is not None and shallow.lm_head is not None
    assert torch.equal(deep.logits(tokens), shallow.lm_head(shallow.norm(twice)))


def test_growth_is_recorded_and_repeatable(old: Old, tmp_path: Path) -> None:
    grow(options(old.path, tmp_path / "four"))
    grow(options(tmp_path / "four", tmp_path / "twelve", 3, "interpose"))
    text = json.loads((tmp_path / "twelve" / STATE).read_text())
    assert text["configuration"]["model"]["num_layers"] == 12
    assert [(one["num_layers"], one["factor"], one["method"]) for one in text["growth"]] == [
        (2, 2, "stack"),
        (4, 3, "interpose"),
    ]
    assert loaded(tmp_path / "twelve", old, 12).counters.step == 3


def test_grown_state_trains(old: Old, tmp_path: Path) -> None:
    grow(options(old.path, tmp_path / "grown"))
    state = loaded(tmp_path / "grown", old, 4)
    config = compose([*SHALLOW, "model.num_layers=4"])
    samples: Any = RandomSamples(config.train.sequence_length)
    stepper = Stepper(state, BatchReader(samples, config, old.topology), config, old.topology)
    assert stepper.step().healthy
    assert state.counters.step == 4


def test_torch_s_own_converter_reads_a_grown_checkpoint(old: Old, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    grow(options(old.path, tmp_path / "grown"))
    dcp_to_torch_save(tmp_path / "grown", tmp_path / "all.pt")
    read = torch.load(tmp_path / "all.pt", weights_only=True)
    found = everything(loaded(tmp_path / "grown", old, 4))
    assert read.keys() == found.keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in found.items())


# ------------------------------------------------------------------------------------------- from any layout to any


def write_grow_and_load(folder: str, written: list[str]) -> tuple[str, dict[str, str]]:
    """Train two layers in one layout, save, grow, load in all; returns the hashes, and that of a tensor-wise growth."""
    rank, _, world_size = world_from_environment()
    after = {}
    half = [*MODEL, "model.num_layers=2"]
    path = Path(folder) / "grown"
    for name, layout in {"": written, **LAYOUTS}.items():
        config = compose([*(MODEL if name else half), *layout])
        topology = make_topology(resolve_sizes(config.parallel, world_size), rank, world_size, torch.device("cpu"))
        state = build_state(config, topology)
        if name:
            load(state, path, as_mapping(config))
            after[name] = state_hash(state, topology)
        else:
            reader = BatchReader(samples(config), config, topology)  # type: ignore[arg-type]
            stepper = Stepper(state, reader, config, topology)
            assert all(stepper.step().healthy for _ in range(2))
            saved = save(state, Path(folder) / "half", as_mapping(config), topology)
            if rank == 0:
                grow(options(saved, path))
            dist.barrier()
        state.engine.close()
    return str(path), after


@pytest.mark.parametrize("written", ["ep2", "zero3", "pp2-1f1b"])
def test_growth_works_across_layouts(written: str, tmp_path: Path) -> None:
    layout = LAYOUTS.get(written, ["parallel.pp=2", "parallel.schedule=1f1b"])
    for _, after in pool(2).run(write_grow_and_load, str(tmp_path), layout):
        assert len(set(after.values())) == 1 and len(after) == len(LAYOUTS)


# -------------------------------------------------------------------------------------------------------- streaming


def fabricated(folder: Path, width: int, num_layers: int) -> Path:
    """A valid checkpoint with one matrix [width, width] of each kind per layer."""
    tensors = {
        f"{kind}/layers.{layer}.ffn": torch.full((width, width), float(layer))
        for layer in range(num_layers)
        for kind in ("weight", "exp_avg", "exp_avg_sq")
    }
    tensors["controller/integral"] = torch.zeros(num_layers, 4)
    partial = folder / "half.partial"
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(partial), no_dist=True)
    counters = {"step": 1, "samples": 8, "tokens": 64}
    text = {"counters": counters, "configuration": {"model": {"num_layers": num_layers}, "data": {}, "train": {}}}
    shards = {path.name: file_hash(path) for path in partial.glob("*.distcp")}
    commit(partial, folder / "half", json.dumps(text), shards)
    return folder / "half"


def test_growth_never_holds_a_full_tensor(tmp_path: Path) -> None:
    """A layer has 30 MiB, a tensor 10; growth needs less than half a tensor more than a tiny growth."""
    (tmp_path / "tiny").mkdir()
    grow(options(fabricated(tmp_path / "tiny", 4, 2), tmp_path / "tiny" / "grown"))  # imports, first buffers
    half, width = fabricated(tmp_path, 1620, 4), 1620
    peak = peak_memory_gib(lambda: grow(options(half, tmp_path / "grown")))
    if peak is None:
        pytest.skip("needs /proc/self/clear_refs")
    assert peak * 2**30 < 0.5 * width * width * 4
    read = {"exp_avg/layers.6.ffn": torch.empty(width, width)}
    dcp.load(read, storage_reader=dcp.FileSystemReader(tmp_path / "grown"), no_dist=True)
    assert bool((read["exp_avg/layers.6.ffn"] == 2.0).all())


# --------------------------------------------------------------------------------- atomic, and refusals


def test_failed_growth_leaves_nothing_behind(old: Old, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(growing, "copy_bytes", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        grow(options(old.path, tmp_path / "grown"))
    assert not list(tmp_path.iterdir())


def test_growth_locks_its_target(old: Old, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, seen = growing.write, []

    def write(source: Any, partial: Path) -> None:
        seen.append(is_locked(partial))
        plain(source, partial)

    monkeypatch.setattr(growing, "write", write)
    grow(options(old.path, tmp_path / "grown"))
    assert seen == [True] and not is_locked(tmp_path / "grown")


def test_full_disk_is_refused_before_growth_writes(old: Old, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=growing.SPARE))
    with pytest.raises(ConfigError, match="GiB free; choose another target"):
        grow(options(old.path, tmp_path / "grown"))
    assert not list(tmp_path.iterdir())


def test_ambiguous_target_name_is_refused(old: Old, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names another step; it would contain step 3, so step-00000003"):
        grow(options(old.path, tmp_path / "step-00000007"))
    other = tmp_path / "step-00000003.old"
    shutil.copytree(old.path, other)
    with pytest.raises(ConfigError, match="one of the shallow run's own checkpoints"):
        grow(options(other, tmp_path / "step-00000003"))
    with pytest.raises(ConfigError, match="is inside the checkpoint"):
        grow(options(other, other / "grown"))
    assert contents(other) == contents(old.path)


def test_unknown_state_is_refused(old: Old, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "ALL_LAYERS", "something")
    with pytest.raises(ConfigError, match=r"contains controller/.*, which growth does not know"):
        grow(options(old.path, tmp_path / "grown"))


def test_a_state_of_other_depth_is_refused(old: Old, tmp_path: Path) -> None:
    """The manifest is valid, but state.json and the tensors do not agree."""
    wrong = tmp_path / "wrong"
    shutil.copytree(old.path, wrong)
    text = json.loads((wrong / STATE).read_text())
    text["configuration"]["model"]["num_layers"] = 3
    (wrong / STATE).write_text(json.dumps(text))
    files = json.loads((wrong / MANIFEST).read_text())
    files["files"][STATE] = file_hash(wrong / STATE)
    (wrong / MANIFEST).write_text(json.dumps(files))
    with pytest.raises(ConfigError, match=r"does not contain the 3 layers|does not know"):
        grow(options(wrong, tmp_path / "grown"))
