"""A corpus that is missing, empty, damaged, of other ids or too short: exit code 2 and one line with the remedy."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.fixtures import Refused
from tests.support.running import NARROW, exit_json


@pytest.fixture
def broken(corpus: Path, tmp_path: Path) -> Path:
    """Path prefix of a copy of the corpus, which a test may damage."""
    shutil.copytree(corpus.parent, tmp_path / "broken", ignore=shutil.ignore_patterns("index", "uninterrupted"))
    return tmp_path / "broken" / "corpus"


def remove(prefix: Path) -> None:
    prefix.with_suffix(".bin").unlink()


def empty(prefix: Path) -> None:
    prefix.with_suffix(".bin").write_bytes(b"")
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 0, 1)  # no sequence, one document boundary
    prefix.with_suffix(".idx").write_bytes(header + bytes(8))


def overwrite_index(prefix: Path) -> None:
    prefix.with_suffix(".idx").write_text("this is no index" * 10)


def truncate_index(prefix: Path) -> None:
    path = prefix.with_suffix(".idx")
    path.write_bytes(path.read_bytes()[:-5])


def truncate(prefix: Path) -> None:
    path = prefix.with_suffix(".bin")
    path.write_bytes(path.read_bytes()[:-7])


def damage_description(prefix: Path) -> None:
    prefix.with_suffix(".json").write_text("{")


def forget_description(prefix: Path) -> None:
    """As other tools write a corpus: its ids are known only when they are read."""
    prefix.with_suffix(".json").unlink()
    (prefix.parent / "tokenizer.json").unlink()


def leave(prefix: Path) -> None:
    """Leave the corpus valid."""


@pytest.mark.parametrize(
    "damage,words,fragments",
    [
        (remove, [], ["corpus has no corpus.bin", "longcat data build"]),
        (empty, [], ["is empty (0 tokens)", "longcat data build"]),
        (overwrite_index, [], ["corpus.idx is not a Megatron index", "build it"]),
        (truncate_index, [], ["corpus.idx has", "truncated", "build it again"]),
        (truncate, [], ["corpus.bin has", "truncated", "build it again"]),
        (damage_description, [], ["corpus.json is damaged", "data.overwrite=true"]),
        (leave, ["model.vocab_size=400"], ["token id", "model.vocab_size=400", "raise model.vocab_size"]),
        (forget_description, ["model.vocab_size=400"], ["token id", "model.vocab_size=400", "raise model.vocab_size"]),
        (leave, ["train.sequence_length=500000"], ["one sample needs 500001", "lower train.sequence_length"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_a_wrong_corpus_is_refused(
    damage: Callable[[Path], None],
    words: list[str],
    fragments: list[str],
    broken: Path,
    overrides: list[str],
    refused: Refused,
    tmp_path: Path,
) -> None:
    damage(broken)
    said = refused(["train", *overrides, *NARROW, f"data.paths=[{broken}]", *words], *fragments, str(broken.parent))
    assert exit_json(tmp_path / "run") == {"code": 2, "message": said.removeprefix("error: ")}
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"exit.json", ".lock", "index"}, "no empty folder"
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_dir() and not any(path.iterdir())]
