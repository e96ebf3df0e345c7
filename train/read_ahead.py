"""Samples of the next step, read by a thread while this one computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

Windows = list[np.ndarray]  # int64 [S + 1] each, or [2, S + 1] with numbers of documents


class ReadAhead:
    """Reads samples in one thread, which alone calls ``read``: corpora keep what they have read, without a lock.

    Until the first ``ask`` there is no thread, and samples are read where they are taken.
    """

    def __init__(self, read: Callable[[int], np.ndarray]) -> None:
        self._read = read
        self._thread: ThreadPoolExecutor | None = None
        self._asked: tuple[tuple[int, ...], Future[Windows]] | None = None

    def ask(self, numbers: Sequence[int]) -> None:
        """Let the thread read these samples; drop an earlier request."""
        self.forget()
        self._asked = tuple(numbers), self._submit(tuple(numbers))

    def take(self, numbers: Sequence[int]) -> Windows:
        """Return these samples: those of the last `ask` if it was for the same, else read now; raises as ``read``."""
        asked, self._asked = self._asked, None
        if asked is not None and asked[0] == tuple(numbers) and asked[1].exception() is None:
            return asked[1].result()
        return self.read(numbers)

    def read(self, numbers: Sequence[int]) -> Windows:
        """Read samples now; the request of `ask` stays."""
        if self._thread is None:
            return self._windows(tuple(numbers))
        return self._thread.submit(self._windows, tuple(numbers)).result()

    def forget(self) -> None:
        """Drop the request of `ask`."""
        if self._asked is not None:
            self._asked[1].cancel()
        self._asked = None

    def close(self) -> None:
        """End the thread; the next call starts one again."""
        self.forget()
        if self._thread is not None:
            self._thread.shutdown()
        self._thread = None

    def _submit(self, numbers: tuple[int, ...]) -> Future[Windows]:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        return self._thread.submit(self._windows, numbers)

    def _windows(self, numbers: tuple[int, ...]) -> Windows:
        return [self._read(number) for number in numbers]
