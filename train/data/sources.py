"""Text sources: local files, hub data sets and what this machine has of its own."""

from __future__ import annotations

import itertools
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from longcat.errors import ConfigError
from train.data.config import DataConfig
from train.data.files import SourceFiles, find_files, kind_of
from train.data.machine_text import MACHINE_TEXT
from train.data.readers import TEXT_FIELD, DamagedFileError, MissingFieldError, read_rows

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_FIRST_ROWS = 1000  # of them one must have the text field
Row = dict[str, Any]


@dataclass
class ReadCounts:
    """What one pass over a source has read so far."""

    files: int = 0  # begun
    file: Path | None = None  # that is being read
    row: int = 0  # number of the newest row in this file, from 0
    empty: int = 0  # rows without text
    with_zeros: int = 0  # documents with zero characters
    not_unicode: int = 0  # documents with half a surrogate pair, which UTF-8 cannot express


class Source:
    """The documents of `data.source`, in an order that depends on file names only.

    Local files are ordered by the hashes of their names, so a prefix of `max_bytes` is a fair mixture. Each file that
    was found is read by its own name, once.

    Attributes:
        counts: of the newest pass over the texts.
        num_files: files that were found; None for a hub data set.
        left_out: what else a folder holds, such as `.csv 3`.

    Raises:
        ConfigError: the source is missing, empty, unreadable, or has no field `data.text_field`.
    """

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._where = f"data.source={config.source}"
        self.counts = ReadCounts()
        self._machine = MACHINE_TEXT.get(config.source)
        self._found = (
            find_files(config.source)
            if self._machine is None
            else SourceFiles("text", self._machine.files(config.source))
        )
        self._hub: Any = None
        if self._found is None:
            if not _HUB_ID.fullmatch(config.source) or kind_of(Path(config.source)):
                raise ConfigError(f"{self._where} does not exist; give a hub id, a folder, a file or a glob")
            self._hub = self._load_hub()
        self.num_files = None if self._found is None else len(self._found.files)
        self.left_out = "" if self._found is None else self._found.left_out
        self._range = self._slice()
        self._check_field()

    def texts(self, max_bytes: int) -> Iterator[str]:
        """Non-empty documents up to `max_bytes` of UTF-8 (0: all), where the last one is cut."""
        left = max_bytes
        self.counts = ReadCounts()
        for number, row in enumerate(self._rows()):
            text = row.get(self._config.text_field)
            if text is not None and not isinstance(text, str):
                raise ConfigError(
                    f"{self._where}: field {self._config.text_field} of {self._place(number)} holds "
                    f"{type(text).__name__}, not text; name a text field in data.text_field"
                )
            if not text:
                self.counts.empty += 1
                continue
            text = self._as_unicode(text)
            self.counts.with_zeros += "\0" in text
            if max_bytes:
                encoded = text.encode()
                text = text if len(encoded) <= left else encoded[:left].decode(errors="ignore")
                left -= len(encoded)
            if text:
                yield text
            if max_bytes and left <= 0:
                return

    def _place(self, number: int) -> str:
        """Where the row with this number in the source is, for a person."""
        if self._found is None:
            return f"row {number}"
        return f"row {self.counts.row} in {self.counts.file}"

    def _as_unicode(self, text: str) -> str:
        """``text`` with half surrogate pairs, which JSON can express and UTF-8 cannot, as U+FFFD."""
        try:
            text.encode()
        except UnicodeEncodeError:
            self.counts.not_unicode += 1
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text

    def _rows(self) -> Iterator[Row]:
        """All rows, or those of the slice in `data.split`."""
        rows = self._local_rows() if self._found else self._hub_rows()
        if self._range is None:
            return rows
        return itertools.chain.from_iterable(self._part(start, stop) for start, stop in self._range)

    def _part(self, start: int, stop: int) -> Iterator[Row]:
        return itertools.islice(self._local_rows(), start, stop)

    def _local_rows(self) -> Iterator[Row]:
        assert self._found is not None
        # a few of a machine's own files declare another encoding
        errors, clean = ("strict", None) if self._machine is None else ("replace", self._machine.clean)
        for number, path in enumerate(self._found.files, 1):
            self.counts.files, self.counts.file = max(self.counts.files, number), path
            try:
                rows = read_rows(path, self._found.kind, self._config.text_field, errors)
                for self.counts.row, row in enumerate(rows):
                    yield row if clean is None else {TEXT_FIELD: clean(row[TEXT_FIELD])}
            except MissingFieldError as error:
                raise ConfigError(self._no_field(error.names, str(path))) from error
            except DamagedFileError as error:
                raise ConfigError(
                    f"{self._where} cannot be read ({path}: {error}); repair or remove this file"
                ) from error

    def _slice(self) -> list[tuple[int, int]] | None:
        """The rows of local files that a split such as `train[:10%]` names; None = all."""
        split = self._config.split
        if self._found is None or "[" not in split:
            return None
        if self._config.streaming:
            raise ConfigError(
                f"data.split={split} is a slice, which a stream does not have; set data.streaming=false, or use "
                f"data.max_bytes"
            )
        import datasets

        count = sum(1 for _ in self._local_rows())
        try:
            parts = datasets.ReadInstruction.from_spec(split).to_absolute({split.partition("[")[0]: count})
        except (ValueError, AssertionError) as error:
            raise ConfigError(f"data.split={split} is no slice such as train[:10%] ({error}); correct it") from error
        return [(part.from_, part.to) for part in parts]

    def _load_hub(self) -> Any:
        import datasets

        datasets.disable_progress_bars()
        ask_cache_alone_without_network()
        config = self._config
        try:
            return datasets.load_dataset(
                config.source, name=config.subset, split=config.split, streaming=config.streaming
            )
        except StopIteration as error:  # raised by streaming for a file without rows
            raise ConfigError(self._empty()) from error
        except _hub_errors() as error:
            raise ConfigError(self._unreadable(error)) from error

    def _hub_rows(self) -> Iterator[Row]:
        """Rows; the readers' errors become ConfigError."""
        rows = iter(self._hub)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except _hub_errors() as error:
                raise ConfigError(self._unreadable(error)) from error
            yield row

    def _check_field(self) -> None:
        names: dict[str, None] = {}
        for row in itertools.islice(self._rows(), _FIRST_ROWS):
            names.update(dict.fromkeys(row))
            if self._config.text_field in row:
                return
        if not names:
            raise ConfigError(self._empty())
        raise ConfigError(self._no_field(list(names), ""))

    def _no_field(self, names: list[str], file: str) -> str:
        where = f"{self._where}: {file}" if file else self._where
        return f"{where} has no field {self._config.text_field}; set data.text_field to one of: {', '.join(names)}"

    def _empty(self) -> str:
        return f"{self._where} holds no rows; give a source with text"

    def _unreadable(self, error: Exception) -> str:
        return (
            f"{self._where} is no file or folder here, and the hub gave no data set of that name, subset "
            f"{self._config.subset} and split {self._config.split} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]}); correct the name or go online"
        )


def ask_cache_alone_without_network() -> None:
    """Switch the hub's libraries to offline where its name is unknown: they would try again for half a minute."""
    import datasets
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname
    if host is None or {"https", "all"} & getproxies().keys():  # a proxy may know the name
        return
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True


def _hub_errors() -> tuple[type[Exception], ...]:
    """The exceptions of `datasets` for a source that is missing or damaged."""
    import datasets
    import pyarrow

    return (datasets.exceptions.DatasetsError, pyarrow.ArrowException, OSError, ValueError, RuntimeError)
