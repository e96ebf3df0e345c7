"""Ids and vocabulary: what does not fit is refused before a run starts, what is not used is said."""

from __future__ import annotations

import itertools
import types
from pathlib import Path

import numpy as np
import pytest

from longcat.errors import ConfigError
from tests.support.fixtures import Refused
from tests.support.running import NARROW, VOCAB, finish, program, train_here
from train.data import ids as ids_module
from train.data.ids import check_ids, scan, unused_ids


@pytest.fixture
def foreign(corpus: Path, tmp_path: Path) -> Path:
    """A pair as other tools write it: without corpus.json and tokenizer.json."""
    (tmp_path / "c").mkdir()
    for suffix in (".bin", ".idx"):
        (tmp_path / "c" / f"web{suffix}").write_bytes(Path(f"{corpus}{suffix}").read_bytes())
    return tmp_path / "c" / "web"


def put(prefix: Path, place: int, token_id: int) -> None:
    """Change one id of a uint16 `.bin`."""
    ids = np.fromfile(f"{prefix}.bin", dtype=np.uint16)
    ids[place] = token_id
    ids.tofile(f"{prefix}.bin")


@pytest.mark.parametrize("place", [0, 5000, -1])
def test_one_id_too_high_is_refused_before_the_start(
    place: int, foreign: Path, overrides: list[str], refused: Refused, tmp_path: Path
) -> None:
    put(foreign, place, 60_000)
    words = [*overrides, *NARROW, f"data.paths=[{foreign}]", "train.steps=2"]
    refused(["train", *words], "holds the token id 60000", "model.vocab_size=512", "raise model.vocab_size")
    assert not (tmp_path / "run" / "config.yaml").exists() and not (tmp_path / "run" / "report.html").exists()


def test_two_ranks_refuse_it_before_the_start(foreign: Path, overrides: list[str], tmp_path: Path) -> None:
    put(foreign, -1, 60_000)
    words = [*overrides, *NARROW, f"data.paths=[{foreign}]", "train.steps=2", "run.num_processes=2"]
    code, errors = finish(program("launch", "train", *words))
    assert code == 2 and errors.count("holds the token id 60000") == 1, errors
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_scan_is_done_once_and_kept(foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / "index", tmp_path / "other"]
    check_ids([str(foreign)], VOCAB, folders)
    kept = list((tmp_path / "index").iterdir())
    assert len(kept) == 1
    with monkeypatch.context() as patch:
        patch.setattr(ids_module, "scan", None)  # a second scan would fail
        check_ids([str(foreign)], VOCAB, folders)
        with pytest.raises(ConfigError, match=r"holds the token id \d+ but model\.vocab_size=300"):
            check_ids([str(foreign)], 300, folders)
    put(foreign, 3, 700)  # another corpus
    with pytest.raises(ConfigError, match="holds the token id 700"):
        check_ids([str(foreign)], VOCAB, folders)
    kept[0].write_bytes(b"{}")  # a damaged note is made again
    with pytest.raises(ConfigError, match="holds the token id 700"):
        check_ids([str(foreign)], VOCAB, folders)


def test_scan_ends_in_time(tmp_path: Path) -> None:
    np.arange(100, dtype=np.int32).tofile(tmp_path / "a.bin")
    assert scan(tmp_path / "a.bin", np.dtype(np.int32)) == ids_module.IdRange(0, 99, 100)
    assert scan(tmp_path / "a.bin", np.dtype(np.int32), seconds=-1).scanned == 0
    np.array([5, -3, 2], dtype=np.int32).tofile(tmp_path / "b.bin")
    assert scan(tmp_path / "b.bin", np.dtype(np.int32)).lowest == -3


def test_all_corpora_share_the_time(foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock whose looks take 10 s each, the second corpus is not reached, not noted as read, and read next."""
    second = foreign.with_name("second")
    for suffix in (".bin", ".idx"):
        Path(f"{second}{suffix}").write_bytes(Path(f"{foreign}{suffix}").read_bytes())
    put(second, 0, 60_000)
    clock = itertools.count(0, 10)
    monkeypatch.setattr(ids_module, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(ids_module, "_PART", 1)
    check_ids([str(foreign), str(second)], VOCAB, [tmp_path / "index"])
    assert next(clock) <= 120 and len(list((tmp_path / "index").iterdir())) == 1
    with pytest.raises(ConfigError, match="second holds the token id 60000"):
        check_ids([str(foreign), str(second)], VOCAB, [tmp_path / "index"])


def test_ids_that_no_text_uses_are_said(
    corpus: Path, overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert unused_ids([str(corpus)], VOCAB) is None
    words = [*overrides, *NARROW, "train.steps=1"]
    assert train_here([*words, "model.vocab_size=1000"]) == 0
    said = capfd.readouterr().out
    assert "model.vocab_size=1,000 but the corpora's tokenizer has 512 ids" in said
    assert "the other 488 rows" in said and "model.vocab_size=512 leaves them out" in said
    assert train_here([*words, "run.name=fits"]) == 0
    assert "tokenizer has" not in capfd.readouterr().out


def test_ids_of_a_foreign_pair_are_those_of_its_tokenizer(corpus: Path, foreign: Path) -> None:
    assert unused_ids([str(foreign)], 1000) is None, "unknown"
    tokenizer = corpus.parent / "tokenizer.json"
    (foreign.parent / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    assert "has 512 ids" in (unused_ids([str(foreign)], 1000) or "")
