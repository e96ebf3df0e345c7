"""Changed bytes in a checkpoint are refused, or have no effect; a resume goes back to an older one."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.support.mutations import survive_mutations
from tests.support.running import NARROW, train_here
from train.checkpoint.find import newest_valid
from train.checkpoint.manifest import list_checkpoints
from train.checkpoint.offline_reader import Checkpoint, full_box

BIG = ".distcp"


@pytest.fixture
def checkpoints(overrides: list[str], tmp_path: Path) -> Path:
    """The folder of a run's two checkpoints."""
    words = [*overrides, *NARROW, "train.steps=2", "checkpoint.every=1", "checkpoint.keep=0", f"run.dir={tmp_path}"]
    assert train_here([*words, "run.name=run"]) == 0
    return tmp_path / "run" / "checkpoints"


def read_all(folder: Path) -> str:
    """A hash of all that a checkpoint holds: every tensor, configuration, counters, health."""
    found = Checkpoint(folder)
    digest = hashlib.sha256(repr((found.configuration, found.counters, found.health, found.model)).encode())
    for key, stored in sorted(found.metadata.state_dict_metadata.items()):
        assert isinstance(stored, TensorStorageMetadata)
        values = found.read_key(key, full_box(tuple(stored.size)))
        digest.update(f"{key} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check(checkpoints: Path, count: int, seed: int) -> None:
    newest = list_checkpoints(checkpoints)[-1]
    found = survive_mutations(newest, lambda: read_all(newest), count, seed)
    for path in newest.rglob("*"):
        if path.is_file() and path.stat().st_size:
            assert found[f"{path.name} refused"], f"no change of {path.name} was noticed: {found}"
            assert not found[f"{path.name} same"] or path.suffix != BIG, f"a change of {path.name} was not noticed"


def test_changed_bytes_are_refused(checkpoints: Path) -> None:
    check(checkpoints, 300, 0)


def test_resume_goes_back_to_an_older_checkpoint(checkpoints: Path) -> None:
    older, newest = list_checkpoints(checkpoints)
    survive_mutations(newest, lambda: newest_valid(checkpoints)[0] in (older, newest), 50)


@pytest.mark.long
def test_seventy_thousand_changes_are_refused(checkpoints: Path) -> None:
    """About ten minutes."""
    check(checkpoints, 70_000, 1)
