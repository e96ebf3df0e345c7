"""The folder of a sweep: a new one, or that of the same sweep if it has not finished."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from longcat.errors import OK, ConfigError
from longcat.json_text import dumps
from train.checkpoint.files import PARTIAL, write_synced
from train.compose import as_hydra_reads, compose_tree, one_line
from train.run_dir import LOCK
from train.sweep_results import MULTIRUN, numbered, read_result, results

SWEEP = "sweep.json"  # the command's overrides, and whether all of its runs have ended with 0
LAUNCHER = ("hydra/launcher", "hydra.launcher.")  # where the runs go may change while the sweep is not finished


def open_folder(overrides: list[str]) -> Path:
    """The folder of the sweep of ``overrides``: `<run.dir>/<run.name>-sweep`, with a number if there is one already.

    A sweep of the same overrides that has not finished goes on in its folder.
    """
    parent, name = _place(overrides)
    folder = _unfinished(parent, name, overrides)
    if folder is None:
        folder = _make_folder(parent, name)
        note_finished(folder, overrides, False)
    return folder


def forget_failures(folder: Path) -> None:
    """Remove the results of runs that are to start again: all but those that ended with 0."""
    found = results(folder)
    for _, path in numbered(folder):
        if read_result(path).code != OK:
            path.unlink()
    if found:
        done = sum(result.code == OK for result in found)
        print(f"{folder} has not finished: going on, {done} of its runs done", file=sys.stderr)


def note_finished(folder: Path, overrides: list[str], finished: bool) -> None:
    """Write sweep.json."""
    partial = folder / f".{SWEEP}{PARTIAL}"
    write_synced(partial, dumps({"overrides": overrides, "finished": finished}))
    partial.replace(folder / SWEEP)


def remove_if_unused(folder: Path, failure: str) -> None:
    """Remove the folder of a sweep that was refused before its first run, and a parent that it was the first in."""
    if not failure and not results(folder):
        for name in (MULTIRUN, SWEEP, LOCK):
            (folder / name).unlink(missing_ok=True)
    for path in (folder, folder.parent):
        try:
            path.rmdir()
        except OSError:  # not empty
            return


def _place(overrides: list[str]) -> tuple[Path, str]:
    """`run.dir` and `run.name` of a sweep."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        parsed = OverridesParser.create().parse_overrides([as_hydra_reads(each) for each in overrides])
        run = compose_tree([each.input_line or "" for each in parsed if not each.is_sweep_override()]).run
        return Path(str(run.dir)), str(run.name)
    except Exception as error:
        raise ConfigError(one_line(error)) from error


def _unfinished(parent: Path, name: str, overrides: list[str]) -> Path | None:
    """The newest folder of the same sweep that has not finished."""
    found = []
    number = 1
    while (folder := _numbered_folder(parent, name, number)).exists():
        stored = _read(folder / SWEEP)
        if stored.get("finished") is False and _same(stored.get("overrides"), overrides):
            found.append(folder)
        number += 1
    return found[-1] if found else None


def _same(stored: Any, overrides: list[str]) -> bool:
    words = stored if isinstance(stored, list) else []
    return [w for w in words if not str(w).startswith(LAUNCHER)] == [w for w in overrides if not w.startswith(LAUNCHER)]


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):  # of an older version, or half written
        return {}
    return value if isinstance(value, dict) else {}


def _numbered_folder(parent: Path, name: str, number: int) -> Path:
    return parent / (f"{name}-sweep" if number == 1 else f"{name}-sweep-{number}")


def _make_folder(parent: Path, name: str) -> Path:
    number = 1
    while True:
        folder = _numbered_folder(parent, name, number)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not parent.is_dir():
                raise ConfigError(f"run.dir={parent} is no folder; choose another run.dir") from None
            number += 1
        except OSError as error:
            raise ConfigError(
                f"run.dir={parent}: cannot write in it ({error.strerror}); choose another run.dir"
            ) from error
