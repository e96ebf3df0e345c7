"""Exports and imports that cannot write, or whose source vanishes: exit code 2, one line, nothing left behind."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.exporting import run_command
from tests.support.fixtures import Refused
from train.checkpoint import offline_reader
from train.checkpoint.offline_reader import Checkpoint
from train.huggingface import import_folder as import_module


@contextmanager
def small_disk(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond ``num_bytes``: a write fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("num_bytes", [1000, 200_000])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_full_disk_is_reported_in_one_line(num_bytes: int, checkpoint: Path, tmp_path: Path, refused: Refused) -> None:
    run_command("export", f"source={checkpoint}", f"target={tmp_path / 'export'}", "export.dtype=float32")
    for verb, source in (("export", checkpoint), ("import", tmp_path / "export")):
        target = tmp_path / f"{verb}ed"
        with small_disk(num_bytes):
            refused([verb, f"source={source}", f"target={target}"], str(target), "nothing is left", "is the disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def after(patch: pytest.MonkeyPatch, holder: object, name: str, action: Callable[[], object]) -> None:
    """Run ``action`` after the first call of ``holder.name``."""
    real, calls = getattr(holder, name), iter((action,))

    def call(*arguments: object) -> object:
        result = real(*arguments)
        next(calls, lambda: None)()
        return result

    patch.setattr(holder, name, call)


@pytest.mark.parametrize("moment", ["found", "opened", "half-read"])
@pytest.mark.parametrize("verb", ["export", "generate"])
def test_checkpoint_pruned_meanwhile_is_reported_in_one_line(
    moment: str, verb: str, checkpoint: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "source")
    places = {
        "found": (offline_reader, "find_valid"),
        "opened": (Checkpoint, "__init__"),
        "half-read": (Checkpoint, "read"),
    }
    after(monkeypatch, *places[moment], lambda: shutil.rmtree(source))
    words = ["max_tokens=2"] if verb == "generate" else [f"target={tmp_path / 'out'}"]
    refused([verb, f"source={source}", *words], str(source), "can no longer be read", "remove its old checkpoints")
    assert not list(tmp_path.iterdir())


def test_export_that_vanishes_is_reported_in_one_line(
    checkpoint: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    run_command("export", f"source={checkpoint}", f"target={source}", "export.dtype=float32", "export.shard_gib=0.0001")
    after(monkeypatch, import_module, "configuration_of", lambda: shutil.rmtree(source))
    refused(["import", f"source={source}", f"target={tmp_path / 'out'}"], str(source), "missing or damaged")
    assert not list(tmp_path.iterdir())
