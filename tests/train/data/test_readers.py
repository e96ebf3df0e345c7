"""Rows of one file: whole or refused, compressed or not, as the user wrote them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longcat.errors import ConfigError
from train.data.build import build
from train.data.config import DataConfig
from train.data.readers import DamagedFileError, read_rows
from train.data.sources import Source

ROWS = [{"text": f"document {number} {number * 7919 % 1000}"} for number in range(3000)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}
SUFFIXES = sorted(COMPRESSORS)


def rows_of(path: Path, kind: str = "json") -> list[dict[str, str]]:
    return list(read_rows(path, kind, "text"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_compressed_files_are_read_whole(suffix: str, tmp_path: Path) -> None:
    compress = COMPRESSORS[suffix]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(LINES))
    assert rows_of(path) == ROWS
    path.write_bytes(compress(LINES[:1000]) + compress(LINES[1000:]))  # two streams, as parallel compressors write
    assert rows_of(path) == ROWS
    pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "b")
    (tmp_path / f"b.parquet{suffix}").write_bytes(compress((tmp_path / "b").read_bytes()))
    assert rows_of(tmp_path / f"b.parquet{suffix}", "parquet") == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", ["json", "text"])
def test_truncated_compressed_files_are_refused(suffix: str, kind: str, tmp_path: Path) -> None:
    """At every length from nothing to all but the last byte."""
    whole = COMPRESSORS[suffix](LINES[:600])
    path = tmp_path / f"a.x{suffix}"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedFileError):
            rows_of(path, kind)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_second_stream_that_is_damaged_is_refused(suffix: str, tmp_path: Path) -> None:
    """bz2.open and lzma.open take what follows the first stream for garbage and leave it out."""
    first, second = (COMPRESSORS[suffix](part) for part in (LINES[:1000], LINES[1000:]))
    path = tmp_path / f"a.jsonl{suffix}"
    for place in (0, 1, len(second) // 2):
        damaged = bytearray(second)
        damaged[place] ^= 0xFF
        path.write_bytes(first + damaged)
        with pytest.raises(DamagedFileError):
            rows_of(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_build_names_the_truncated_file(suffix: str, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    whole = COMPRESSORS[suffix](LINES)
    (tmp_path / "s" / f"a.jsonl{suffix}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=rf"cannot be read \(.*a\.jsonl{re.escape(suffix)}: .*\); repair or remove"):
        build(DataConfig("x", str(tmp_path / "s"), out=str(tmp_path / "out")), 300)
    assert not (tmp_path / "out").exists()


TWO = [{"text": "é\u2028one"}, {"text": "two\r\n"}]


@pytest.mark.parametrize(
    "content",
    [
        "".join(json.dumps(row) + "\n" for row in TWO),
        "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in TWO),
        "\n\n" + "\n\n".join(json.dumps(row) for row in TWO),
        json.dumps(TWO),
        json.dumps(TWO, indent=2),
        "[" + ",\n".join(json.dumps(row) for row in TWO) + "]\n",
        "\n".join(json.dumps(row, indent=2) for row in TWO),
        " ".join(json.dumps(row) for row in TWO),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_every_form_of_json_gives_its_rows(content: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content.encode(encoding))
    assert rows_of(path) == TWO


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "a"}\n{"text": "b\n{"text": "c"}\n', "line 2: "),
        ('{"text": "a"}\n{"text": "b"', "line 2: "),
        ('{"text": "a"}\n[1]\n', "line 2: int where an object"),
        ('"text"\n', "line 1: str where an object"),
        ('[{"text": "a"},\n{"text": "b"', "line 2: "),
        ("null", "NoneType where an object"),
        ("[" * 100_000, "RecursionError|line 1"),
        ('{"text": "a"}\n{"text": "b"} x\n', "line 2: "),
    ],
)
def test_damaged_json_is_refused_with_its_line(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(DamagedFileError, match=words):
        rows_of(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_files_are_documents_as_they_are(encoding: str, tmp_path: Path) -> None:
    """Line ends, control characters and a mark inside the text stay; the mark that names the encoding is no text."""
    text = "a\r\nb\rc\n\n\x00\ufeff\u2028 end  \n"
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert rows_of(tmp_path / "a.txt", "text") == [{"text": text}]


def test_half_a_surrogate_pair_is_replaced_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x\\ud83d y"}\n{"text": "\\ud83d\\ude00"}\n')
    config = DataConfig("x", str(tmp_path / "a.jsonl"), out=str(tmp_path / "out"))
    assert list(Source(config).texts(0)) == ["x\ufffd y", "\U0001f600"]
    build(config, 300)
    assert "in 1 documents half surrogate pairs" in capsys.readouterr().err


def test_rows_without_the_field_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n{"text": "a"}\n{"text": null}\n{"text": ""}\n{"text": "b"}\n')
    config = DataConfig("x", str(tmp_path / "a.jsonl"), out=str(tmp_path / "out"))
    assert build(config, 300).documents == 2
    assert "left out: 3 rows without text in the field text" in capsys.readouterr().err


def test_table_without_the_field_is_refused_by_name(tmp_path: Path) -> None:
    """The first file has it, the second one not."""
    (tmp_path / "s").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "s" / "0.parquet")
    pq.write_table(pa.table({"body": ["b"]}), tmp_path / "s" / "1.parquet")
    with pytest.raises(ConfigError, match=r"1\.parquet has no field text; set data\.text_field to one of: body"):
        build(DataConfig("x", str(tmp_path / "s"), out=str(tmp_path / "out")), 300)


DOUBLED = {
    "line": b'{"text": "one"}\n{"text": "two", "text": "three"}\n',
    "array": b'[{"text": "one"},\n {"text": "two", "id": 1, "text": "three"}]',
    "array-in-a-line": b'[{"text": "one"}, {"text": "two", "text": "three"}]',
}


@pytest.mark.parametrize("case", DOUBLED)
def test_field_that_is_there_twice_is_refused(case: str, tmp_path: Path) -> None:
    """Else one of the two would be dropped in silence."""
    path = tmp_path / "a.json"
    path.write_bytes(DOUBLED[case])
    line = "line 2" if case == "line" else "line 1"
    with pytest.raises(DamagedFileError, match=f"{line}: the field text is there twice"):
        rows_of(path)


def test_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["one"]), pa.array(["two"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DamagedFileError, match="the column text is there twice"):
        rows_of(tmp_path / "a.parquet", "parquet")


def test_name_of_the_field_inside_a_text_is_no_second_field(tmp_path: Path) -> None:
    rows = [{"text": 'say "text": "text"', "more": {"text": "other", "text2": 1}}] * 2
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert rows_of(tmp_path / "a.jsonl") == rows


def test_refusal_names_the_file_and_its_row(tmp_path: Path) -> None:
    for name, value in (("a", "one"), ("b", ["two"])):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps({"text": value}))
    source = Source(DataConfig("mine", str(tmp_path)))
    with pytest.raises(ConfigError, match=re.escape(f"field text of row 1 in {tmp_path / 'b.jsonl'} holds list")):
        list(source.texts(0))


def test_zero_characters_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """UTF-16 without a byte-order mark is valid UTF-8, and no text."""
    (tmp_path / "a.txt").write_bytes("some text".encode("utf-16-le"))
    build(DataConfig("mine", str(tmp_path / "a.txt"), out=str(tmp_path / "out"), max_bytes=0), 300)
    assert "in 1 documents are zero characters: are their files UTF-16" in " ".join(capsys.readouterr().err.split())
