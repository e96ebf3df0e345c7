"""`pip install .` into an empty folder: complete, under its own name, and without traces in the checkout."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from longcat import __version__
from tests.support.running import ROOT

PACKAGES = ("longcat", "parallel", "train", "launch", "configs")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build needs, without what this checkout has beside it."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="needs hatchling, as `make install` does")
def test_installation_is_complete_and_leaves_no_trace(checkout: Path, tmp_path: Path) -> None:
    before = files(checkout)
    target = tmp_path / "target"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(target), str(checkout)], check=True, timeout=300)
    assert files(checkout) == before
    installed = {name for name in files(target) if name.split("/")[0] in PACKAGES and "__pycache__" not in name}
    assert installed == {name for name in before if "/" in name}
    assert all((target / name / "py.typed").is_file() for name in PACKAGES[:-1])
    (metadata,) = target.glob("*.dist-info/METADATA")
    assert {"Name: longcat-pretrain", f"Version: {__version__}"} <= set(metadata.read_text().splitlines())
    environment = {**os.environ, "PYTHONPATH": str(target)}
    for words in (["--version"], ["train", "experiment=quickstart", "--cfg", "job"]):
        program = [str(target / "bin" / "longcat"), *words]
        answer = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert answer.returncode == 0 and answer.stdout, answer.stderr


def test_packages_of_benchmarks_are_no_dependencies() -> None:
    names = " ".join(PROJECT["dependencies"])
    assert "matplotlib" not in names and "transformers" not in names and "pytest" not in names
    assert any("matplotlib" in package for package in PROJECT["optional-dependencies"]["bench"])


def test_the_project_has_its_programs_and_metadata() -> None:
    assert PROJECT["scripts"] == {"longcat": "launch.__main__:main", "longcat-rank": "train.__main__:main"}
    assert PROJECT["name"] != "longcat", "a foreign project has this name on the package index"
    assert {"description", "readme", "license", "requires-python", "classifiers", "authors"} <= PROJECT.keys()
