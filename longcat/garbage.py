"""Switches Python's garbage collector off while code makes hundreds of thousands of objects and frees few of them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collections() -> Iterator[None]:
    """Switch the collector off inside; cycles of objects are freed by a later collection."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def import_without_collections(module: str) -> Iterator[None]:
    """Import ``module`` inside, with the collector off; later collections skip the objects that exist at the end.

    Importing torch makes many objects that are never freed: looking through them takes a quarter of the import's CPU
    seconds. Does nothing if ``module`` is imported already: garbage of an earlier run would be kept for ever.
    """
    if module in sys.modules:
        yield
        return
    with no_collections():
        try:
            yield
        finally:
            gc.freeze()
