"""Writes a checkpoint: each rank writes and hashes its shard, then the first rank commits by renaming.

The same code runs in the main thread, blocking, or in a background thread. The thread's collectives have their own
process group, and its spans appear on the main thread's stack only while that waits for the thread.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longcat.errors import CorruptionError, SaveError, UnhealthyError
from longcat.faults import Place, is_active, passed
from longcat.json_text import dumps
from parallel.memory import mib
from parallel.mesh import Topology
from parallel.sdc.finding import Finding, Site, layer_of
from parallel.sdc.inject import damage_file
from parallel.watchdog.events import Event, SpanKind
from train.checkpoint.dcp_tensors import Take, box_values, saved, values_here
from train.checkpoint.files import PARTIAL, HashedFile
from train.checkpoint.find import newest_committed
from train.checkpoint.index import Entries, Placement, entries, gather, items_to_write, write_index
from train.checkpoint.manifest import commit
from train.checkpoint.retention import Keep, make_space, prune_after_commit
from train.checkpoint.thread_context import ThreadContext
from train.new_run import new_run
from train.sdc.at_rest import Checksums, changed_in_snapshot, snapshot_boxes
from train.state import TrainState

SPARE_BYTES = 1 << 20  # per rank, for the rest of its file: an index and some text


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of a checkpoint."""

    step: int
    tensors: dict[str, Tensor]
    num_bytes: int  # that this rank writes
    text: str  # of state.json
    placement: Placement
    expected: Checksums | None = None  # of the tensors since the last update; None where none were taken

    @classmethod
    def of(
        cls,
        state: TrainState,
        configuration: dict[str, Any],
        topology: Topology,
        val_loss: float | None = None,
        take: Take | None = None,
    ) -> Snapshot:
        """The present state; with ``take``, copies of it."""
        tensors = saved(state, take)
        num_bytes = sum(values.nbytes for values in box_values(tensors)) if state.store.counts_here else 0
        text = {
            "counters": asdict(state.counters),
            "health": state.health.as_json(),
            "configuration": configuration,
            "val_loss": val_loss,
        }
        placement = Placement.of(topology, state.store.has_replicas)
        return cls(state.counters.step, tensors, num_bytes, dumps(text), placement, state.checksums)


def save(
    state: TrainState,
    folder: Path,
    configuration: dict[str, Any],
    topology: Topology,
    keep: Keep | None = None,
    val_loss: float | None = None,
) -> Path:
    """Write and commit the present state in the main thread; raises what `write` raises."""
    snapshot = Snapshot.of(state, configuration, topology, val_loss)
    return write(snapshot, folder, topology, keep or Keep(), ThreadContext())


def write(snapshot: Snapshot, folder: Path, topology: Topology, keep: Keep, context: ThreadContext) -> Path:
    """Write and commit `<folder>/step-…`, then remove the checkpoints that ``keep`` does not select.

    Raises:
        UnhealthyError: a weight, a moment or a bias is not finite; nothing is written.
        CorruptionError: what was written is not what the last update left in memory; nothing is committed.
        SaveError: it could not be written, or the disk has too little space; the incomplete folder is removed.
    """
    if is_active():
        for (name, _), values in snapshot_boxes(snapshot.tensors):
            passed(Place.snapshot, name, values)
    check_finite(snapshot, folder, topology, context)
    target = folder / f"step-{snapshot.step:08d}"
    partial = folder / f"{target.name}{PARTIAL}"
    first = topology.is_first
    try:
        if missing_space(snapshot, folder, context):  # checkpoint.keep may have been lowered to make space
            make_space(folder, keep, topology, context)
            if lack := missing_space(snapshot, folder, context):
                raise SaveError(lack, is_disk_full=True)
        context.run_on_all_ranks(SpanKind.CHECKPOINT_FOLDER, lambda: recreate(partial) if first else None)
        hashes = write_shards(snapshot, partial, context)
        check_unchanged(snapshot, topology, context)
        files = {
            name: value
            for part in context.run_on_all_ranks(SpanKind.CHECKPOINT_HASH, lambda: hashes)
            for name, value in part.items()
        }
        context.run_on_all_ranks(
            SpanKind.CHECKPOINT_COMMIT, lambda: commit(partial, target, snapshot.text, files) if first else None
        )
    except CorruptionError:  # on all ranks
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    except SaveError as error:  # all ranks have stopped writing
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        text = f"the checkpoint of step {snapshot.step} is not saved: {error}"
        raise SaveError(text, is_disk_full=error.is_disk_full) from error
    try:
        context.run_on_all_ranks(
            SpanKind.CHECKPOINT_PRUNE, lambda: prune_after_commit(folder, keep, target) if first else None
        )
    except SaveError as error:
        raise SaveError(f"{target} is saved, but older ones could not be removed: {error}", is_saved=True) from error
    return target


def check_finite(snapshot: Snapshot, folder: Path, topology: Topology, context: ThreadContext) -> None:
    def look() -> bool:
        return all(map(is_finite, values_here(snapshot.tensors)))

    if all(context.run_on_all_ranks(SpanKind.CHECKPOINT_FINITE, look)):
        return
    last = context.broadcast(newest_committed(folder) if topology.is_first else None)
    raise UnhealthyError(
        f"step {snapshot.step}: a weight, a moment or a bias is not finite, so the state is not saved; "
        f"{last.phrase}; look at the data, or {new_run('a lower optim.lr', 'optim.lr', checkpoint=last.path)}"
    )


def check_unchanged(snapshot: Snapshot, topology: Topology, context: ThreadContext) -> None:
    """After writing: the tensors in memory still have the checksums that were taken right after the update.

    They were taken before the tensors were copied for the checkpoint, so no change since then is missed.

    Raises:
        CorruptionError: on all ranks.
    """

    def look() -> tuple[Site, list[str]]:
        site = Site.here(topology.rank, topology.device)
        return site, [] if snapshot.expected is None else changed_in_snapshot(snapshot.expected, snapshot.tensors)

    found = context.run_on_all_ranks(SpanKind.CHECKPOINT_VERIFY, look)
    wrong = [(site, names) for site, names in found if names]
    if wrong:
        name = wrong[0][1][0]
        ranks = tuple(site.rank for site, _ in wrong)
        detail = "changed between the last update and the end of writing the checkpoint, which is discarded"
        finding = Finding("checkpoint", snapshot.step, name, ranks, layer_of(name), tensor=name, detail=detail)
        raise finding.error([site for site, _ in found])


def is_finite(values: Tensor) -> bool:
    """Whether all of at least one value are finite. aminmax passes a NaN on, and costs a tenth of a norm."""
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(values))


def missing_space(snapshot: Snapshot, folder: Path, context: ThreadContext) -> str:
    """A message if the file system has less space than the checkpoint takes; else "". Checked before writing."""

    def look() -> tuple[int, int]:
        folder.mkdir(parents=True, exist_ok=True)
        return snapshot.num_bytes + SPARE_BYTES, shutil.disk_usage(folder).free

    found = context.run_on_all_ranks(SpanKind.CHECKPOINT_SPACE, look)
    needed, free = sum(bytes_here for bytes_here, _ in found), found[0][1]
    if needed <= free:
        return ""
    advice = "free some, lower checkpoint.keep or move run.dir"
    return f"it takes {mib(needed)} and {folder} has {mib(free)} left; {advice}"


def recreate(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def write_shards(snapshot: Snapshot, partial: Path, context: ThreadContext) -> dict[str, str]:
    """Write this rank's files, and on the first rank the index of all ranks'; returns name → hash of this rank's."""
    from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan

    hashes: dict[str, str] = {}
    own: Entries = {}
    writer, planner = shard_writer(partial, hashes), DefaultSavePlanner(flatten_state_dict=False)

    def write_own() -> None:
        items = items_to_write(snapshot.tensors, snapshot.placement)
        planner.set_up_planner(snapshot.tensors)
        writer.set_up_storage_writer(False, rank=dist.get_rank(), use_collectives=False)  # the index is ours
        plan = writer.prepare_local_plan(SavePlan(items))
        own.update(entries(snapshot.tensors, items, writer.write_data(plan, planner).value()))

    context.run_on_all_ranks(SpanKind.CHECKPOINT_WRITE, write_own)
    with context.waits(Event(SpanKind.CHECKPOINT_GATHER)):
        parts = gather(own, context.group)
    context.run_on_all_ranks(SpanKind.CHECKPOINT_INDEX, lambda: write_index(parts, partial) if parts else None)
    return hashes


def shard_writer(folder: Path, hashes: dict[str, str]) -> Any:
    """Torch's writer of shards, which puts each file's hash into ``hashes``.

    The checksums of torch's own format are left out: they take ten times as long as writing, and the hashes replace
    them.
    """
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint.filesystem import FileSystem

    class Hashing(FileSystem):
        @contextmanager
        def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
            with HashedFile(Path(path), mode) as file:
                yield file
            hashes[Path(path).name] = file.hash
            if is_active():
                damage_file(Path(path))

    torch.serialization.set_crc32_options(False)
    writer = FileSystemWriter(folder)
    writer.fs = Hashing()
    return writer
