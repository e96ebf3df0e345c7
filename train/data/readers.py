"""The rows of one file of text: parquet, JSON or plain text, compressed or not."""

from __future__ import annotations

import bz2
import codecs
import io
import json
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

from train.data.files import COMPRESSED

TEXT_FIELD = "text"  # the only field of a plain text file
_BLOCK = 1 << 20
_BATCH_ROWS = 1024
_MARKS = {  # what a file's first bytes say about its encoding; the longer mark first
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

Row = dict[str, Any]


class DamagedFileError(Exception):
    """A file that cannot be read to its end; the message has the cause in one line."""


class MissingFieldError(Exception):
    """A file of tables has no column of the wanted name."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(names)
        self.names = names


def read_rows(path: Path, kind: str, field: str, errors: str = "strict") -> Iterator[Row]:
    """The rows of a file in order, one at a time. A plain text file is one row.

    Args:
        kind: parquet, json (an array, lines, or objects one after the other) or text.
        field: the field that is wanted; parquet files are read without the others.
        errors: what becomes of bytes that are no UTF-8, as in `bytes.decode`.

    Raises:
        DamagedFileError: also when a compressed file ends too early.
        MissingFieldError: a parquet file has rows, and none has the field.
    """
    import pyarrow

    reader: Callable[[], Iterator[Row]] = {
        "parquet": lambda: _parquet_rows(path, field),
        "json": lambda: _json_rows(path, field, errors),
        "text": lambda: _text_row(path, errors),
    }[kind]
    damage = (OSError, EOFError, ValueError, RecursionError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)
    try:
        yield from reader()
    except damage as error:
        raise DamagedFileError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def _text_row(path: Path, errors: str) -> Iterator[Row]:
    with _text(path, errors) as stream:
        yield {TEXT_FIELD: stream.read()}


def _json_rows(path: Path, field: str, errors: str) -> Iterator[Row]:
    with _text(path, errors) as stream:
        is_first, once = True, partial(_once, field)
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                # A check of each object takes time: only where the name may be there twice
                values = [json.loads(line, object_pairs_hook=once if line.count(f'"{field}"') > 1 else None)]
            except json.JSONDecodeError as error:
                if not is_first:
                    raise ValueError(f"line {number}: {error.msg}") from error
                values = _values(line + stream.read(), number, once)  # values that span lines
            except ValueError as error:  # also a number of too many digits
                raise ValueError(f"line {number}: {error}") from error
            is_first = False
            for value in values:
                for row in value if isinstance(value, list) else [value]:
                    if not isinstance(row, dict):
                        raise ValueError(f"line {number}: {type(row).__name__} where an object with fields belongs")
                    yield row


def _values(text: str, first_line: int, make_row: Callable[[list[tuple[str, Any]]], Row]) -> list[Any]:
    """JSON values one after the other; the first line of ``text`` has this number in its file."""
    decoder, found = json.JSONDecoder(object_pairs_hook=make_row), []
    position = len(text) - len(text.lstrip())
    while position < len(text):
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {first_line + error.lineno - 1}: {error.msg}") from error
        except ValueError as error:
            raise ValueError(f"line {first_line + text.count(chr(10), 0, position)}: {error}") from error
        found.append(value)
        while position < len(text) and text[position].isspace():
            position += 1
    return found


def _once(field: str, pairs: list[tuple[str, Any]]) -> Row:
    """An object of its fields. ``field`` may be there once only: of two, one would be dropped."""
    row = dict(pairs)
    if len(row) < len(pairs) and [name for name, _ in pairs].count(field) > 1:
        raise ValueError(f"the field {field} is there twice")
    return row


def _parquet_rows(path: Path, field: str) -> Iterator[Row]:
    import pyarrow.parquet

    with _seekable(path) as stream, pyarrow.parquet.ParquetFile(stream) as file:
        names = file.schema_arrow.names
        if field not in names and file.metadata.num_rows:
            raise MissingFieldError(names)
        if names.count(field) > 1:
            raise ValueError(f"the column {field} is there twice")
        for batch in file.iter_batches(_BATCH_ROWS, columns=[field]):
            for value in batch.column(field).to_pylist():
                yield {field: value}


def _text(path: Path, errors: str) -> io.TextIOWrapper:
    """A file's characters, without a byte-order mark, which says how the text is encoded and is no part of it.

    Line ends stay as they are.
    """
    stream = open_decompressed(path)
    start = stream.peek(4)[:4]
    encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")
    return io.TextIOWrapper(stream, encoding=encoding, errors=errors, newline="\n")


def _seekable(path: Path) -> IO[bytes]:
    if path.suffix.lower() not in COMPRESSED:
        return path.open("rb")
    whole = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    with open_decompressed(path) as stream:
        shutil.copyfileobj(stream, whole, _BLOCK)
    whole.seek(0)
    return whole


def open_decompressed(path: Path) -> io.BufferedReader:
    """A file's bytes, decompressed by its suffix.

    Reading raises an error where compressed data end too early or something else follows them: the standard library's
    own readers of .bz2 and .xz stop there in silence.
    """
    suffix = path.suffix.lower()
    if suffix not in COMPRESSED:
        return path.open("rb")
    return io.BufferedReader(_IteratorStream(_zstd(path) if suffix == ".zst" else _streams(path, suffix)), _BLOCK)


class _Decompressor(Protocol):
    """What zlib, bz2 and lzma have in common."""

    eof: bool
    unused_data: bytes

    def decompress(self, data: bytes, /) -> bytes: ...


def _streams(path: Path, suffix: str) -> Generator[bytes, None, None]:
    """The contents of compressed streams one after the other, as parallel compressors write them."""
    new: Callable[[], Any] = {
        ".gz": lambda: zlib.decompressobj(wbits=31),
        ".bz2": bz2.BZ2Decompressor,
        ".xz": lzma.LZMADecompressor,
    }[suffix]
    decompressor: _Decompressor = new()
    with path.open("rb") as file:
        while data := file.read(_BLOCK):
            while data:
                if decompressor.eof:
                    data = data.lstrip(b"\0")  # padding between streams
                    if not data:
                        break
                    decompressor = new()
                yield decompressor.decompress(data)
                data = decompressor.unused_data
    if not decompressor.eof:
        raise EOFError("the compressed data end too early: the file is truncated")


def _zstd(path: Path) -> Generator[bytes, None, None]:
    import pyarrow

    if path.stat().st_size == 0:
        raise EOFError("the compressed data end too early: the file is truncated")
    with pyarrow.input_stream(str(path), compression="zstd") as stream:
        while data := stream.read(_BLOCK):
            yield data


class _IteratorStream(io.RawIOBase):
    """A readable stream over an iterator of bytes."""

    def __init__(self, chunks: Generator[bytes, None, None]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def close(self) -> None:
        self._chunks.close()  # closes the file
        super().close()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
