"""How a checkpoint is written: shards beside, hashed on the way, then committed by renaming. A collective of all ranks.

The same statements run in two places: in the main thread, which waits for them, and in a thread beside training, whose
collectives have a process group of their own and leave no crumbs (those are the main thread's) until training waits
for it.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longcat.errors import SaveError, UnhealthyError
from parallel.mesh import Topology
from parallel.watchdog.spans import wait_span, work_span
from train.checkpoint.dcp_tensors import Take, box_values, saved
from train.checkpoint.failures import describe, first_failure
from train.checkpoint.find import HASH, MANIFEST, PARTIAL, STATE, describe_last_valid, file_hash, new_hash
from train.checkpoint.retention import Keep, make_space, prune, set_aside
from train.state import TrainState

SYNCED_ALONGSIDE = 1 << 26  # bytes after which a second thread sends them to the disk
SPARE_BYTES = 1 << 20  # a rank's file has more than its tensors: an index and some text


@dataclass(frozen=True)
class Snapshot:
    """What one rank gives to a checkpoint."""

    step: int
    tensors: dict[str, Tensor]
    num_bytes: int  # that this rank writes
    text: str  # of state.json

    @classmethod
    def of(
        cls,
        state: TrainState,
        configuration: dict[str, Any],
        topology: Topology,
        val_loss: float | None = None,
        take: Take | None = None,
    ) -> Snapshot:
        """The present state; with ``take`` in copies."""
        tensors = saved(state, take)
        spread = sum(values.nbytes for values in box_values(tensors)) if state.store.counts_here else 0
        text = {"counters": asdict(state.counters), "configuration": configuration, "val_loss": val_loss}
        return cls(state.counters.step, tensors, spread, json.dumps(text))


class SaveContext:
    """Where writing happens, and how its parts are agreed on between ranks."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """With a ``group`` beside training; without one in the main thread, on training's."""
        self.group = group
        self.doing: tuple[tuple[str, bool], ...] = ()  # beside training: what, and whether it waits for other ranks

    def waits(self, what: str) -> AbstractContextManager[Any]:
        return wait_span(what) if self.group is None else self._note(what, True)

    def works(self, what: str) -> AbstractContextManager[Any]:
        return work_span(what, slow=True) if self.group is None else self._note(what, False)

    @contextmanager
    def _note(self, what: str, waits: bool) -> Iterator[None]:
        outer = self.doing
        self.doing = (*outer, (what, waits))
        try:
            yield
        finally:
            self.doing = outer

    def wait_for(self, thread: threading.Thread) -> None:
        """Called by the main thread: until ``thread``, which writes here, has ended, its crumbs are the caller's."""
        while thread.is_alive():
            with ExitStack() as crumbs:
                doing = self.doing
                for what, waits in doing:
                    crumbs.enter_context(wait_span(what) if waits else work_span(what, slow=True))
                while thread.is_alive() and self.doing is doing:
                    thread.join(0.01)

    def all(self, what: str, action: Callable[[], Any]) -> list[Any]:
        """Every rank's result of its ``action``; where one of them fails, all ranks raise SaveError."""
        failure = None
        with self.works(what):
            try:
                mine = action()
            except Exception as error:
                mine, failure = None, describe(error)
        found: list[Any] = [None] * dist.get_world_size()
        with self.waits(f"end of {what}"):
            dist.all_gather_object(found, (mine, failure), group=self.group)
        failed = {rank: failure for rank, (_, failure) in enumerate(found) if failure}
        if failed:
            raise SaveError(first_failure(failed))
        return [result for result, _ in found]


def save(
    state: TrainState, folder: Path, configuration: dict[str, Any], topology: Topology, keep: Keep | None = None
) -> Path:
    """Write and commit the present state, and wait for it; raises what `write` raises."""
    return write(Snapshot.of(state, configuration, topology), folder, topology, keep or Keep(), SaveContext())


def write(snapshot: Snapshot, folder: Path, topology: Topology, keep: Keep, context: SaveContext) -> Path:
    """Write and commit `<folder>/step-…`, then remove what ``keep`` does not name.

    Raises:
        UnhealthyError: a weight or a moment is not finite; nothing is written.
        SaveError: it could not be written, or there is too little room; what had been written of it is removed.
    """
    check_finite(snapshot, folder, topology, context)
    target = folder / f"step-{snapshot.step:08d}"
    partial = folder / f"{target.name}{PARTIAL}"
    first = topology.is_first
    try:
        if missing_space(snapshot, folder, context):  # checkpoint.keep may have been lowered to make some
            context.all("making room", lambda: make_space(folder, keep) if first else None)
            if lack := missing_space(snapshot, folder, context):
                raise SaveError(lack)
        context.all("making the checkpoint's folder", lambda: recreate(partial) if first else None)
        hashes = write_shards(snapshot, partial, context)
        files = {
            name: value
            for part in context.all("hashing the checkpoint", lambda: hashes)
            for name, value in part.items()
        }
        context.all(
            "committing the checkpoint", lambda: commit(partial, target, snapshot.text, files) if first else None
        )
    except SaveError as error:  # no rank writes any more
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise SaveError(f"the checkpoint of step {snapshot.step} is not saved: {error}") from error
    try:
        context.all("pruning checkpoints", lambda: prune(folder, keep, target) if first else None)
    except SaveError as error:
        raise SaveError(f"{target} is saved, but older ones could not be removed: {error}", is_saved=True) from error
    return target


def check_finite(snapshot: Snapshot, folder: Path, topology: Topology, context: SaveContext) -> None:
    def look() -> bool:
        return all(is_finite(values) for values in box_values(snapshot.tensors))

    if all(context.all("looking for what is not finite", look)):
        return
    words = context.all(
        "looking for a whole checkpoint", lambda: describe_last_valid(folder) if topology.is_first else ""
    )
    raise UnhealthyError(
        f"step {snapshot.step}: a weight or a moment is not finite, so the state is not saved; "
        f"{words[0]}; lower optim.lr or look at the data"
    )


def is_finite(values: Tensor) -> bool:
    """Whether all of at least one value are. A NaN becomes least and largest; both cost a tenth of a norm."""
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(values))


def missing_space(snapshot: Snapshot, folder: Path, context: SaveContext) -> str:
    """What to say where the file system has less room than the checkpoint takes, better than half of one; else ""."""

    def look() -> tuple[int, int]:
        folder.mkdir(parents=True, exist_ok=True)
        return snapshot.num_bytes + SPARE_BYTES, shutil.disk_usage(folder).free

    found = context.all("looking for room", look)
    needed, free = sum(bytes_here for bytes_here, _ in found), found[0][1]
    if needed <= free:
        return ""
    advice = "make room, lower checkpoint.keep or move run.dir"
    return f"it takes {in_mib(needed)} and {folder} has {in_mib(free)} left; {advice}"


def in_mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def recreate(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def write_shards(snapshot: Snapshot, partial: Path, context: SaveContext) -> dict[str, str]:
    """This rank's files with their hashes."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    hashes: dict[str, str] = {}
    try:
        with context.waits("plan of the checkpoint, or its end on all ranks"):
            dcp.save(
                snapshot.tensors, storage_writer=shard_writer(partial, hashes, context), process_group=context.group
            )
    except CheckpointException as error:
        raise SaveError(
            first_failure({rank: describe(cause) for rank, (cause, _) in error.failures.items()})
        ) from error
    return {name: value for name, value in hashes.items() if name.endswith(".distcp")}


class HashedFile(io.IOBase):
    """A file being written whose hash is known when it is closed."""

    def __init__(self, file: Any, pool: ThreadPoolExecutor) -> None:
        self.file, self.pool, self.digest = file, pool, new_hash()
        self.unsynced = 0
        self.syncing: Future[Any] = pool.submit(int)
        self.failure: OSError | None = None  # the first one: torch's writer puts a riddle of its own in its place

    def write(self, data: Any) -> int:
        self.digest.update(data)
        try:
            count = int(self.file.write(data))
        except OSError as error:
            self.failure = self.failure or error
            raise
        self.unsynced += count
        if self.unsynced >= SYNCED_ALONGSIDE and self.syncing.done():  # the disk works while the next part is made
            self.syncing.result()  # an error of the disk is told once
            self.unsynced, self.syncing = 0, self.pool.submit(os.fdatasync, self.file.fileno())
        return count

    def tell(self) -> int:
        return int(self.file.tell())

    def flush(self) -> None:
        if not self.file.closed:
            self.file.flush()

    def fileno(self) -> int:
        return int(self.file.fileno())


def shard_writer(folder: Path, hashes: dict[str, str], context: SaveContext) -> Any:
    """Torch's writer of shards, which puts each file's hash into ``hashes`` while it writes it.

    The check sums of torch's own format are left out: they cost ten times what writing does, and guard nothing that
    the hashes do not.
    """
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint.filesystem import FileSystem

    class Hashing(FileSystem):
        @contextmanager
        def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
            with Path(path).open(mode) as file, ThreadPoolExecutor(1) as pool:
                stream = HashedFile(file, pool)
                try:
                    yield stream
                except Exception:
                    if stream.failure is None:
                        raise
                    raise stream.failure from None
                stream.syncing.result()
            hashes[Path(path).name] = stream.digest.hexdigest()

    class Writer(FileSystemWriter):
        def write_data(self, *args: Any, **keywords: Any) -> Any:
            torch.serialization.set_crc32_options(False)
            with context.works("writing the checkpoint"):
                return super().write_data(*args, **keywords)

        def finish(self, *args: Any, **keywords: Any) -> None:
            with context.works("writing the checkpoint's index"):
                super().finish(*args, **keywords)

    writer = Writer(folder)
    writer.fs = Hashing()
    return writer


def commit(partial: Path, target: Path, text: str, files: dict[str, str]) -> None:
    """Write the state and the manifest of ``files`` (name → hash) beside the shards, and give the folder its name."""
    write_synced(partial / STATE, text)
    for name in (STATE, ".metadata"):
        files[name] = file_hash(partial / name)
    write_synced(partial / MANIFEST, json.dumps({"hash": HASH, "files": files}, indent=1))
    sync_folder(partial)
    set_aside(target, "replaced")
    os.rename(partial, target)
    sync_folder(target.parent)


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
