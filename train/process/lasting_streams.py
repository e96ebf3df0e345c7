"""Standard output and error that nobody reads, or that cannot express a character, do not end the program."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EAGAIN)  # may pass: the stream is tried again
STREAMS = ("stdout", "stderr")


class LastingStream:
    """A text stream whose writes never raise an OSError or a UnicodeEncodeError.

    When its reader is gone (a closed pipe, a lost terminal) it writes to the null device from then on, also below
    Python: otherwise the interpreter's flush at the end would change the exit code to 120. Where a disk is full, a line
    is lost and the next one is tried. Characters that its encoding does not have are written as `\\u2026`.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.lost: OSError | ValueError | None = None  # why nobody reads it any more

    def write(self, text: str) -> int:
        try:
            self._try(lambda: self.stream.write(text))
        except UnicodeEncodeError:  # raised before anything is written
            encoding = self.stream.encoding
            escaped = text.encode(encoding, "backslashreplace").decode(encoding)
            self._try(lambda: self.stream.write(escaped))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def close_quietly(self) -> None:
        """The last flush; what a full disk still refuses is dropped."""
        self.flush()
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def isatty(self) -> bool:
        try:
            return self.lost is None and self.stream.isatty()
        except (OSError, ValueError):
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _try(self, action: Any) -> None:
        if self.lost is not None:
            return
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            if isinstance(error, UnicodeError):
                raise
            if getattr(error, "errno", None) not in FULL:
                self._drop(error)

    def _drop(self, error: OSError | ValueError) -> None:
        self.lost = error
        with contextlib.suppress(OSError, ValueError):
            to_null_device(self.stream.fileno())
            self.stream.flush()


def to_null_device(descriptor: int) -> None:
    """Let a file descriptor write to the null device."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    if nothing != descriptor:
        os.dup2(nothing, descriptor)
        os.close(nothing)


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """Inside, standard output and error are `LastingStream`s. One that was closed at the start is the null device."""
    before = {name: getattr(sys, name) for name in STREAMS}
    lasting = []
    for number, name in enumerate(STREAMS, start=1):
        stream = before[name]
        if stream is None:  # closed by the caller, as with `>&-`: the next file opened would get its number
            to_null_device(number)
            before[name] = stream = open(number, "w", closefd=False)  # noqa: SIM115  it lasts as long as the process
        lasting.append(stream if isinstance(stream, LastingStream) else LastingStream(stream))
        setattr(sys, name, lasting[-1])
    try:
        yield
    finally:
        for name, stream in zip(STREAMS, lasting, strict=True):
            stream.close_quietly()
            if getattr(sys, name) is stream:
                setattr(sys, name, before[name])
