"""The commit in config.yaml: unknown where git cannot say it, and never another repository's."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import train.process.git
from tests.support.running import NARROW, train_here
from train.process.git import UNKNOWN, git_commit, git_dirty
from train.run_dir.folder import read_config


def make_repository(folder: Path) -> None:
    words = ["-c", "user.name=n", "-c", "user.email=e", "commit", "--allow-empty", "-qm", "first"]
    for command in (["init", "-q"], words):
        subprocess.run(["git", "-C", str(folder), *command], check=True)


def test_run_starts_without_git(overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert train_here([*overrides, *NARROW, "train.steps=1"]) == 0
    assert read_config(tmp_path / "run")["environment"]["git_commit"] == UNKNOWN


@pytest.mark.parametrize(
    "script",
    ["echo abc; exit 128", "kill -9 $$", "printf '\\377'; exit 1", "sleep 60"],
    ids=["fails", "dies", "bytes", "hangs"],
)
def test_git_that_does_not_answer_is_unknown(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a folder of dubious ownership."""
    (tmp_path / "git").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(train.process.git, "SECONDS", 1.0)
    assert git_commit() == UNKNOWN


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_another_repository_s_commit_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed inside another project's checkout, or called by its hook."""
    make_repository(tmp_path)
    (tmp_path / "site-packages").mkdir()
    assert git_commit(tmp_path / "site-packages") == UNKNOWN
    assert git_dirty(tmp_path / "site-packages") is None
    own = git_commit(tmp_path)
    assert len(own) == 40
    (tmp_path / "other").mkdir()
    make_repository(tmp_path / "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    assert git_commit(tmp_path) == own


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_repository_without_commits_is_unknown(tmp_path: Path) -> None:
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
    assert git_commit(tmp_path) == UNKNOWN
