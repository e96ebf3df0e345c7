"""Files named by a source: each is read by its own name, once, and counted; what is left out is said."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from longcat.errors import ConfigError
from train.data.build import build
from train.data.config import DataConfig
from train.data.files import find_files

VOCABULARY = 300
NAMES = [
    "part[0].jsonl", "a*b.jsonl", "what?.jsonl", "a::b.jsonl", "it{1,2}.jsonl", "a#b%20c.jsonl", "a b.jsonl",
    ".hid.jsonl", "données.jsonl", "**.jsonl", "zip:x.jsonl", "[!a].jsonl", "~.jsonl", "UPPER.JSONL",
    "__pycache__/x.jsonl", ".hidden/x.jsonl", "in[1]/x.jsonl", "in1/x.jsonl", "file:/x.jsonl",
]  # fmt: skip


def write(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def built(source: Path | str, tmp_path: Path) -> tuple[int, int]:
    """Files and documents that a build has read."""
    info = build(DataConfig("mine", str(source), out=str(tmp_path / "out"), overwrite=True), VOCABULARY)
    return info.files, info.documents


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_read_as_a_file_and_in_a_folder(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "source" / name, "one", "two", "three")
    assert built(path, tmp_path) == (1, 3)
    assert built(tmp_path / "source", tmp_path) == (1, 3)


@pytest.mark.parametrize("folder", ["a[1]", "x*", "it{1,2}", "a::b", "with space", "ünïcode", "c#d", "100%"])
def test_any_folder_name_is_a_source(folder: str, tmp_path: Path) -> None:
    write(tmp_path / folder / "x.jsonl", "one", "two")
    assert built(tmp_path / folder, tmp_path) == (1, 2)


def test_all_odd_names_together_are_each_read_once(tmp_path: Path) -> None:
    """`a*b.jsonl` also matches `aXb.jsonl`, and `part[0].jsonl` matches only `part0.jsonl`."""
    for number, name in enumerate([*NAMES, "aXb.jsonl", "part0.jsonl", "whatX.jsonl"]):
        write(tmp_path / "source" / name, *(f"{number} {row}" for row in range(5)))
    assert built(tmp_path / "source", tmp_path) == (len(NAMES) + 3, 5 * (len(NAMES) + 3))


@pytest.mark.parametrize("suffix", [".parquet", ".txt"])
def test_odd_names_of_other_kinds_are_read(suffix: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("part[0]", "a*b", "aXb", "a::b"):
        path = tmp_path / "source" / f"{name}{suffix}"
        path.parent.mkdir(exist_ok=True)
        if suffix == ".txt":
            path.write_text(name)
        else:
            pq.write_table(pa.table({"text": [name]}), path)
    assert built(tmp_path / "source", tmp_path) == (4, 4)


def test_glob_still_works_and_reports_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a1.jsonl", "a2.jsonl", "b.jsonl", "a3.jsonl/inside.jsonl"):
        write(tmp_path / "source" / name, name)
    assert built(tmp_path / "source" / "a*.jsonl", tmp_path) == (2, 2)
    assert "not read: folders 1" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("out", ["source", "source/corpora/mine"])
def test_a_corpus_among_its_source_is_not_read(
    out: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "source" / f"a{suffix}", "one", "two")
    config = DataConfig("mine", str(tmp_path / "source"), out=str(tmp_path / out), overwrite=True)
    first, second = build(config, VOCABULARY), build(config, VOCABULARY)
    assert (first.files, first.bytes) == (second.files, second.bytes)
    assert "not read: files of a corpus 5" in capsys.readouterr().err


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "x.jsonl", "one")
    write(tmp_path / "blob", "two", "three")
    source = tmp_path / "source"
    write(source / "y.jsonl", "four")
    (source / "to_folder").symlink_to(tmp_path / "elsewhere")
    (source / "to_blob.jsonl").symlink_to(tmp_path / "blob")  # as in the hub's cache
    (source / "loop").symlink_to(source)
    (tmp_path / "elsewhere" / "back").symlink_to(source)
    assert built(source, tmp_path) == (3, 4)


@pytest.mark.parametrize("kind", ["link", "pipe", "loop"])
def test_what_cannot_be_read_is_refused_not_left_out(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "source" / "x.jsonl", "one")
    bad = tmp_path / "source" / "bad.jsonl"
    if kind == "link":
        bad.symlink_to(tmp_path / "gone.jsonl")
    elif kind == "pipe":
        os.mkfifo(bad)
    else:
        (tmp_path / "source" / "loop.jsonl").symlink_to("loop.jsonl")
    words = {
        "link": "bad.jsonl is a link to nothing",
        "pipe": "bad.jsonl is no regular file",
        "loop": "loop.jsonl is a link to nothing",
    }
    with pytest.raises(ConfigError, match=words[kind]):
        built(tmp_path / "source", tmp_path)


def test_folder_of_prose_is_read_and_prose_beside_data_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("a.md", "b.rst", "c.md"):
        (texts / name).write_text(f"some text of {name}")
    (texts / "table.csv").write_text("1,2")
    assert built(texts, tmp_path) == (3, 3)
    assert "not read: .csv 1" in capsys.readouterr().err
    write(texts / "data.jsonl", "one", "two")
    assert built(texts, tmp_path) == (1, 2)
    assert "not read: .csv 1, .md 2, .rst 1" in capsys.readouterr().err


def test_folder_without_text_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1,2")
    (tmp_path / "README").write_text("read me")
    with pytest.raises(
        ConfigError, match=r"holds no parquet, json, jsonl, txt or md files \(but \.csv 1, no suffix 1\)"
    ):
        find_files(str(tmp_path))


def test_nothing_here_may_be_a_hub_id(tmp_path: Path) -> None:
    assert find_files("owner/name") is None
    with pytest.raises(ConfigError, match="does not exist"):
        built(tmp_path / "none" / "texts", tmp_path)


@pytest.mark.parametrize("source", ["bad", "none", "empty"])
def test_failed_build_leaves_no_folder(source: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.jsonl").write_text("{")
    before = sorted(tmp_path.rglob("*"))
    config = DataConfig("mine", str(tmp_path / source), out=str(tmp_path / "deep" / "out"))
    with pytest.raises(ConfigError):
        build(config, VOCABULARY)
    assert sorted(tmp_path.rglob("*")) == before


def test_slice_of_local_rows_needs_no_stream(tmp_path: Path) -> None:
    for name in ("a[0].jsonl", "b.jsonl"):
        write(tmp_path / "source" / name, *(f"{name} {row}" for row in range(10)))
    config = DataConfig(
        "mine", str(tmp_path / "source"), out=str(tmp_path / "out"), split="train[:25%]", streaming=False
    )
    assert build(config, VOCABULARY).documents == 5
