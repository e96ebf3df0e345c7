"""The same corpus under another spelling of its path, or in another place, is the same corpus."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from longcat.errors import ConfigError
from tests.support.fixtures import Refused
from tests.support.running import NARROW, lines, train_here
from train.data.config import DataConfig
from train.data.corpus import check_corpus


def dotted(corpus: Path, tmp_path: Path) -> str:
    return f"{corpus.parent}/./{corpus.name}"


def up_and_down(corpus: Path, tmp_path: Path) -> str:
    return f"{corpus.parent}/../{corpus.parent.name}//{corpus.name}"


def relative(corpus: Path, tmp_path: Path) -> str:
    return os.path.relpath(corpus)


def linked(corpus: Path, tmp_path: Path) -> str:
    (tmp_path / "link").symlink_to(corpus.parent)
    return str(tmp_path / "link" / corpus.name)


def moved(corpus: Path, tmp_path: Path) -> str:
    ignored = shutil.ignore_patterns("index", "uninterrupted")
    return str(shutil.copytree(corpus.parent, tmp_path / "moved", ignore=ignored) / corpus.name)


@pytest.mark.parametrize("spelt", [dotted, up_and_down, relative, linked, moved])
def test_run_continues_with_its_corpus_spelt_otherwise(
    spelt: Callable[[Path, Path], str], corpus: Path, overrides: list[str], tmp_path: Path
) -> None:
    words = [*overrides, *NARROW]
    assert train_here([*words, "train.steps=2"]) == 0
    assert train_here([*words, "train.steps=4", f"data.paths=['{spelt(corpus, tmp_path)}']"]) == 0
    assert [row["first_sample"] for row in lines(tmp_path / "run")] == [0, 4, 8, 12]


def test_other_corpus_is_refused_and_nothing_is_to_be_removed(
    corpus: Path, overrides: list[str], refused: Refused, tmp_path: Path
) -> None:
    words = [*overrides, *NARROW, "train.steps=2"]
    assert train_here(words) == 0
    other = Path(moved(corpus, tmp_path))
    Path(f"{other}.json").unlink()  # now a pair of unknown tokenizer
    said = refused(["train", *words, f"data.paths=[{other}]"], "data.paths was", "choose another run.name")
    assert "remove" not in said


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_prefix_with_a_suffix_is_explained(suffix: str, corpus: Path) -> None:
    with pytest.raises(ConfigError, match=f"give the prefix without the suffix: {corpus}"):
        check_corpus(f"{corpus}{suffix}")


def test_folder_instead_of_a_prefix_is_explained(corpus: Path) -> None:
    with pytest.raises(ConfigError, match=f"give the prefix of a pair in it, such as {corpus}"):
        check_corpus(corpus.parent)


def test_home_is_found_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves ~ inside a word alone: data.paths=[~/c], data.out=~/c."""
    monkeypatch.setenv("HOME", "/home/me")
    config = DataConfig("x", "s", out="~/o", paths=["~/p", "a~b"], tokenizer="~/t.json", cache_dir="~/i")
    assert [config.out, *config.paths, config.tokenizer, config.cache_dir] == [
        "/home/me/o", "/home/me/p", "a~b", "/home/me/t.json", "/home/me/i"
    ]  # fmt: skip
