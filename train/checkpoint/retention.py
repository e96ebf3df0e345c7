"""Which checkpoints of a run are kept, removed (old, half written) or renamed (damaged, past the resumed step)."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from longcat.errors import SaveError
from parallel.mesh import Topology
from parallel.watchdog.events import SpanKind
from train.checkpoint.failures import describe
from train.checkpoint.files import PARTIAL, is_locked, read_text
from train.checkpoint.find import find_together, newest_valid
from train.checkpoint.manifest import REMOVED, STATE, CheckpointStatus, list_checkpoints, set_aside, step_of
from train.checkpoint.thread_context import ThreadContext
from train.config import CheckpointConfig

SET_ASIDE = re.compile(
    r"step-(?P<step>\d+)\.(?P<why>damaged|abandoned|replaced)(?:-\d+)?"
)  # names that `set_aside` gives


@dataclass(frozen=True)
class Keep:
    """Which committed checkpoints are kept when another one has been committed."""

    newest: int = 0  # number of newest checkpoints; 0 = all
    every: int = 0  # also those whose step is a multiple of this; 0 = none
    best: int = 0  # also as many with the lowest validation loss

    @classmethod
    def of(cls, settings: CheckpointConfig) -> Keep:
        return cls(settings.keep, settings.keep_every, settings.keep_best)


def prune(folder: Path, keep: Keep, safe: Path | None = None) -> None:
    """Remove all committed checkpoints except ``safe`` and those that ``keep`` selects."""
    for path in to_delete(folder, keep):
        if path != safe:
            removed = path.with_name(f"{path.name}{REMOVED}")  # a half-removed one must not look committed
            os.rename(path, removed)
            shutil.rmtree(removed)


def prune_after_commit(folder: Path, keep: Keep, committed: Path) -> None:
    """`prune`, and the removal of renamed checkpoints that the run has gone past."""
    prune(folder, keep, committed)
    for path in superseded(folder, keep):
        removed = path.with_name(f"{path.name}{REMOVED}")
        os.rename(path, removed)
        shutil.rmtree(removed)


def superseded(folder: Path, keep: Keep) -> list[Path]:
    """Checkpoints that were renamed (damaged, abandoned, replaced) and lie before all of the newest ones that are kept.

    Left are those after, as a person may go back to one, and abandoned ones that ``keep`` would have kept for their
    step or might have kept for their validation loss. With ``keep.newest`` = 0, or before there are as many, all are.
    """
    newest = list_checkpoints(folder)[-keep.newest :]
    if not keep.newest or len(newest) < keep.newest:
        return []
    oldest = step_of(newest[0])
    return [
        path
        for path in sorted(folder.iterdir())
        if (match := SET_ASIDE.fullmatch(path.name))
        and int(match["step"]) < oldest
        and path.is_dir()
        and not path.is_symlink()
        and not (match["why"] == "abandoned" and _stands_out(path, int(match["step"]), keep))
    ]


def _stands_out(path: Path, step: int, keep: Keep) -> bool:
    """Whether ``keep`` selects a checkpoint for more than its age, or could, by its validation loss."""
    return bool(keep.every and step % keep.every == 0) or bool(keep.best and validation_loss(path) is not None)


def make_space(folder: Path, keep: Keep, topology: Topology, context: ThreadContext) -> None:
    """`prune` without a new checkpoint: the newest valid one stays, even if newer ones are damaged. A collective.

    Raises:
        SaveError: a checkpoint could not be looked at or removed.
    """
    try:  # if there is nothing to remove, nothing is hashed
        valid = find_together(
            lambda check: newest_valid(folder, check)[0] if to_delete(folder, keep) else None, topology, context
        )
    except OSError as error:
        raise SaveError(describe(error)) from error
    context.run_on_all_ranks(
        SpanKind.CHECKPOINT_MAKE_SPACE, lambda: prune(folder, keep, valid) if valid and topology.is_first else None
    )


def to_delete(folder: Path, keep: Keep) -> list[Path]:
    """The committed checkpoints that ``keep`` does not select."""
    committed = list_checkpoints(folder)
    kept = set(committed[-keep.newest :])
    if keep.every:
        kept |= {path for path in committed if step_of(path) % keep.every == 0}
    if keep.best:
        ranked = [(loss, -step_of(path), path) for path in committed if (loss := validation_loss(path)) is not None]
        kept |= {path for _, _, path in sorted(ranked)[: keep.best]}
    return [path for path in committed if path not in kept]


def validation_loss(path: Path) -> float | None:
    """The validation loss of a checkpoint's step, if that step was one with validation and it is finite."""
    try:
        found = json.loads(read_text(path / STATE)).get("val_loss")
    except (OSError, ValueError, AttributeError):
        return None
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None  # NaN sorts anywhere


def cleanup(folder: Path, resumed: Path | None, step: int, skipped: list[CheckpointStatus]) -> list[Path]:
    """Before a run's first step: leave only checkpoints that it continues from.

    Damaged ones, and those past the resumed step, are renamed (returned), so that keeping the newest never means
    keeping those. Folders that a dead process left half written or half removed are deleted; one that a running growth
    or import writes stays.

    Args:
        step: of ``resumed``, whose name need not say it: it may be one that was set aside, or a copy.
    """
    for path in folder.iterdir():
        leftover = path.name.endswith((PARTIAL, REMOVED)) and path.is_dir() and not path.is_symlink()
        if leftover and not is_locked(path):
            shutil.rmtree(path)
    renamed = [set_aside(status.folder, "damaged") for status in skipped]
    if resumed is not None and resumed.resolve().parent == folder.resolve():
        renamed += abandon_later(folder, step)
    return [path for path in renamed if path is not None]


def abandon_later(folder: Path, step: int) -> list[Path | None]:
    """Rename the checkpoints of later steps: the run goes on from ``step`` and will have others."""
    return [set_aside(path, "abandoned") for path in list_checkpoints(folder) if step_of(path) > step]
