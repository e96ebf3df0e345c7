"""Importing packages that make hundreds of thousands of objects, torch above all."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections(module: str) -> Iterator[None]:
    """Around the first import of ``module``: Python's garbage collector looks through what it makes and frees none.

    That takes a quarter of torch's and our modules' CPU seconds. Later collections leave out what was there at the end.
    A later import changes nothing: a former run's garbage must not be kept.
    """
    if module in sys.modules:
        yield
        return
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
