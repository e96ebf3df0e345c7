"""Which checkpoints of a run stay, and what goes: what is older, half written, damaged or past the resumed step."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from train.checkpoint.find import PARTIAL, REMOVED, STATE, CheckpointStatus, list_checkpoints, newest_valid, step_of


@dataclass(frozen=True)
class Keep:
    """Which committed checkpoints stay when another one has been committed."""

    newest: int = 0  # 0 = all
    every: int = 0  # those of every so many steps stay for good; 0 = none does
    best: int = 0  # so many with the lowest validation loss


def prune(folder: Path, keep: Keep, safe: Path | None = None) -> None:
    """Remove all committed checkpoints but ``safe`` and those that ``keep`` names."""
    for path in to_delete(folder, keep):
        if path != safe:
            removed = path.with_name(f"{path.name}{REMOVED}")  # half of a removed one must not look committed
            os.rename(path, removed)
            shutil.rmtree(removed)


def make_space(folder: Path, keep: Keep) -> None:
    """`prune` without a new checkpoint: the newest whole one stays, whatever its place among the newest is."""
    if to_delete(folder, keep):  # else nothing need be hashed
        whole = newest_valid(folder)
        if whole is not None:
            prune(folder, keep, whole)


def to_delete(folder: Path, keep: Keep) -> list[Path]:
    """The committed checkpoints that ``keep`` does not name."""
    committed = list_checkpoints(folder)
    stay = set(committed[-keep.newest :])
    if keep.every:
        stay |= {path for path in committed if step_of(path) % keep.every == 0}
    if keep.best:
        judged = [(loss, -step_of(path), path) for path in committed if (loss := validation_loss(path)) is not None]
        stay |= {path for _, _, path in sorted(judged)[: keep.best]}
    return [path for path in committed if path not in stay]


def validation_loss(path: Path) -> float | None:
    """The validation loss of a checkpoint's step, if that step was one with validation and it is finite."""
    try:
        found = json.loads((path / STATE).read_text()).get("val_loss")
    except (OSError, ValueError, AttributeError):
        return None
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None  # NaN sorts anywhere


def set_aside(path: Path, why: str) -> Path | None:
    """Give a committed checkpoint, if it is there, a name that no run reads or prunes; what is in it stays."""
    if not path.exists():
        return None
    free = (path.with_name(f"{path.name}.{why}" + (f"-{number}" if number else "")) for number in itertools.count())
    target = next(candidate for candidate in free if not candidate.exists())
    os.rename(path, target)
    return target


def cleanup(folder: Path, resumed: Path | None, passed_over: list[CheckpointStatus]) -> list[Path]:
    """Before a run's first step: leave only checkpoints that it continues from.

    Damaged ones, and those past the step that it goes back to, are set aside (returned), so that keeping the newest
    never means keeping those. What a dead run left half written or half removed goes; what a growth or an import that
    still goes writes here stays.
    """
    for path in folder.iterdir():
        ours = path.name.endswith((PARTIAL, REMOVED)) and path.is_dir() and not path.is_symlink()
        if ours and not is_locked(path):
            shutil.rmtree(path)
    aside = [set_aside(status.folder, "damaged") for status in passed_over]
    if resumed is not None and resumed.resolve().parent == folder.resolve():
        later = [path for path in list_checkpoints(folder) if path.name > resumed.name]
        aside += [set_aside(path, "abandoned") for path in later]
    return [path for path in aside if path is not None]


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Let others see that this process writes in ``folder``, for as long as it does; nothing is left of that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems know no locks: there it is taken for a dead run's
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def is_locked(folder: Path) -> bool:
    """Whether a process that still lives writes in ``folder`` and has said so by `lock_folder`."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
