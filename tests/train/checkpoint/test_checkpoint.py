"""Checkpoints: committed atomically, used only when valid, readable in any layout."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longcat.errors import ConfigError, UnhealthyError
from parallel.mesh import Topology, connect
from tests.support.distributed import run_ranks
from tests.support.ports import free_ports
from tests.support.running import TINY, contents, trained_state
from train.checkpoint import manifest
from train.checkpoint import save as saving
from train.checkpoint.find import find_on_all_ranks, find_start, last_committed
from train.checkpoint.load import load
from train.checkpoint.manifest import list_checkpoints, verify
from train.checkpoint.retention import Keep, cleanup
from train.checkpoint.save import save
from train.checkpoint.shards import ShardReader
from train.checkpoint.state_hash import state_hash
from train.compose import compose
from train.config import Config
from train.run import build_state
from train.run_dir.folder import as_mapping, lock
from train.state import TrainState


class Saver:
    """A state of this process, and the means to save it."""

    def __init__(self, state: TrainState, topology: Topology, config: Config, folder: Path) -> None:
        self.state, self.topology, self.config, self.folder = state, topology, config, folder

    def save(self, step: int, keep: int = 0) -> Path:
        self.state.counters.step = step
        return save(self.state, self.folder, as_mapping(self.config), self.topology, Keep(keep))

    def load(self, path: Path) -> str:
        """Load into the state; returns its hash."""
        load(self.state, path, as_mapping(self.config))
        return self.hash()

    def hash(self) -> str:
        return state_hash(self.state, self.topology)

    @property
    def names(self) -> list[str]:
        """Names of the committed checkpoints."""
        return [path.name for path in list_checkpoints(self.folder)]

    @property
    def everything(self) -> list[str]:
        """Names of all entries of the folder."""
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture(scope="module")
def assembled() -> Iterator[tuple[TrainState, Topology, Config]]:
    yield trained_state(TINY, steps=2)
    dist.destroy_process_group()


@pytest.fixture
def saver(assembled: tuple[TrainState, Topology, Config], tmp_path: Path) -> Saver:
    return Saver(*assembled, tmp_path / "checkpoints")


# ------------------------------------------------------------------------------------- committed atomically


class PowerCut(BaseException):
    """Ends a process in the middle of a save."""


def cut_at(patch: pytest.MonkeyPatch, holder: object, name: str, when: Callable[..., bool]) -> None:
    """Raise PowerCut after the first call of ``holder.name`` for which ``when(arguments…)`` holds."""
    real = getattr(holder, name)

    def call(*arguments: Any, **named: Any) -> Any:
        if when(*arguments):
            raise PowerCut(name)
        return real(*arguments, **named)

    patch.setattr(holder, name, call)


POINTS: dict[str, tuple[object, str, Callable[..., bool]]] = {
    "before-the-shards": (saving, "items_to_write", lambda *_: True),
    "after-the-shards": (manifest, "file_hash", lambda *_: True),
    "before-the-state": (manifest, "write_synced", lambda path, _: path.name == "state.json"),
    "before-the-manifest": (manifest, "write_synced", lambda path, _: path.name == "manifest.json"),
    "before-the-folder-is-synced": (manifest, "sync_folder", lambda path: path.suffix == ".partial"),
    "before-the-commit": (os, "rename", lambda old, _: str(old).endswith("step-00000002.partial")),
}


@pytest.mark.parametrize("point", POINTS)
def test_interrupted_save_leaves_the_previous_checkpoint(
    point: str, saver: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = saver.save(1)
    expected = saver.hash()
    with monkeypatch.context() as patch:
        cut_at(patch, *POINTS[point])
        with pytest.raises(PowerCut):
            saver.save(2)
    assert saver.names == ["step-00000001"]
    assert find_start(saver.folder, "auto") == (first, [])
    assert saver.load(first) == expected
    assert verify(saver.save(2)).problem is None, "the interrupted save blocks the next one"
    assert saver.everything == ["step-00000001", "step-00000002"]


def test_interrupted_removal_leaves_valid_checkpoints(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted between the renaming of an old checkpoint and its removal."""
    for step in (1, 2):
        saver.save(step)
    with monkeypatch.context() as patch:
        cut_at(patch, shutil, "rmtree", lambda path, *_: path.suffix == ".removed")
        with pytest.raises(PowerCut):
            saver.save(3, keep=2)
    assert saver.names == ["step-00000002", "step-00000003"]
    assert find_start(saver.folder, "auto") == (saver.folder / "step-00000003", [])
    assert verify(saver.folder / "step-00000002").problem is None
    assert saver.everything == ["step-00000001.removed", "step-00000002", "step-00000003"]
    (saver.folder / "step-00000009.partial").mkdir()
    assert cleanup(saver.folder, saver.folder / "step-00000003", 3, []) == []
    assert saver.everything == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("keep,left", [(0, [1, 2, 3, 4]), (1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_newest_checkpoints_are_kept(keep: int, left: list[int], saver: Saver) -> None:
    for step in (1, 2, 3, 4):
        saver.save(step, keep)
    assert saver.everything == [f"step-{step:08d}" for step in left]


def test_just_written_checkpoint_is_never_pruned(saver: Saver) -> None:
    shutil.copytree(saver.save(1), saver.folder / "step-00000500")
    saver.save(2, keep=1)
    saver.save(3, keep=1)
    assert saver.everything == ["step-00000003", "step-00000500"]


def test_manual_copies_are_neither_removed_nor_loaded(saver: Saver) -> None:
    copies = ["backup-step-00000001", "z-step-00000001", "step-000000001"]
    for name in copies:
        shutil.copytree(saver.folder / "step-00000001" if saver.folder.exists() else saver.save(1), saver.folder / name)
    newest = saver.save(2, keep=1)
    assert saver.everything == sorted([*copies, newest.name]) and saver.names == [newest.name]
    assert find_start(saver.folder, "auto") == (newest, [])


def test_same_step_is_written_again(saver: Saver) -> None:
    """A run that went back must not reuse the old checkpoint of the same step; it is kept under another name."""
    path = saver.save(2)
    before = contents(path)
    saver.state.counters.tokens += 7
    assert saver.save(2) == path and saver.save(2) == path
    assert verify(path).problem is None and contents(path) != before
    assert saver.everything == ["step-00000002", "step-00000002.replaced", "step-00000002.replaced-1"]
    assert contents(saver.folder / "step-00000002.replaced") == before
    assert saver.names == ["step-00000002"]


def test_non_finite_state_is_not_saved(saver: Saver) -> None:
    path = saver.save(1)
    before = contents(path)
    moment = next(
        local_boxes.values for local_boxes in saver.state.store.local_boxes() if local_boxes.kind == "exp_avg"
    )
    value = float(moment.view(-1)[3])
    moment.view(-1)[3] = float("nan")
    with pytest.raises(
        UnhealthyError,
        match=r"step 2: a weight, a moment or a bias is not finite.* last checkpoint is .*step-00000001;",
    ):
        saver.save(2)
    moment.view(-1)[3] = value
    assert saver.everything == ["step-00000001"] and contents(path) == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 17, 4095])
def test_one_non_finite_value_is_found(bad: float, place: int) -> None:
    largest = torch.finfo(torch.float32).max
    values = torch.full((64, 64), largest)
    values[1] = -largest
    assert saving.is_finite(values)
    values.view(-1)[place] = bad
    assert not saving.is_finite(values)


# ------------------------------------------------------------------------------------- used only when valid


def shard(path: Path) -> Path:
    return next(path.glob("*.distcp"))


def flip_a_bit(path: Path) -> None:
    data = bytearray(shard(path).read_bytes())
    data[len(data) // 3] ^= 16
    shard(path).write_bytes(data)


def truncate(path: Path) -> None:
    shard(path).write_bytes(shard(path).read_bytes()[:-1])


def lose_a_shard(path: Path) -> None:
    shard(path).unlink()


def lose_the_metadata(path: Path) -> None:
    (path / ".metadata").unlink()


def change_a_counter(path: Path) -> None:
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace('"samples": ', '"samples": 1'))


def lose_the_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def tear_the_manifest(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text[: len(text) // 2])


def hash_otherwise(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"hash": "sha256"}))


def replace_the_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("[]")


DAMAGE: dict[Callable[[Path], None], str] = {
    flip_a_bit: "__0_0.distcp does not have the hash of the manifest",
    truncate: "__0_0.distcp does not have the hash of the manifest",
    lose_a_shard: "__0_0.distcp is missing",
    lose_the_metadata: ".metadata is missing",
    change_a_counter: "state.json does not have the hash of the manifest",
    lose_the_manifest: "no readable manifest.json",
    tear_the_manifest: "no readable manifest.json",
    replace_the_manifest: "no readable manifest.json",
    hash_otherwise: "manifest.json is another version's: its hashes are sha256, not xxh3_128",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_checkpoint_is_skipped(damage: Callable[[Path], None], saver: Saver) -> None:
    first, second = saver.save(1), saver.save(2)
    damage(second)
    found, skipped = find_start(saver.folder, "auto")
    assert found == first
    assert [(status.folder, status.step, status.problem) for status in skipped] == [(second, 2, DAMAGE[damage])]
    with pytest.raises(ConfigError, match="is not a valid checkpoint"):
        find_start(saver.folder, str(second))
    damage(first)
    with pytest.raises(ConfigError, match=r"no checkpoint in .* is valid \(step-00000002: .*; step-00000001: "):
        find_start(saver.folder, "auto")


def test_shard_damaged_after_verification_is_named(saver: Saver) -> None:
    path = saver.save(1)
    assert find_start(saver.folder, "auto") == (path, [])
    with shard(path).open("r+b") as file:
        file.truncate(shard(path).stat().st_size // 2)
    with pytest.raises(ConfigError, match=r"step-00000001 could not be read: rank 0: .*; restore its files"):
        saver.load(path)


def test_tensor_with_a_missing_box_is_not_loaded(saver: Saver) -> None:
    """Its values would stay what they were."""
    path = saver.save(1)
    index = pickle.loads((path / ".metadata").read_bytes())
    key = next(key for key in index.state_dict_metadata if key.startswith("weight/"))
    index.state_dict_metadata[key].chunks.clear()
    (path / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ConfigError, match=f"could not be read: rank 0: ValueError: .* only parts of {re.escape(key)};"):
        saver.load(path)


def test_stop_while_loading_is_no_damage(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saver.save(1)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardReader, "read_data", stop)
    with pytest.raises(KeyboardInterrupt):
        saver.load(path)


# ------------------------------------------------------------------------------------- one run at a time


def test_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(ConfigError, match="in use by a running training"):
        lock(tmp_path)
    lock(tmp_path).close()


# ------------------------------------------------------------------------------------- any layout


def exchange(theirs: str, ours: str, ports: list[int]) -> tuple[str, str, str]:
    """On two ranks: hashes of the states loaded from ``theirs`` and saved into ``ours``, the newest one."""
    os.environ["MASTER_PORT"] = str(ports[0])
    config = compose([*TINY, "train.seed=9"])
    topology = connect(config.parallel)
    state = build_state(config, topology)
    load(state, Path(theirs), as_mapping(config))
    loaded = state_hash(state, topology)
    dist.destroy_process_group()

    os.environ["MASTER_PORT"] = str(ports[1])
    state, topology, config = trained_state([*TINY, "train.seed=7"], steps=2)
    save(state, Path(ours), as_mapping(config), topology)
    trained = state_hash(state, topology)
    words = last_committed(Path(ours), topology).phrase
    dist.destroy_process_group()
    return loaded, trained, words


def find_on_two_ranks(folder: str) -> tuple[Any, list[str]]:
    """On two ranks: the checkpoint found in ``folder``, and the files that this rank has hashed."""
    config = compose(TINY)
    topology = connect(config.parallel)
    plain, hashed = manifest.file_hash, []

    def noted(path: Path) -> str:
        hashed.append(f"{path.parent.name}/{path.name}")
        return plain(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "file_hash", noted)
        found = find_on_all_ranks(Path(folder), "auto", topology)
    dist.destroy_process_group()
    return found, hashed


def test_ranks_share_the_hashing_and_agree_on_the_result(saver: Saver) -> None:
    """Damage in either rank's share is seen by both; the newest valid one is found, and nothing is hashed twice."""
    first, second, third = (saver.save(step) for step in (1, 2, 3))
    flip_a_bit(third)
    change_a_counter(second)
    both = run_ranks(find_on_two_ranks, 2, str(saver.folder))
    problems = ["__0_0.distcp", "state.json"]
    passed = [
        (folder, f"{name} does not have the hash of the manifest")
        for folder, name in zip((third, second), problems, strict=True)
    ]
    for (path, skipped), _ in both:
        assert path == first
        assert [(status.folder, status.problem) for status in skipped] == passed
    shares = [set(hashed) for _, hashed in both]
    every = {f"{path.name}/{name}" for path in (first, second, third) for name in files_of(path)}
    assert shares[0] | shares[1] == every and not shares[0] & shares[1]
    assert sum(len(hashed) for _, hashed in both) == len(every), "hashed twice"


def files_of(path: Path) -> list[str]:
    return [name for name in os.listdir(path) if name != "manifest.json"]


def test_checkpoints_load_from_two_ranks_to_one_and_back(saver: Saver, tmp_path: Path) -> None:
    path = saver.save(2)
    expected = saver.hash()
    first, second = run_ranks(exchange, 2, str(path), str(tmp_path / "theirs"), free_ports(2))
    assert first == second, "ranks disagree"
    assert first[2] == f"the last checkpoint is {tmp_path / 'theirs' / 'step-00000002'}"
    assert first[0] == expected, "two ranks read another state than one wrote"
    theirs = tmp_path / "theirs" / "step-00000002"
    assert sorted(path.name for path in theirs.glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]
    assert verify(theirs).problem is None
    assert saver.hash() != first[1]
    assert saver.load(theirs) == first[1], "one rank reads another state than two wrote"
