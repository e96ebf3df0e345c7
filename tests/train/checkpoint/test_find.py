"""No rank reads a whole checkpoint while the others wait: messages need none, and a rollback divides it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from longcat.errors import ConfigError
from parallel.mesh import connect
from tests.support.distributed import run_ranks
from tests.support.running import NARROW, TINY, exit_json, train_here
from train.checkpoint import find, manifest
from train.checkpoint import save as saving
from train.checkpoint.find import find_on_all_ranks, find_together, newest_committed
from train.compose import compose
from train.health.response import newest_scheduled


@pytest.fixture
def narrow(overrides: list[str]) -> list[str]:
    return [*overrides, *NARROW]


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message is of something else, and other ranks wait for it: nothing is raised."""

    def fail(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(find, "list_checkpoints", fail)
    assert newest_committed(tmp_path) == (None, f"{tmp_path} cannot be read (Permission denied)")


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_failed_save_hashes_no_checkpoint(
    asynchronous: str, narrow: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks would wait while the first one reads the whole of the last one for a name in a message."""
    hashed: list[Path] = []
    plain_hash, plain, first = manifest.file_hash, saving.recreate, tmp_path / "run" / "checkpoints" / "step-00000001"

    def noted(path: Path) -> str:
        hashed.append(path)
        return plain_hash(path)

    def fail(partial: Path) -> None:
        if first.is_dir():
            hashed.clear()
            raise OSError(28, "No space left on device")
        plain(partial)

    monkeypatch.setattr(manifest, "file_hash", noted)
    monkeypatch.setattr(saving, "recreate", fail)
    words = [*narrow, "train.steps=2", "checkpoint.every=1", f"checkpoint.asynchronous={asynchronous}"]
    assert train_here(words) == 1
    assert f"the last checkpoint is {first}" in exit_json(tmp_path / "run")["message"]
    assert hashed == []


def look(folder: str) -> tuple[Path | None, int, str]:
    """On each of two ranks: where a rollback goes, how many files were hashed here, and why a start ends."""
    topology = connect(compose(TINY).parallel)
    plain, hashed = manifest.file_hash, list[Path]()

    def noted(path: Path) -> str:
        hashed.append(path)
        return plain(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "file_hash", noted)
        path = find_together(lambda check: newest_scheduled(Path(folder), 3, 0, check), topology)
    with pytest.raises(ConfigError) as refused:
        find_on_all_ranks(Path(folder), f"{folder}/nothing", topology)
    dist.destroy_process_group()
    return path, len(hashed), str(refused.value)


def test_ranks_share_a_rollback_s_hashing_and_a_refusal(narrow: list[str], tmp_path: Path) -> None:
    assert train_here([*narrow, "train.steps=3", "checkpoint.every=1", "checkpoint.keep=0"]) == 0
    folder = tmp_path / "run" / "checkpoints"
    newest, older = folder / "step-00000002", folder / "step-00000001"
    first, second = run_ranks(look, 2, str(folder))
    files = len(list(newest.iterdir())) - 1  # without the manifest
    assert first[0] == second[0] == newest and first[1] + second[1] == files and min(first[1], second[1]) > 0
    assert first[2] == second[2] and "is no folder" in first[2]
    (newest / "state.json").unlink()
    assert [found[0] for found in run_ranks(look, 2, str(folder))] == [older, older]
