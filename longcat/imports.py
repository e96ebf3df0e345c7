"""Importing packages that make hundreds of thousands of objects, torch above all."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """Around such imports: Python's garbage collector looks through what they make again and again, and frees none.

    That takes a quarter of torch's and our modules' CPU seconds. Later collections leave out what was there at the end.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
