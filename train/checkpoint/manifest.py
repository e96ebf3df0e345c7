"""A checkpoint folder: its name, its manifest of hashes, how it is verified and committed.

A checkpoint is a folder `step-00000100` with torch.distributed.checkpoint's shards, `state.json` (counters,
configuration) and `manifest.json` (the hash of every file). The folder gets its name when every file is on disk.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from longcat.errors import ConfigError
from longcat.json_text import dumps
from train.checkpoint.files import HASH, PARTIAL, check_absent, file_hash, read_text, sync_folder, write_synced

NAME = re.compile(r"^step-([0-9]{8})\Z")  # the full name: a copy `backup-step-00000002` is not a run's checkpoint
REMOVED = ".removed"
MANIFEST, STATE = "manifest.json", "state.json"
COUNTERS = ("step", "samples", "tokens", "data_start")  # of `train.state.Counters`, in state.json


@dataclass(frozen=True)
class CheckpointStatus:
    """Whether a checkpoint is valid, and if not, why."""

    folder: Path
    step: int
    problem: str | None  # None = valid


def step_of(path: Path) -> int:
    """The step in a checkpoint's name; -1 where it has another one."""
    return int(match[1]) if (match := NAME.search(path.name)) else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if path.is_dir() and step_of(path) >= 0), key=step_of)


Check = Callable[[Path, dict[str, str]], list[str]]  # a folder, its files with their hashes → their problems


def problems(path: Path, files: dict[str, str]) -> list[str]:
    """The problems of a checkpoint's files (name → hash), in their order; empty if they are as written."""

    def problem(name: str) -> str | None:
        try:
            differs = file_hash(path / name) != files[name]
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return f"{name} does not have the hash of the manifest" if differs else None

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the GIL
        return [found for found in pool.map(problem, files) if found]


def verify(path: Path, check: Check = problems) -> CheckpointStatus:
    """Check every file of a checkpoint against its manifest."""
    step = step_of(path)
    try:
        manifest = json.loads(read_text(path / MANIFEST))
        kind, files = manifest.get("hash"), dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return CheckpointStatus(path, step, f"no readable {MANIFEST}")
    if kind != HASH:
        return CheckpointStatus(
            path, step, f"{MANIFEST} is another version's: its hashes are {kind or 'not named'}, not {HASH}"
        )
    try:
        missing = [name for name in files if not (path / name).is_file()]
    except OSError as error:
        return CheckpointStatus(path, step, f"{Path(error.filename or path).name} cannot be read ({error.strerror})")
    if missing:
        return CheckpointStatus(path, step, f"{missing[0]} is missing")
    found = check(path, files)
    return CheckpointStatus(path, step, found[0] if found else check_state(path))


def check_state(path: Path) -> str | None:
    """The problem of a checkpoint whose state.json lacks what readers need, or has another step than its name."""
    try:
        state = json.loads(read_text(path / STATE))
        counters, configuration = dict(state["counters"]), state["configuration"]
        stored = counters["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"{STATE} does not say the step and the configuration"
    for name in COUNTERS:
        count = counters.get(name, 0 if name == "data_start" else None)  # it came later than the other ones
        if type(count) is not int or count < 0:
            return f"{STATE} does not say counters.{name} (it is {'missing' if count is None else repr(count)})"
    if not isinstance(configuration, dict):
        return f"{STATE} has no configuration"
    for section in ("model", "data", "train"):
        if not isinstance(configuration.get(section), dict):
            return f"{STATE} has a configuration without {section}"
    if not isinstance(state.get("health") or {}, dict):
        return f"{STATE} has no state of the health checks"
    return None if step_of(path) in (-1, stored) else f"it contains step {stored}, which is not the step of its name"


def check_target(target: Path) -> None:
    """Raise ConfigError for a folder to write that exists, or that a run or the next command would remove."""
    check_absent(target)
    for folder in Path(os.path.realpath(target)).parents:
        if (folder / MANIFEST).is_file() and (folder / STATE).is_file():
            raise ConfigError(
                f"target={target} is inside the checkpoint {folder} and would go with it; choose another folder"
            )
    if target.name.endswith((PARTIAL, REMOVED)):
        raise ConfigError(f"target={target}: this ending stands for what is half written or removed; choose another")


def check_name(target: Path, step: int) -> None:
    """Raise ConfigError for a name by which a run would take ``target`` for a checkpoint of another step."""
    if step_of(target) not in (-1, step):
        raise ConfigError(f"target={target} names another step; it would contain step {step}, so step-{step:08d}")


def size(path: Path) -> int:
    """Bytes of a checkpoint's files; 0 for those that another process has just removed."""
    total = 0
    with contextlib.suppress(OSError):
        for file in path.iterdir():
            with contextlib.suppress(OSError):
                total += file.stat().st_size
    return total


def commit(partial: Path, target: Path, text: str, files: dict[str, str]) -> None:
    """Complete a checkpoint and give the folder its name; an older folder of that name is renamed."""
    write_manifest(partial, text, files)
    set_aside(target, "replaced")
    os.rename(partial, target)
    sync_folder(target.parent)


def write_manifest(partial: Path, text: str, files: dict[str, str]) -> None:
    """Write state.json and the manifest of ``files`` (name → hash) beside the shards."""
    write_synced(partial / STATE, text)
    for name in (STATE, ".metadata"):
        files[name] = file_hash(partial / name)
    write_synced(partial / MANIFEST, dumps({"hash": HASH, "files": files}, indent=1))
    sync_folder(partial)


def set_aside(path: Path, why: str) -> Path | None:
    """Rename a committed checkpoint, if it exists, so that no run reads or prunes it; its content stays."""
    if not path.exists():
        return None
    free = (path.with_name(f"{path.name}.{why}" + (f"-{number}" if number else "")) for number in itertools.count())
    target = next(candidate for candidate in free if not candidate.exists())
    os.rename(path, target)
    return target
