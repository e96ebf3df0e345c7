"""Files of the run folder that training can do without: a write that fails is reported once, and training continues.

A full disk, a quota, a limit or a lost mount must not end a run. Checkpoints are not written here: their failures are
handled in train/checkpoint/saver.py.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from pathlib import Path

from train.checkpoint.failures import describe
from train.checkpoint.files import PARTIAL, regular, sync_folder, write_synced

Note = Callable[[str], None]  # tells a person

MAX_PENDING_BYTES = 64 << 20  # lines that wait in memory for space on the disk
BLOCK = 1 << 16  # bytes read at a time in search of the last line


class LineFile:
    """Appends whole lines to a file, each at once; never raises an OSError.

    The first failure is noted. Lines that could not be written wait in memory and are tried again with each further
    line and on closing; a line that is half in the file is taken out of it first. A file that is removed meanwhile is
    made again.

    Args:
        note: is told the first failure, when writing works again, and how many lines are lost.
    """

    def __init__(self, path: Path, note: Note) -> None:
        self.path, self.note = path, note
        self.pending: deque[bytes] = deque()
        self.pending_bytes = 0
        self.num_lost = 0
        self.failed = False  # the last attempt
        self._descriptor: int | None = None
        self._was_open = False
        self._attempt()

    def write(self, line: str) -> None:
        """Append one line, given without its line feed."""
        self.pending.append(line.encode(errors="replace") + b"\n")
        self.pending_bytes += len(self.pending[-1])
        self._attempt()
        while len(self.pending) > 1 and self.pending_bytes > MAX_PENDING_BYTES:
            self.pending_bytes -= len(self.pending.popleft())
            self.num_lost += 1

    def flush(self) -> None:
        """Try the waiting lines once more."""
        self._attempt()

    def close(self) -> None:
        """Try the waiting lines for the last time."""
        self._attempt()
        if lost := self.num_lost + len(self.pending):
            self.note(f"{self.path}: {lost} lines could not be written and are lost")
            self.pending.clear()
        self._close_file()

    def _attempt(self) -> None:
        """Write the waiting lines."""
        try:
            descriptor = self._open()
            while self.pending:
                _append(descriptor, self.pending[0])
                self.pending_bytes -= len(self.pending.popleft())
        except OSError as error:
            self._close_file()
            if not self.failed:
                self.failed = True  # before the note, which may come back here
                self.note(
                    f"{self.path} cannot be written: {error.strerror or error}; training continues, and its lines are "
                    f"kept in memory and tried again"
                )
            return
        if self.failed:
            self.failed = False
            lost = f"; {self.num_lost} lines are lost" if self.num_lost else ""
            self.note(f"{self.path} is written again{lost}")
            self.num_lost = 0

    def _open(self) -> int:
        if self._descriptor is not None and not self._is_current():
            self._close_file()
        if self._descriptor is None:
            descriptor = regular(str(self.path), os.O_RDWR | os.O_APPEND | os.O_CREAT)
            self._descriptor = descriptor
            end_torn_line(descriptor, keep=not self._was_open)
            self._was_open = True
        return self._descriptor

    def _is_current(self) -> bool:
        """Whether the open file is still the one at its path: it may be removed or replaced meanwhile."""
        assert self._descriptor is not None
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _close_file(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            try:
                os.close(descriptor)
            except OSError as error:  # network file systems report a full disk here
                self.note(f"{self.path} may lack its last lines: {error.strerror or error}")


def _append(descriptor: int, line: bytes) -> None:
    """Append a line as a whole or not at all."""
    before, written = os.fstat(descriptor).st_size, 0
    try:
        while written < len(line):
            written += os.write(descriptor, line[written:])
    except OSError:
        if written:
            os.ftruncate(descriptor, before)
        raise


def end_torn_line(descriptor: int, keep: bool) -> None:
    """Let the next line begin at the start of one: end half a line, or without ``keep`` take it out of the file."""
    end = size = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - BLOCK)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size and keep:
        os.write(descriptor, b"\n")
    elif end < size:
        os.ftruncate(descriptor, end)


def write_file(path: Path, text: str, note: Note) -> bool:
    """Write a text file as a whole or not at all; a failure is noted. Returns whether it is written."""
    partial = path.with_name(f"{path.name}{PARTIAL}")
    try:
        write_synced(partial, text)
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        remove_quietly(partial)
        note(f"{path} cannot be written: {describe(error)}; training continues without it")
        return False
    return True


def remove_quietly(path: Path) -> None:
    """Remove a file if it is there and can be removed."""
    try:
        path.unlink()
    except OSError:
        return
