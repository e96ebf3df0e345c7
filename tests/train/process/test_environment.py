"""The record of what a run was started with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from train.process.environment import COMMAND, driver_version, software
from train.process.git import git_dirty


def test_software_names_the_command_and_python() -> None:
    found = software()
    assert sys.orig_argv[-1] in found["command"] and found["python"] == sys.version.split()[0]
    assert found["git_dirty"] in (True, False, None)


def test_software_names_what_started_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMMAND, "longcat train run.name='a b'")
    assert software()["command"] == "longcat train run.name='a b'"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19\nGCC version:  gcc 12.3.0\n",
            "535.129.03",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n", "570.86.15"),
        ("something else\n", None),
    ],
)
def test_driver_version_is_read_from_the_kernel_module(tmp_path: Path, text: str, version: str | None) -> None:
    (tmp_path / "version").write_text(text)
    assert driver_version(tmp_path / "version") == version
    assert driver_version(tmp_path / "absent") is None


def test_dirty_checkout_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    for words in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "a"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    (tmp_path / "new.txt").write_text("untracked")
    assert git_dirty(tmp_path) is False
    subprocess.run(["git", "-C", str(tmp_path), "add", "new.txt"], check=True)
    assert git_dirty(tmp_path) is True
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_dirty(tmp_path) is None, "no git on PATH"
