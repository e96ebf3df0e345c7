"""Text of this machine: manual pages as plain text, changelogs, and one line where there are none."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from longcat.errors import ConfigError
from train.data import machine_text
from train.data.config import DataConfig
from train.data.machine_text import MACHINE_TEXT, page_text
from train.data.sources import Source

PAGE = r"""'\" t
.\" A comment
.de Vb \" a macro of its own
.ft CW
..
.TH TAR 1 "May 2024" "GNU" "Manual"
.SH NAME
tar \- an archiving utility\"comment
.SH DESCRIPTION
.PP
The \fBtar\fR program stores files, \f(CWlinks\fP and
.BR dump (8)
images. It\(aqs \fItwo\fP \[u2014] ways\(em or more.
.TP
.B \-\-create
Create an archive.\c
.IP \(bu 2
A \s-1POSIX\s0 list, \*(Aqquoted\*(Aq, in C:\e and a "dir name".
.if n .ad l
"""
TEXT = """
NAME
tar - an archiving utility

DESCRIPTION

The tar program stores files, links and
dump(8)
images. It's two — ways-- or more.

--create
Create an archive.

*
A POSIX list, quoted, in C:\\ and a "dir name".
"""


def test_a_page_keeps_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_text, "_SHORTEST_PAGE", 100)
    assert page_text(PAGE) == TEXT.lstrip("\n")
    assert page_text(".so man1/tar.1\n") == ""


def texts(source: str) -> list[str]:
    return list(Source(DataConfig(source, source)).texts(0))


def test_manual_pages_are_english_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_text, "MANUAL_PAGES", tmp_path)
    for name in ("man1", "man8", "de/man1"):
        (tmp_path / name).mkdir(parents=True)
    body = "Many words of a page. " * 20
    (tmp_path / "man1" / "one.1.gz").write_bytes(gzip.compress(f".SH ONE\n{body}".encode()))
    (tmp_path / "man1" / "again.1.gz").symlink_to("one.1.gz")
    (tmp_path / "man1" / "other.1").write_text(".so man1/one.1")
    (tmp_path / "man8" / "two.8").write_bytes(b".SH TWO\n\xe9 " + body.encode())
    (tmp_path / "de" / "man1" / "one.1").write_text(f".SH EINS\n{body}")
    found = texts("manual_pages")
    assert sorted(text.split()[0] for text in found) == ["ONE", "TWO"]
    assert found == texts("manual_pages")


def test_changelogs_come_compressed_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_text, "CHANGELOGS", tmp_path)
    for name in ("bash", "tar"):
        (tmp_path / name).mkdir()
    (tmp_path / "bash" / "changelog.Debian.gz").write_bytes(gzip.compress(b"bash (5.2) stable"))
    (tmp_path / "tar" / "NEWS").write_text("tar 1.34 is out")
    (tmp_path / "tar" / "copyright").write_text("a licence")
    (tmp_path / "tar" / "changelog.html").write_text("<html>")
    assert sorted(texts("changelogs")) == ["bash (5.2) stable", "tar 1.34 is out"]


@pytest.mark.parametrize("source", ["manual_pages", "changelogs"])
def test_a_machine_without_them_is_one_line(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MANUAL_PAGES", "CHANGELOGS"):
        monkeypatch.setattr(machine_text, name, tmp_path / "none")
    with pytest.raises(ConfigError, match=f"data.source={source}: this machine has no .*; give another source"):
        MACHINE_TEXT[source].files(source)
