"""The files of a sweep's folder: how each of its runs ended, or that it has begun."""

from __future__ import annotations

import os
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from longcat.errors import CRASHED, OK, UNHEALTHY
from train.checkpoint.files import PARTIAL, read_bytes, write_synced
from train.run_dir.sealed import seal_line, unseal_line

MULTIRUN = "multirun.yaml"  # Hydra writes it before it checks the values
SWEEP_FOLDER = "LONGCAT_SWEEP_FOLDER"  # environment of a sweep's runs, and so of their ranks


@dataclass(frozen=True)
class Result:
    """How one run of a sweep ended; a JSON file of the sweep's folder, since a launcher may run it elsewhere."""

    run: str  # the run's folder
    code: int | None  # the exit code; None from the start of the run to its end
    message: str
    process: str  # where the error was printed
    overrides: list[str] = field(default_factory=list)  # key=value of this run; the same keys in all runs of a sweep
    stopped_early: bool = False  # a hopeless run (`pruning.percentile`)

    @property
    def reached_end(self) -> bool:
        return self.code == OK and not self.stopped_early

    @property
    def failed(self) -> bool:
        return self.code not in (None, OK)

    @property
    def is_final(self) -> bool:
        """Whether the run has nothing more to tell: a diverged one has no good value, and would diverge again."""
        return self.code in (OK, UNHEALTHY)

    def folder(self, sweep: Path) -> Path:
        """The run's folder: the one beside the sweep's, whatever the current folder has; `run` if there is none."""
        path = Path(self.run)
        beside = Path(os.path.abspath(sweep)).parent / path.name
        return beside if beside.is_dir() else path

    def settings(self) -> dict[str, int | float | str]:
        """{key: value} of the overrides, numbers as such."""
        pairs = (override.lstrip("+").partition("=") for override in self.overrides)
        return {key: _value(text) for key, _, text in pairs}


KINDS: dict[str, tuple[type, ...]] = {
    "run": (str,),
    "code": (int, NoneType),
    "message": (str,),
    "process": (str,),
    "overrides": (list,),
    "stopped_early": (bool,),
}


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip("'\"")


def results(folder: Path) -> list[Result]:
    """The results that the sweep has so far, in the order of its runs."""
    return [read_result(path) for _, path in sorted(numbered(folder))]


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """(number of the run, file of its result) of those that have begun."""
    return [(int(path.stem), path) for path in folder.glob("*.json") if path.stem.isdecimal()]


def read_result(path: Path) -> Result:
    """The result in a file; a failed one where it cannot be read."""
    try:
        fields = unseal_line(read_bytes(path))
        _check_kinds(fields)
        return Result(**fields)
    except (OSError, ValueError, TypeError) as error:
        return Result(str(path), CRASHED, f"the result of this run cannot be read ({error})", process="")


def _check_kinds(fields: dict[str, Any]) -> None:
    """Raise TypeError where a field is of another type: somebody else may have written the file."""
    for key, value in fields.items():
        if type(value) not in KINDS.get(key, (type(value),)):  # Result refuses an unknown key
            raise TypeError(f"{key} is a {type(value).__name__}")
    if not all(isinstance(override, str) for override in fields.get("overrides", [])):
        raise TypeError("overrides are not all text")


def write_result(folder: Path, number: int, result: Result) -> None:
    """Write the result of run ``number`` as a whole: other jobs may read it at any time, or write it too."""
    partial = folder / f".{number}.json-{uuid.uuid4().hex}{PARTIAL}"
    write_synced(partial, seal_line(asdict(result)))
    partial.replace(result_file(folder, number))


def result_file(folder: Path, number: int) -> Path:
    return folder / f"{number}.json"


def is_sweep(folder: Path) -> bool:
    """Whether this is a sweep's folder."""
    return (folder / MULTIRUN).is_file() or bool(numbered(folder))
