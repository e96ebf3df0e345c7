"""Text sources: files, folders, globs, hub data sets and the Python sources of this installation."""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import logging
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longcat.errors import ConfigError
from train.data.config import PYTHON_SOURCE, DataConfig

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_KINDS = {".parquet": "parquet", ".txt": "text", ".text": "text"} | dict.fromkeys(
    (".json", ".jsonl", ".ndjson"), "json"
)
_TEXT_IF_NAMED = (".md", ".rst", ".tex", ".py")  # text in a file or glob, not picked up from a folder of data
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# Python sources that are tables, data or tests rather than code: zlib compresses them 4.5 to 8 times, ordinary modules
# 3.5 to 4 times, and `test` alone would be half of the standard library.
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "idle_test"} | {
    "turtledemo", "pydoc_data", "encodings", "lib2to3", "generated"
}  # fmt: skip
_LARGEST_SOURCE = 100_000  # bytes; with 500 kB one file could be half of the validation text
_SPARE = 1.1  # files per text in bytes: \r\n becomes \n, so text is slightly smaller than its files


class Source:
    """The documents of `data.source`, in an order that depends on file names only.

    Local files are ordered by the hashes of their names, so a prefix of `max_bytes` is a fair mixture.

    Raises:
        ConfigError: the source is missing, empty, unreadable, or has no field `data.text_field`.
    """

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._where = f"data.source={config.source}"
        self._files: list[Path] = []
        self._kind = "hub"
        if config.source == PYTHON_SOURCE:
            self._files, self._kind = _python_files(), "text"
        else:
            self._find()
        if self._kind == "text":
            self._files = _enough(self._files, config.max_bytes)
        self._reports = _Reports()
        self._rows = self._load()
        self._check_field()

    def texts(self, max_bytes: int) -> Iterator[str]:
        """Non-empty documents up to `max_bytes` of UTF-8 (0: all), where the last one is cut."""
        left = max_bytes
        for number, row in enumerate(self._guarded_rows()):
            text = row[self._config.text_field]
            if text is not None and not isinstance(text, str):
                raise ConfigError(
                    f"{self._where}: field {self._config.text_field} of row {number} holds "
                    f"{type(text).__name__}, not text; "
                    "name a text field in data.text_field"
                )
            if not text:
                continue
            if max_bytes:
                encoded = text.encode("utf-8", errors="replace")
                text = text if len(encoded) <= left else encoded[:left].decode("utf-8", errors="ignore")
                left -= len(encoded)
            if text:
                yield text
            if max_bytes and left <= 0:
                return

    def _find(self) -> None:
        """Set the files and their kind; none for a hub id."""
        source = self._config.source
        path = Path(source).expanduser()
        if path.is_dir():
            inside = [p for p in path.rglob("*") if p.is_file() and _kind(p)]
            self._files, self._kind = self._of_one_kind(inside)
        elif path.is_file():
            self._files, self._kind = self._of_one_kind([path])
        elif any(character in source for character in "*?["):
            found = (Path(name) for name in glob.glob(str(path), recursive=True))
            self._files, self._kind = self._of_one_kind([p for p in found if p.is_file()])
        elif not _HUB_ID.fullmatch(source) or _kind(path, named=True):
            raise ConfigError(f"{self._where} does not exist; give a hub id, a folder, a file or a glob")

    def _of_one_kind(self, files: list[Path]) -> tuple[list[Path], str]:
        kinds = {_kind(path, named=True): path for path in sorted(files)}
        if not files:
            raise ConfigError(f"{self._where} holds no parquet, json, jsonl or txt files; give another folder or glob")
        if None in kinds:
            raise ConfigError(f"{self._where}: {kinds[None].name} is none of parquet, json, jsonl, txt, md; convert it")
        if len(kinds) > 1:
            names = ", ".join(path.name for path in kinds.values())
            raise ConfigError(
                f"{self._where} mixes kinds of files ({names}); name one kind with a glob such as '*.jsonl'"
            )
        root = Path(self._config.source).expanduser()
        named = [(_name(path, root), path.resolve()) for path in files]
        return _by_hash(named), str(next(iter(kinds)))

    def _load(self) -> Any:
        import datasets

        datasets.disable_progress_bars()
        config = self._config
        # Only the split's name: datasets would take a slice such as train[:10%] for a name.
        name = config.split.partition("[")[0]
        local: dict[str, Any] = {"data_files": {name: [str(path) for path in self._files]}}
        if self._kind == "text":
            local |= {"sample_by": "document"}
            if config.source == PYTHON_SOURCE:
                local |= {"encoding_errors": "replace"}  # a few modules declare another encoding
        try:
            if self._kind == "hub":
                return datasets.load_dataset(
                    config.source, name=config.subset, split=config.split, streaming=config.streaming
                )
            return datasets.load_dataset(self._kind, split=config.split, streaming=config.streaming, **local)
        except StopIteration as error:  # raised by streaming for a file without rows
            raise ConfigError(self._empty()) from error
        except _reading_errors() as error:
            raise ConfigError(self._unreadable(error)) from error

    def _guarded_rows(self) -> Iterator[dict[str, Any]]:
        """Rows; readers' errors become ConfigError."""
        rows = iter(self._rows)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except _reading_errors() as error:
                raise ConfigError(self._unreadable(error)) from error
            yield row

    def _check_field(self) -> None:
        first = next(self._guarded_rows(), None)
        if first is None:
            raise ConfigError(self._empty())
        if self._config.text_field not in first:
            raise ConfigError(
                f"{self._where} has no field {self._config.text_field}; set data.text_field to one of: "
                f"{', '.join(first)}"
            )

    def _empty(self) -> str:
        return f"{self._where} holds no rows; give a source with text"

    def _unreadable(self, error: Exception) -> str:
        if self._kind == "hub":
            return (
                f"{self._where} is no file or folder here, and the hub gave no data set of that name, subset "
                f"{self._config.subset} and split {self._config.split} ({_one_line(error)}); correct the "
                "name or go online"
            )
        detail = self._reports.last or _one_line(error)
        if isinstance(error, UnicodeDecodeError):
            detail = f"{_first_not_utf8(self._files)}: {_one_line(error)}"
        cure = f"repair the file or correct data.split={self._config.split}"
        return f"{self._where} cannot be read ({detail}); {cure}"


def _reading_errors() -> tuple[type[Exception], ...]:
    """The exceptions of `datasets` for a source that is missing or damaged."""
    import datasets
    import pyarrow

    return (datasets.exceptions.DatasetsError, pyarrow.ArrowException, OSError, ValueError, RuntimeError)


class _Reports(logging.Handler):
    """Keeps the last message of the file readers: it names the file, which their exception does not."""

    def __init__(self) -> None:
        super().__init__()
        self.last = ""
        for kind in ("json", "parquet"):
            logger = logging.getLogger(f"datasets.packaged_modules.{kind}.{kind}")
            logger.handlers, logger.propagate = [self], False  # otherwise it is printed beside our own error
            logger.disabled = False  # a logging configuration made after the import (Hydra's) switches loggers off

    def emit(self, record: logging.LogRecord) -> None:
        self.last = " ".join(record.getMessage().split())[:300]


def _kind(path: Path, named: bool = False) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    return "text" if named and last in _TEXT_IF_NAMED else _KINDS.get(last)


def _name(path: Path, root: Path) -> str:
    """The name that orders a file: the one inside a source folder, so moving the folder changes nothing."""
    return path.relative_to(root).as_posix() if root.is_dir() else path.as_posix()


def _by_hash(named: list[tuple[str, Path]]) -> list[Path]:
    return [path for name, path in sorted(named, key=lambda item: hashlib.sha256(item[0].encode()).digest())]


def _python_files() -> list[Path]:
    """Sources of the standard library and of torch, mixed by the hashes of their names."""
    specification = importlib.util.find_spec("torch")
    roots = {"stdlib": Path(sysconfig.get_path("stdlib"))}
    if specification is not None and specification.origin is not None:
        roots["torch"] = Path(specification.origin).parent
    named = []
    for label, root in roots.items():
        for folder, inside, names in os.walk(root):
            inside[:] = [name for name in inside if name not in _LEFT_OUT]
            for path in (Path(folder, name) for name in names if name.endswith(".py")):
                if 0 < path.stat().st_size <= _LARGEST_SOURCE:
                    named.append((f"{label}/{path.relative_to(root).as_posix()}", path))
    if not named:
        raise ConfigError(f"data.source={PYTHON_SOURCE}: this installation has no Python sources; give another source")
    return _by_hash(named)


def _enough(files: list[Path], max_bytes: int) -> list[Path]:
    """The first files with somewhat more than `max_bytes`: resolving thousands more would take seconds."""
    if not max_bytes:
        return files
    total = 0
    for count, path in enumerate(files, 1):
        total += path.stat().st_size if path.suffix not in _COMPRESSED else 0
        if total >= _SPARE * max_bytes:
            return files[:count]
    return files


def _first_not_utf8(files: list[Path]) -> str:
    for path in files:
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return str(path)
    return "a compressed file"


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
