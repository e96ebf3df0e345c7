"""Where Python looks for modules: not in the current folder, where a user's own train.py or json.py may be."""

from __future__ import annotations

import os
import site
import sys
from collections.abc import Iterator
from contextlib import contextmanager

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # holds this program's packages


def leave_out_current_folder() -> None:
    """Take the current folder out of `sys.path`, unless it is `ROOT`.

    `python -m` and an entry of PYTHONPATH put it before the standard library. What comes after that shadows nothing.
    """
    library = os.path.dirname(os.__file__)
    first = sys.path.index(library) if library in sys.path else len(sys.path)
    sys.path[:first] = without_current_folder(sys.path[:first])


def leave_out_in_children() -> None:
    """Let every Python that this process starts leave the current folder out, too."""
    os.environ["PYTHONSAFEPATH"] = "1"
    if "PYTHONPATH" in os.environ:
        os.environ["PYTHONPATH"] = os.pathsep.join(without_current_folder(os.environ["PYTHONPATH"].split(os.pathsep)))


@contextmanager
def found_by_children() -> Iterator[None]:
    """Let Pythons that are started with `-P` find this program, also in a checkout and beside a user's train.py."""
    name = "PYTHONPATH"
    before = os.environ.get(name)
    entries = without_current_folder(before.split(os.pathsep) if before else [])
    if ROOT not in (*site.getsitepackages(), site.getusersitepackages()):
        entries.insert(0, ROOT)  # a folder of installed packages must not come before the standard library
    os.environ[name] = os.pathsep.join(entries)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def without_current_folder(entries: list[str]) -> list[str]:
    """The entries of a search path that are not the current folder in any spelling; all if that is `ROOT`."""
    if _is_current(ROOT):
        return entries
    return [entry for entry in entries if not _is_current(entry)]


def _is_current(entry: str) -> bool:
    """Whether an entry is the current folder, as the empty one is."""
    try:
        return not entry or os.path.samefile(entry, os.curdir)
    except OSError:  # no such folder
        return False
