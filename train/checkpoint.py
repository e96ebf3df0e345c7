"""Checkpoints: written beside, committed by renaming, believed only when their hashes hold.

A checkpoint is a folder `step-00000100` with torch.distributed.checkpoint's shards, `state.json` (counters,
configuration) and `manifest.json` (the hash of every file). Until all of it is on disk the folder has another
name.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from longcat.errors import ConfigError, UnhealthyError
from parallel.crumbs import crumb, phase
from parallel.mesh import Topology
from parallel.reduce import all_finite, from_first_rank
from train.identity import differences
from train.spread import finish_load, loaded, saved
from train.state import TrainState

NAME = re.compile(r"step-(\d{8})$")
PARTIAL, REMOVED = ".partial", ".removed"
MANIFEST, STATE = "manifest.json", "state.json"


@dataclass(frozen=True)
class Verdict:
    """Whether a checkpoint is whole, and if not, why."""

    folder: Path
    step: int
    problem: str | None  # None = whole


def save(state: TrainState, folder: Path, configuration: dict[str, Any], topology: Topology, keep: int) -> Path:
    """Write and commit `<folder>/step-…`, then remove all but the newest ``keep``. A collective of all ranks.

    Raises:
        UnhealthyError: a weight or a moment is not finite; nothing is written.
    """
    import torch.distributed.checkpoint as dcp

    if not all_finite(held.values for held in state.store.held()):
        raise UnhealthyError(
            f"step {state.counters.step}: a weight or a moment is not finite, so the state is not saved; "
            f"{last_good(folder, topology)}; lower optim.lr or look at the data"
        )
    target = folder / f"step-{state.counters.step:08d}"
    partial = folder / f"{target.name}{PARTIAL}"
    if topology.is_first:
        with phase("making the checkpoint's folder", slow=True):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    with crumb("the checkpoint's folder"):
        dist.barrier()
    with phase("gathering what the checkpoint holds", slow=True):
        tensors = saved(state)
    with crumb("plan of the checkpoint, or its end on all ranks"):
        dcp.save(tensors, storage_writer=shard_writer(partial))
    with phase("hashing the checkpoint", slow=True):
        own = {path.name: file_hash(path) for path in partial.glob(f"__{topology.rank}_*.distcp")}
    gathered: list[dict[str, str] | None] = [None] * topology.world_size
    with crumb("hashes of the checkpoint"):
        dist.all_gather_object(gathered, own)
    if topology.is_first:
        text = {"counters": asdict(state.counters), "configuration": configuration}
        files = {name: value for part in gathered if part for name, value in part.items()}
        with phase("committing the checkpoint", slow=True):
            commit(partial, target, json.dumps(text), files)
            prune(folder, keep)
    with crumb("the checkpoint's commit"):
        dist.barrier()
    return target


def shard_writer(folder: Path) -> Any:
    """Torch's writer of shards; while it writes this rank works, and may take long."""
    from torch.distributed.checkpoint import FileSystemWriter

    class Writer(FileSystemWriter):
        def write_data(self, *args: Any, **keywords: Any) -> Any:
            with phase("writing the checkpoint", slow=True):
                return super().write_data(*args, **keywords)

        def finish(self, *args: Any, **keywords: Any) -> None:
            with phase("writing the checkpoint's index", slow=True):
                super().finish(*args, **keywords)

    return Writer(folder)


def commit(partial: Path, target: Path, text: str, files: dict[str, str]) -> None:
    """Write the state and the manifest of ``files`` (name → hash) beside the shards, and give the folder its name."""
    write_synced(partial / STATE, text)
    for name in (STATE, ".metadata"):
        files[name] = file_hash(partial / name)
    write_synced(partial / MANIFEST, json.dumps({"files": files}, indent=1))
    sync_folder(partial)
    set_aside(target, "replaced")
    os.rename(partial, target)
    sync_folder(target.parent)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` committed checkpoints (0 = keep all)."""
    committed = list_checkpoints(folder)
    for path in committed[: max(0, len(committed) - keep)] if keep else []:
        doomed = path.with_name(f"{path.name}{REMOVED}")  # half of a removed one must not look committed
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def set_aside(path: Path, why: str) -> Path | None:
    """Give a committed checkpoint, if it is there, a name that no run reads or prunes; what is in it stays."""
    if not path.exists():
        return None
    free = (path.with_name(f"{path.name}.{why}" + (f"-{number}" if number else "")) for number in itertools.count())
    target = next(candidate for candidate in free if not candidate.exists())
    os.rename(path, target)
    return target


def tidy(folder: Path, resumed: Path | None, passed_over: list[Verdict]) -> list[Path]:
    """Before a run's first step: leave only checkpoints that it continues from.

    Damaged ones, and those past the step that it goes back to, are set aside (returned), so that keeping the newest
    never means keeping those. What a dead run left half written or half removed goes.
    """
    for path in folder.iterdir():
        if path.name.endswith((PARTIAL, REMOVED)):
            shutil.rmtree(path)
    aside = [set_aside(verdict.folder, "damaged") for verdict in passed_over]
    if resumed is not None and resumed.resolve().parent == folder.resolve():
        later = [path for path in list_checkpoints(folder) if path.name > resumed.name]
        aside += [set_aside(path, "abandoned") for path in later]
    return [path for path in aside if path is not None]


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and NAME.search(path.name))


def verify(path: Path) -> Verdict:
    """Check every file of a checkpoint against its manifest."""
    step = int(match[1]) if (match := NAME.search(path.name)) else -1
    try:
        files = dict(json.loads((path / MANIFEST).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return Verdict(path, step, f"no readable {MANIFEST}")
    for name, expected in files.items():
        if not (path / name).is_file():
            return Verdict(path, step, f"{name} is missing")
        if file_hash(path / name) != expected:
            return Verdict(path, step, f"{name} does not have the hash of the manifest")
    return Verdict(path, step, None)


def last_good(folder: Path, topology: Topology) -> str:
    """The newest whole checkpoint in words; looked up by the first rank, as any of them may be the one that speaks."""
    words = "there is no checkpoint yet"
    with phase("looking for a whole checkpoint", slow=True):
        for path in reversed(list_checkpoints(folder) if topology.is_first else []):
            if verify(path).problem is None:
                words = f"the last good checkpoint is {path}"
                break
    return str(from_first_rank(words))


def find(folder: Path, resume: str) -> tuple[Path | None, list[Verdict]]:
    """The checkpoint to start from by ``checkpoint.resume``, and the ones passed over with their problems.

    Another run's checkpoint is where a new run starts; once it has checkpoints of its own, the same command
    goes on from those.

    Raises:
        ConfigError: a named checkpoint is not whole, or a run has checkpoints of which none is.
    """
    if resume == "never":
        return None, []
    if resume != "auto" and (not list_checkpoints(folder) or is_inside(Path(resume), folder.parent)):
        return find_named(Path(resume)), []
    passed_over: list[Verdict] = []
    for path in reversed(list_checkpoints(folder)):
        verdict = verify(path)
        if verdict.problem is None:
            return path, passed_over
        passed_over.append(verdict)
    if passed_over:
        problems = "; ".join(f"{verdict.folder.name}: {verdict.problem}" for verdict in passed_over)
        raise ConfigError(
            f"no checkpoint in {folder} is whole ({problems}); restore one, or start anew under another run.name"
        )
    return None, []


def find_named(path: Path, key: str = "checkpoint.resume") -> Path:
    """A checkpoint folder, or a run folder whose newest whole checkpoint is taken; ``key`` is who named it."""
    if (path / "checkpoints").is_dir():
        found, _ = find(path / "checkpoints", "auto")
        if found is None:
            raise ConfigError(f"{key}={path} is a run without checkpoints; name another")
        return found
    if not path.is_dir():
        choices = "use auto, never or" if key == "checkpoint.resume" else "name"
        raise ConfigError(f"{key}={path} is no folder; {choices} a checkpoint's folder")
    verdict = verify(path)
    if verdict.problem:
        raise ConfigError(f"{key}={path} is not whole: {verdict.problem}; name another")
    return path


def load(state: TrainState, path: Path, configuration: dict[str, Any]) -> None:
    """Read a checkpoint into ``state``, in place, in whatever layout this run has.

    Raises:
        ConfigError: the checkpoint is of another model; the differing fields are named.
    """
    import torch.distributed.checkpoint as dcp

    stored = json.loads((path / STATE).read_text())
    wrong = differences(stored["configuration"], configuration, ("model", "balance.method"))
    if wrong:
        raise ConfigError(f"checkpoint {path} is of another model: {'; '.join(wrong)}; set them alike")
    with phase("reading the checkpoint", slow=True):
        tensors, boxes = loaded(state)
    with crumb("plan of the checkpoint, or its reading on all ranks"):
        dcp.load(tensors, storage_reader=shard_reader(path))
    finish_load(state, boxes)
    for name, value in stored["counters"].items():
        setattr(state.counters, name, value)


def shard_reader(folder: Path) -> Any:
    """Torch's reader of shards; while it reads this rank works, and may take long."""
    from torch.distributed.checkpoint import FileSystemReader

    class Reader(FileSystemReader):
        def read_data(self, *args: Any, **keywords: Any) -> Any:
            with phase("reading the checkpoint", slow=True):
                return super().read_data(*args, **keywords)

    return Reader(folder)


def is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make a rename in ``path`` last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
