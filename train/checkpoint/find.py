"""Which checkpoint a run, an export or a growth starts from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from longcat.errors import ConfigError, LongCatError
from parallel.mesh import Topology
from parallel.reduce import broadcast
from parallel.watchdog.events import SpanKind
from train.checkpoint.manifest import Check, CheckpointStatus, list_checkpoints, problems, verify
from train.checkpoint.thread_context import ThreadContext

Found = TypeVar("Found")


def find_together(find: Callable[[Check], Found], topology: Topology, context: ThreadContext | None = None) -> Found:
    """``find`` on the first rank, which passes its argument on to `verify`: all ranks divide the hashing. A collective.

    Each rank hashes the files that it will probably read, if as many ranks wrote them: they are then cached in memory.

    Args:
        context: of the thread that calls this; None = the main one.

    Raises:
        LongCatError, OSError: what ``find`` raises, on all ranks.
    """
    context = context or ThreadContext()

    def check_share(path: Path, files: dict[str, str]) -> list[str]:
        share = dict(list(files.items())[topology.rank :: topology.world_size])
        with context.works(SpanKind.CHECKPOINT_VERIFY):
            found = problems(path, share)
        return [problem for part in context.all_gather_object(found) for problem in part]

    def check(path: Path, files: dict[str, str]) -> list[str]:
        context.broadcast(("check", path, files))
        return check_share(path, files)

    if topology.is_first:
        result, failure = None, None
        try:
            with context.works(SpanKind.CHECKPOINT_FIND):
                result = find(check)
        except (LongCatError, OSError) as error:
            failure = error
        context.broadcast(("found", result, failure))
    else:
        while (message := context.broadcast(None))[0] == "check":
            check_share(*message[1:])
        _, result, failure = message
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def find_on_all_ranks(folder: Path, resume: str, topology: Topology) -> tuple[Path | None, list[CheckpointStatus]]:
    """`find_start`, with the hashing divided among all ranks. A collective; raises what that raises."""
    return find_together(lambda check: find_start(folder, resume, check), topology)


def find_start(folder: Path, resume: str, check: Check = problems) -> tuple[Path | None, list[CheckpointStatus]]:
    """The checkpoint that ``checkpoint.resume`` selects, and the run's own invalid ones that were skipped.

    Another run's checkpoint is where a new run starts; once the run has checkpoints of its own, the same command
    resumes from those.

    Raises:
        ConfigError: the selected checkpoint is not valid, or none of the run's checkpoints is.
    """
    if resume == "never":
        return None, []
    if resumes_elsewhere(folder, resume):
        return find_valid(Path(resume), "checkpoint.resume", check)[0], []
    path, skipped = newest_valid(folder, check)
    if path is None and skipped:
        raise ConfigError(
            f"no checkpoint in {folder} is valid ({list_problems(skipped)}); restore one, or start again under "
            f"another run.name"
        )
    return path, skipped


def resumes_elsewhere(folder: Path, resume: str) -> bool:
    """Whether a run starts from the folder in ``checkpoint.resume``.

    It does unless the run has checkpoints of its own and that folder is none of them.

    Raises:
        ConfigError: the folder does not exist.
    """
    if resume in ("auto", "never"):
        return False
    path = Path(resume)
    if not path.is_dir():
        raise ConfigError(f"checkpoint.resume={path} is no folder; use auto, never or a checkpoint's folder")
    # The checkpoints folder may be a link to another disk
    return not list_checkpoints(folder) or any(is_inside(path, parent) for parent in (folder, folder.parent))


def find_valid(path: Path, key: str = "source", check: Check = problems) -> tuple[Path, list[CheckpointStatus]]:
    """A checkpoint, or the newest valid one of a run folder; and the newer ones that were skipped.

    Args:
        key: the option that names ``path``, for messages.

    Raises:
        ConfigError: there is none, or it is not valid.
    """
    if not path.is_dir():
        raise ConfigError(f"{key}={path} is no folder; name a checkpoint's or a run's folder")
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if folder == path and not list_checkpoints(folder):
        status = verify(path, check)
        if status.problem and (path / "config.yaml").is_file():
            raise ConfigError(f"{key}={path} is a run without checkpoints; name another")
        if status.problem:
            raise ConfigError(f"{key}={path} is not a valid checkpoint: {status.problem}; name another")
        return path, []
    found, skipped = newest_valid(folder, check)
    if found is None and skipped:
        raise ConfigError(
            f"{key}={path}: no checkpoint in {folder} is valid ({list_problems(skipped)}); restore one or name another"
        )
    if found is None:
        raise ConfigError(f"{key}={path} is a run without checkpoints; name another")
    return found, skipped


def newest_valid(folder: Path, check: Check = problems) -> tuple[Path | None, list[CheckpointStatus]]:
    """The newest valid checkpoint in ``folder``, and the newer invalid ones."""
    skipped: list[CheckpointStatus] = []
    for path in reversed(list_checkpoints(folder)):
        status = verify(path, check)
        if status.problem is None:
            return path, skipped
        skipped.append(status)
    return None, skipped


def list_problems(skipped: list[CheckpointStatus]) -> str:
    return "; ".join(f"{status.folder.name}: {status.problem}" for status in skipped)


class LastCheckpoint(NamedTuple):
    """What messages say of the newest checkpoint."""

    path: Path | None
    phrase: str


def newest_committed(folder: Path) -> LastCheckpoint:
    """The newest checkpoint in ``folder``, without hashing: a start has renamed those that were not valid then.

    Raises nothing: the message that names it is of something else, and other ranks wait for it.
    """
    try:
        path = next(reversed(list_checkpoints(folder)), None)
    except OSError as error:
        return LastCheckpoint(None, f"{folder} cannot be read ({error.strerror})")
    return LastCheckpoint(path, "there is no checkpoint yet" if path is None else f"the last checkpoint is {path}")


def last_committed(folder: Path, topology: Topology) -> LastCheckpoint:
    """`newest_committed`, found by the first rank for all: any of them may report it."""
    last: LastCheckpoint = broadcast(newest_committed(folder) if topology.is_first else None)
    return last


def is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
