"""Building corpora: every kind of source, the files written, and wrong sources."""

from __future__ import annotations

import gzip
import json
import os
import socket
import sysconfig
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longcat.errors import ConfigError
from train.data import build as build_module
from train.data.build import build
from train.data.config import DataConfig
from train.data.corpus import CorpusInfo, read_info, verify_corpus
from train.data.machine_text import MACHINE_TEXT
from train.data.tokens import load_tokenizer, token_byte_lengths

VOCABULARY = 300
DOCUMENTS = [f"Document {i}: naïve words — {'repeat ' * (i % 5)}{i * 7}\n" for i in range(40)]


def jsonl(folder: Path) -> str:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return str(folder / "a.jsonl")


def json_array(folder: Path) -> str:
    (folder / "a.json").write_text(json.dumps([{"text": text} for text in DOCUMENTS]))
    return str(folder)


def compressed(folder: Path) -> str:
    with gzip.open(folder / "a.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in DOCUMENTS)
    return str(folder)


def parquet(folder: Path) -> str:
    for number in range(2):
        part = DOCUMENTS[number * 20 : number * 20 + 20]
        table = pa.table({"text": part, "score": list(range(20))})
        pq.write_table(table, folder / f"{number}.parquet")
    return str(folder)


def text_files(folder: Path) -> str:
    for number, text in enumerate(DOCUMENTS):
        (folder / f"sub{number % 3}").mkdir(exist_ok=True)
        (folder / f"sub{number % 3}" / f"{number}.txt").write_text(text)
    return str(folder)


def text_glob(folder: Path) -> str:
    for number, text in enumerate(DOCUMENTS):
        (folder / f"{number}.md").write_text(text)
    (folder / "other.csv").write_text("not read")
    return str(folder / "*.md")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "source"
    made.mkdir()
    return made


def config_of(source: str, tmp_path: Path, **more: object) -> DataConfig:
    return DataConfig("mine", source, out=str(tmp_path / "out"), **more)  # type: ignore[arg-type]


def documents_of(config: DataConfig, info: CorpusInfo) -> list[str]:
    """Texts of the written corpus, read without megatron: uint16 ids, cut at the end-of-document id."""
    ids = np.fromfile(Path(config.out) / "corpus.bin", dtype=np.uint16)
    ends = np.flatnonzero(ids == info.eod)
    assert ends[-1] == ids.size - 1
    tokenizer = load_tokenizer(Path(config.out) / "tokenizer.json")
    return [tokenizer.decode(part[part != info.eod].tolist()) for part in np.split(ids, ends[:-1] + 1)]


@pytest.mark.parametrize("make", [jsonl, json_array, compressed, parquet, text_files, text_glob])
def test_every_document_comes_back_from_the_corpus(make: Callable[[Path], str], folder: Path, tmp_path: Path) -> None:
    config = config_of(make(folder), tmp_path)
    info = build(config, VOCABULARY)
    assert sorted(documents_of(config, info)) == sorted(DOCUMENTS)
    assert info.documents == len(DOCUMENTS)
    assert info.bytes == sum(len(text.encode()) for text in DOCUMENTS)
    assert info.vocab_size <= VOCABULARY and info.max_token_id < info.vocab_size and info.eod == 0
    ids = np.fromfile(tmp_path / "out" / "corpus.bin", dtype=np.uint16)
    assert ids.size == info.tokens and int(ids.max()) == info.max_token_id
    lengths = token_byte_lengths(tmp_path / "out" / "tokenizer.json", VOCABULARY)
    assert int(lengths[ids].sum()) == info.bytes
    assert read_info(tmp_path / "out" / "corpus") == info
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"corpus.bin", "corpus.idx", "corpus.xxh3", "corpus.json", "tokenizer.json"}


def test_text_of_a_special_token_does_not_end_a_document(folder: Path, tmp_path: Path) -> None:
    (folder / "a.jsonl").write_text(json.dumps({"text": "a <|endoftext|> b"}) + "\n")
    config = config_of(str(folder), tmp_path)
    info = build(config, VOCABULARY)
    ids = np.fromfile(tmp_path / "out" / "corpus.bin", dtype=np.uint16)
    assert (ids == info.eod).sum() == 1
    assert documents_of(config, info) == ["a <|endoftext|> b"]


def test_empty_and_null_documents_are_left_out(folder: Path, tmp_path: Path) -> None:
    rows = ['{"text": "one"}', '{"text": ""}', '{"text": null}', '{"text": "two"}']
    (folder / "a.jsonl").write_text("\n".join(rows) + "\n")
    assert build(config_of(str(folder), tmp_path), VOCABULARY).documents == 2


def test_max_bytes_cuts_the_last_document_between_characters(folder: Path, tmp_path: Path) -> None:
    (folder / "a.jsonl").write_text(json.dumps({"text": "é" * 100}) + "\n" + json.dumps({"text": "b"}) + "\n")
    config = config_of(str(folder), tmp_path, max_bytes=51)
    info = build(config, VOCABULARY)
    assert (info.documents, info.bytes) == (1, 50)
    assert documents_of(config, info) == ["é" * 25]


def test_large_vocabulary_is_written_as_int32(folder: Path, tmp_path: Path) -> None:
    big = load_big_tokenizer(tmp_path)
    info = build(config_of(jsonl(folder), tmp_path, tokenizer=str(big)), 70_000)
    assert info.vocab_size == 70_000
    assert (tmp_path / "out" / "corpus.bin").stat().st_size == 4 * info.tokens


def load_big_tokenizer(folder: Path) -> Path:
    """A tokenizer of 70,000 ids: bytes, and words that never occur."""
    from train.data.tokens import train_bpe

    tokenizer = train_bpe([], 257)
    tokenizer.add_tokens([f"\u2603{number}" for number in range(70_000 - 257)])
    tokenizer.save(str(folder / "big.json"))
    return folder / "big.json"


def test_finished_build_is_kept_and_reported(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(jsonl(folder), tmp_path)
    first = build(config, VOCABULARY)
    capsys.readouterr()
    monkeypatch.setattr(build_module, "_write", None)  # a second build would fail
    assert build(config, VOCABULARY) == first
    assert "exists already" in capsys.readouterr().err


def test_other_settings_are_refused_unless_overwritten(folder: Path, tmp_path: Path) -> None:
    config = config_of(jsonl(folder), tmp_path)
    build(config, VOCABULARY)
    before = (tmp_path / "out" / "corpus.bin").read_bytes()
    changed = replace(config, max_bytes=100)
    with pytest.raises(ConfigError, match=r"max_bytes 0 instead of 100.*data\.overwrite=true"):
        build(changed, VOCABULARY)
    with pytest.raises(ConfigError, match="vocab_size 300 instead of 280"):
        build(config, 280)
    assert (tmp_path / "out" / "corpus.bin").read_bytes() == before
    assert build(replace(changed, overwrite=True), VOCABULARY).bytes == 100


def test_builds_at_once_do_not_replace_each_other(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other build ends while this one still writes."""
    config = config_of(jsonl(folder), tmp_path)
    write = build_module._write

    def write_later(*arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(build_module, "_write", write)
            patch.setattr(os, "getpid", lambda: 1)  # as in another process
            build(config, 300)
        return write(*arguments)

    monkeypatch.setattr(build_module, "_write", write_later)
    with pytest.raises(ConfigError, match=r"corpus of other settings .vocab_size 300 instead of 310"):
        build(config, 310)
    assert build(config, 300).settings["vocab_size"] == 300, "the first corpus is whole"
    monkeypatch.setattr(build_module, "_write", write_later)
    assert build(replace(config, overwrite=True), 310).settings["vocab_size"] == 310
    assert {path.name for path in Path(config.out).iterdir()} == set(build_module._FILES)


def test_foreign_files_are_not_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "corpus.bin").write_text("precious")
    with pytest.raises(ConfigError, match=r"corpus\.bin of an unfinished build"):
        build(config_of(jsonl(folder), tmp_path), VOCABULARY)
    assert (tmp_path / "out" / "corpus.bin").read_text() == "precious"


def test_interrupted_build_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(jsonl(folder), tmp_path)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "write_info", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(config, VOCABULARY)
    assert not (tmp_path / "out").exists()
    assert build(config, VOCABULARY).documents == len(DOCUMENTS)


def test_same_text_gives_the_same_bytes_in_any_folder(tmp_path: Path) -> None:
    written = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        config = DataConfig(name, text_files(tmp_path / name), out=str(tmp_path / name / "out"))
        build(config, VOCABULARY)
        written.append((tmp_path / name / "out" / "corpus.bin").read_bytes())
    assert written[0] == written[1]


def test_python_source_is_mixed_evenly_in_a_fixed_order() -> None:
    files = MACHINE_TEXT["python_source"].files("python_source")
    assert files == MACHINE_TEXT["python_source"].files("python_source")
    from_torch = np.array(["torch" in path.parts for path in files])
    torch_share = [part.mean() for part in np.array_split(from_torch, 4)]
    assert max(torch_share) - min(torch_share) < 0.15
    library = Path(sysconfig.get_path("stdlib"))
    inside = [path.relative_to(library).parts for path in files if "torch" not in path.parts]
    assert len(inside) > 300
    assert not [parts for parts in inside if {"site-packages", "test", "idlelib"} & set(parts)]


def test_given_tokenizer_is_used_and_must_fit_the_vocabulary(folder: Path, tmp_path: Path) -> None:
    first = config_of(jsonl(folder), tmp_path)
    info = build(first, VOCABULARY)
    path = str(tmp_path / "out" / "tokenizer.json")
    second = replace(first, out=str(tmp_path / "second"), tokenizer=path, max_bytes=300)
    assert build(second, VOCABULARY).tokenizer_sha256 == info.tokenizer_sha256
    with pytest.raises(ConfigError, match=rf"raise model\.vocab_size to {info.vocab_size}"):
        build(replace(second, out=str(tmp_path / "third")), info.vocab_size - 1)
    with pytest.raises(ConfigError, match=r"data\.tokenizer=.*does not exist"):
        build(replace(second, tokenizer="no/tokenizer.json"), VOCABULARY)


def test_hub_id_without_a_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="no file or folder here, and the hub gave no data set") as caught:
        build(config_of("nobody/no-such-data-set", tmp_path), VOCABULARY)
    assert "\n" not in str(caught.value)


def test_without_a_network_nothing_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's libraries wait for 25 s between their attempts, each with two lines on standard error."""
    import datasets
    import huggingface_hub

    def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waits to try again"))
    with pytest.raises(ConfigError, match="the hub gave no data set"):
        build(config_of("null", tmp_path), VOCABULARY)


def _write(name: str, content: bytes) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return str(folder)

    return make


def _mixed(folder: Path) -> str:
    jsonl(folder)
    return parquet(folder)


def _second_file_torn(folder: Path) -> str:
    parquet(folder)
    whole = (folder / "1.parquet").read_bytes()
    (folder / "1.parquet").write_bytes(whole[: len(whole) // 2])
    return str(folder)


def _numbers(folder: Path) -> str:
    pq.write_table(pa.table({"text": [1, 2]}), folder / "a.parquet")
    return str(folder)


def _no_field(folder: Path) -> str:
    pq.write_table(pa.table({"body": ["a"], "url": ["b"]}), folder / "a.parquet")
    return str(folder)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: str(folder / "none.jsonl"), "does not exist"),
        (lambda folder: str(folder / "none"), "does not exist"),
        (lambda folder: str(folder / "*.txt"), "holds no parquet"),
        (lambda folder: str(folder), "holds no parquet"),
        (_write("a.csv", b"a,b\n"), r"holds no parquet.*but \.csv 1"),
        (lambda folder: _write("a.csv", b"a,b\n")(folder) + "/a.csv", "a.csv is none of parquet"),
        (_mixed, "mixes kinds of files"),
        (_write("a.jsonl", b""), "holds no rows"),
        (_write("a.txt", b""), "holds no text"),
        (_write("a.jsonl", b'{"text": ""}\n'), "holds no text"),
        (_no_field, "no field text; set data.text_field to one of: body, url"),
        (_numbers, "holds int, not text"),
        (_write("a.parquet", b"PAR1 garbage"), r"cannot be read .*a\.parquet"),
        (_second_file_torn, r"cannot be read .*1\.parquet"),
        (_write("a.jsonl", b'{"text": "x"}\n{"text": \n'), r"cannot be read .*a\.jsonl"),
        (_write("a.txt", "café".encode("latin-1")), r"cannot be read .*a\.txt: UnicodeDecodeError"),
    ],
)
def test_wrong_source_is_refused_in_one_line(
    make: Callable[[Path], str], words: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        build(config_of(make(folder), tmp_path), VOCABULARY)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "out").exists()


def test_wrong_split_field_or_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    config = config_of(jsonl(folder), tmp_path)
    with pytest.raises(ConfigError, match="no field body"):
        build(replace(config, text_field="body"), VOCABULARY)
    with pytest.raises(ConfigError, match=r"model\.vocab_size=256"):
        build(config, 256)
    with pytest.raises(ConfigError, match=r"data\.split=train\[:10%\] is a slice"):
        build(replace(config, split="train[:10%]"), VOCABULARY)  # a stream has no slices
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot be written"):
        build(replace(config, out=str(tmp_path / "file" / "out")), VOCABULARY)


def test_progress_is_shown_without_a_terminal(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "_REPORT_SECONDS", 0.0)
    build(config_of(jsonl(folder), tmp_path), VOCABULARY)
    said = capsys.readouterr().err.splitlines()
    for task in ("training the tokenizer: ", "encoding: "):
        assert any(line.startswith(task) and line.endswith(" MB") for line in said)


def test_build_is_on_disk_before_its_names_appear(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut could leave a corpus of zeros under its final name."""
    done: list[str] = []
    sync, replace_file = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def replaced(source: Path, target: Path) -> None:
        done.append("renamed")
        replace_file(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    build(config_of(jsonl(folder), tmp_path), VOCABULARY)
    assert set(done[: done.index("renamed")]) >= set(build_module._FILES)
    assert done[-1] == "out"


def test_copy_without_block_hashes_is_noted_once(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(config_of(jsonl(folder), tmp_path), VOCABULARY)
    (tmp_path / "out" / "corpus.xxh3").unlink()
    capsys.readouterr()
    for _ in range(2):
        assert verify_corpus(tmp_path / "out" / "corpus") is not None
    assert capsys.readouterr().err.count("corpus.xxh3 is missing: damage of") == 1
