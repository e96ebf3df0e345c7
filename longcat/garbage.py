"""Python's garbage collector, kept out of stretches that make hundreds of thousands of objects and free few of them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collections() -> Iterator[None]:
    """The collector is off inside. What only it frees stays until a later collection."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def import_without_collections(module: str) -> Iterator[None]:
    """Around the first import of ``module``, torch above all: the collector looks through what it makes and frees none.

    That takes a quarter of torch's and our modules' CPU seconds. Later collections leave out what was there at the end.
    A later import changes nothing: a former run's garbage must not be kept.
    """
    if module in sys.modules:
        yield
        return
    with no_collections():
        try:
            yield
        finally:
            gc.freeze()
