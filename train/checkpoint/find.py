"""Checkpoints in their folder: believed only when their hashes hold, found and read. `keeping.py` removes them.

A checkpoint is a folder `step-00000100` with torch.distributed.checkpoint's shards, `state.json` (counters,
configuration) and `manifest.json` (the hash of every file). Until all of it is on disk the folder has another
name; train/checkpoint/save.py writes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from longcat.errors import ConfigError
from parallel.mesh import Topology
from parallel.reduce import all_gather_object, broadcast
from parallel.watchdog.spans import wait_span, work_span
from train.checkpoint.compatibility import TOKENIZER, differences, order_differences
from train.checkpoint.dcp_tensors import finish_load, loaded
from train.checkpoint.failures import describe, first_failure
from train.checkpoint.shards import ShardReader
from train.state import Counters, TrainState

NAME = re.compile(r"^step-([0-9]{8})\Z")  # of the whole name: a person's `backup-step-00000002` is none of ours
PARTIAL, REMOVED = ".partial", ".removed"
MANIFEST, STATE = "manifest.json", "state.json"
HASH, new_hash = "xxh3_128", xxhash.xxh3_128  # against accidents, at the speed of memory; not against forgers
BLOCK, AHEAD = 1 << 20, 1 << 24  # bytes hashed at a time; how far ahead of them the disk is asked for more


@dataclass(frozen=True)
class CheckpointStatus:
    """Whether a checkpoint is whole, and if not, why."""

    folder: Path
    step: int
    problem: str | None  # None = whole


def step_of(path: Path) -> int:
    """The step in a checkpoint's name; -1 where it has another one."""
    return int(match[1]) if (match := NAME.search(path.name)) else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if path.is_dir() and step_of(path) >= 0), key=step_of)


Check = Callable[[Path, dict[str, str]], list[str]]  # a folder, its files with their hashes → what is wrong with them


def problems(path: Path, files: dict[str, str]) -> list[str]:
    """What is wrong with files of a checkpoint (name → hash), in their order; nothing is if they are as written."""

    def look(name: str) -> str | None:
        try:
            wrong = file_hash(path / name) != files[name]
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return f"{name} does not have the hash of the manifest" if wrong else None

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets go of the interpreter
        return [problem for problem in pool.map(look, files) if problem]


def verify(path: Path, check: Check = problems) -> CheckpointStatus:
    """Check every file of a checkpoint against its manifest."""
    step = step_of(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text())
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
    return CheckpointStatus(path, step, found[0] if found else misnamed(path))


def misnamed(path: Path) -> str | None:
    """What is wrong where a checkpoint's name says another step than the one it holds."""
    if (step := step_of(path)) < 0:
        return None
    try:
        local_boxes = int(json.loads((path / STATE).read_text())["counters"]["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{STATE} does not say the step"
    return None if local_boxes == step else f"it holds step {local_boxes}, which is not the step of its name"


def check_name(target: Path, step: int) -> None:
    """Refuse a name by which a run would take what is written there for a checkpoint of another step."""
    if step_of(target) not in (-1, step):
        raise ConfigError(f"target={target} names another step; it would hold step {step}, so step-{step:08d}")


def find_together(folder: Path, resume: str, topology: Topology) -> tuple[Path | None, list[CheckpointStatus]]:
    """`find` by the first rank, with the hashing shared out to all ranks. A collective.

    Each rank hashes what it will most likely read, if as many ranks have written: its file is in memory then.

    Raises:
        ConfigError: on the first rank, as `find` does.
    """

    def share(path: Path, files: dict[str, str]) -> list[str]:
        mine = dict(list(files.items())[topology.rank :: topology.world_size])
        with work_span("verifying a checkpoint", slow=True):
            wrong = problems(path, mine)
        return [problem for part in all_gather_object(wrong) for problem in part]

    def ask(path: Path, files: dict[str, str]) -> list[str]:
        broadcast((path, files))
        return share(path, files)

    if topology.is_first:
        with work_span("looking for a checkpoint", slow=True):
            found = find(folder, resume, ask)
        return broadcast(found)  # type: ignore[no-any-return]
    while True:
        path, rest = broadcast(None)
        if not isinstance(rest, dict):  # the answer; files would be the next question
            return path, rest
        share(path, rest)


def last_valid(folder: Path, topology: Topology) -> str:
    """The newest whole checkpoint in words; looked up by the first rank, as any of them may be the one that speaks."""
    with work_span("looking for a whole checkpoint", slow=True):
        words = describe_last_valid(folder) if topology.is_first else ""
    return str(broadcast(words))


def describe_last_valid(folder: Path) -> str:
    path = newest_valid(folder)
    return "there is no checkpoint yet" if path is None else f"the last good checkpoint is {path}"


def newest_valid(folder: Path) -> Path | None:
    return next((path for path in reversed(list_checkpoints(folder)) if verify(path).problem is None), None)


def find(folder: Path, resume: str, check: Check = problems) -> tuple[Path | None, list[CheckpointStatus]]:
    """The checkpoint to start from by ``checkpoint.resume``, and the ones passed over with their problems.

    Another run's checkpoint is where a new run starts; once it has checkpoints of its own, the same command
    goes on from those.

    Raises:
        ConfigError: a named checkpoint is not whole, or a run has checkpoints of which none is.
    """
    if resume == "never":
        return None, []
    if resumes_elsewhere(folder, resume):
        return find_named(Path(resume), check=check), []
    passed_over: list[CheckpointStatus] = []
    for path in reversed(list_checkpoints(folder)):
        status = verify(path, check)
        if status.problem is None:
            return path, passed_over
        passed_over.append(status)
    if passed_over:
        problems = "; ".join(f"{status.folder.name}: {status.problem}" for status in passed_over)
        raise ConfigError(
            f"no checkpoint in {folder} is whole ({problems}); restore one, or start anew under another run.name"
        )
    return None, []


def resumes_elsewhere(folder: Path, resume: str) -> bool:
    """Whether a run starts from the folder that ``checkpoint.resume`` names, if it names one.

    It does not if the run has checkpoints of its own and the named one is none of those.

    Raises:
        ConfigError: there is no such folder.
    """
    if resume in ("auto", "never"):
        return False
    named = Path(resume)
    if not named.is_dir():
        raise ConfigError(f"checkpoint.resume={named} is no folder; use auto, never or a checkpoint's folder")
    # The folder of checkpoints may be a link to another disk
    return not list_checkpoints(folder) or any(is_inside(named, place) for place in (folder, folder.parent))


def find_named(path: Path, key: str = "checkpoint.resume", check: Check = problems) -> Path:
    """A checkpoint folder, or a run folder whose newest whole checkpoint is taken; ``key`` is who named it."""
    if (path / "checkpoints").is_dir():
        found, _ = find(path / "checkpoints", "auto", check)
        if found is None:
            raise ConfigError(f"{key}={path} is a run without checkpoints; name another")
        return found
    if not path.is_dir():
        raise ConfigError(f"{key}={path} is no folder; name a checkpoint's folder")
    status = verify(path, check)
    if status.problem:
        raise ConfigError(f"{key}={path} is not whole: {status.problem}; name another")
    return path


def load(
    state: TrainState, path: Path, configuration: dict[str, Any], from_start: bool = False, own: bool = True
) -> None:
    """Read a checkpoint into ``state``, in place, in whatever layout this run has.

    Args:
        from_start: as `data.from_start`.
        own: it is one of this run's own checkpoints, before which its data has been begun.

    Raises:
        ConfigError: the checkpoint is of another model or stands in other data; the differing fields are named. Or a
        rank could not read it.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        stored = json.loads((path / STATE).read_text())
    except OSError as error:
        raise ConfigError(
            f"checkpoint {path} could not be read: {describe(error)}; restore its files or name another"
        ) from error
    wrong = differences(stored["configuration"], configuration, ("model", "balance.method"))
    if wrong:
        raise ConfigError(f"checkpoint {path} is of another model: {'; '.join(wrong)}; set them alike")
    check_tokenizer(path, stored["configuration"], configuration)
    counters = asdict(Counters()) | stored["counters"]
    position = counters["samples"] - counters["data_start"]
    wrong = order_differences(stored["configuration"], configuration, position) if position else []
    if from_start and (wrong or not own):
        counters["data_start"] = counters["samples"]
    elif wrong:
        raise ConfigError(
            f"checkpoint {path} stands at sample {position} of other data: {'; '.join(wrong)}; set them alike, or "
            f"read this run's data from its first sample with data.from_start=true"
        )
    with work_span("reading the checkpoint", slow=True):
        tensors, boxes = loaded(state)
    try:
        with wait_span("plan of the checkpoint, or its reading on all ranks"):
            dcp.load(tensors, storage_reader=TracedReader(path))
    except CheckpointException as error:
        failed = first_failure({rank: describe(cause) for rank, (cause, _) in error.failures.items()})
        raise ConfigError(
            f"checkpoint {path} could not be read: {failed}; restore its files or name another"
        ) from error
    finish_load(state, boxes)
    for name, value in counters.items():
        setattr(state.counters, name, value)


def check_tokenizer(path: Path, stored: dict[str, Any], configuration: dict[str, Any]) -> None:
    """Raise ConfigError where a checkpoint's ids and those of the run's corpora are known to mean other text."""
    there, here = stored.get(TOKENIZER), configuration.get(TOKENIZER)
    if there and here and there != here:
        raise ConfigError(
            f"checkpoint {path} was made with the tokenizer of SHA-256 {there[:12]}… and data.paths="
            f"{configuration['data']['paths']} with that of {here[:12]}…, so ids mean other text; build the corpus "
            f"with the checkpoint's (longcat data build data.tokenizer=FILE) or name one that was"
        )


class TracedReader(ShardReader):
    """While it reads this rank works, and may take long."""

    def read_data(self, *args: Any, **keywords: Any) -> Any:
        with work_span("reading the checkpoint", slow=True):
            return super().read_data(*args, **keywords)


def is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def size(path: Path) -> int:
    """Bytes of a checkpoint's files; one that vanishes, or that the disk does not know any more, has none."""
    total = 0
    with contextlib.suppress(OSError):  # the run that goes on may remove it meanwhile
        for file in path.iterdir():
            with contextlib.suppress(OSError):
                total += file.stat().st_size
    return total


def file_hash(path: Path) -> str:
    """`HASH` of a file. The disk is asked for what comes next while a block is hashed."""
    digest, block, position = new_hash(), memoryview(bytearray(BLOCK)), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            position += count
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), position + AHEAD, BLOCK, os.POSIX_FADV_WILLNEED)
            digest.update(block[:count])
    return digest.hexdigest()
