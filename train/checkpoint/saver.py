"""Saving during training: blocking, or as a copy in memory that a thread writes while training continues.

One checkpoint is written at a time. When a rank's thread has ended, the next step's all-reduce says so, and all ranks
check the result together.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from longcat.errors import LongCatError, SaveError
from parallel.mesh import Topology, background_group
from parallel.watchdog import watchdog
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import wait_span, work_span
from parallel.watchdog.timing import max_wait_seconds
from train.checkpoint.find import last_committed
from train.checkpoint.retention import Keep
from train.checkpoint.save import Snapshot, write
from train.checkpoint.save_times import SaveTimer
from train.checkpoint.staging import StagingBuffer
from train.checkpoint.thread_context import ThreadContext
from train.config import Config
from train.run_dir.folder import as_mapping
from train.state import TrainState
from train.terminal import Display


class SaveThread(threading.Thread):
    """Writes one checkpoint; ``error`` is then its exception, if any.

    A daemon: a process that has to end does not wait for it, since an incomplete checkpoint has another name.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        folder: Path,
        topology: Topology,
        keep: Keep,
        context: ThreadContext,
        timer: SaveTimer | None = None,
    ) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.work = (snapshot, folder, topology, keep, context)
        self.timer = timer
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            write(*self.work)
            if self.timer is not None:
                self.timer.written()
        except BaseException as error:
            self.error = error


class Saver:
    """Saves a run's state. `save`, `wait_pending` and making one are collectives.

    Args:
        terminal: reports failures that do not end the run.
        corpora: fingerprints of the data, stored beside the configuration (`describe_corpora`).
    """

    def __init__(
        self,
        state: TrainState,
        config: Config,
        topology: Topology,
        terminal: Display,
        corpora: dict[str, Any] | None = None,
    ) -> None:
        self.state, self.config, self.topology, self.terminal = state, config, topology, terminal
        self.corpora = corpora or {}
        settings = config.checkpoint
        self.folder = config.run.folder / "checkpoints"
        self.keep = Keep.of(settings)
        self.staging = StagingBuffer(topology.device) if settings.asynchronous else None
        self.context = ThreadContext()
        if settings.asynchronous:
            with watchdog.slow_timeout(), wait_span(Event(SpanKind.NEW_GROUP)):
                self.context = ThreadContext(background_group(max_wait_seconds(config.parallel.timeout_seconds)))
        self.thread: SaveThread | None = None
        self.failed: SaveError | None = None  # the newest checkpoint could not be written
        self.last_save = time.monotonic()
        self.timer = SaveTimer(state.counters.step)  # of the newest save
        self.untimed = False  # its time could not be written, and that is noted

    def is_overdue(self) -> bool:
        """Whether a checkpoint is due by `checkpoint.every_minutes`; always False except on the first rank."""
        seconds = 60 * self.config.checkpoint.every_minutes
        return self.topology.is_first and seconds > 0 and time.monotonic() - self.last_save >= seconds

    def has_ended(self) -> bool:
        """Whether a save has ended or failed that `wait_pending` has not handled yet."""
        return self.thread is not None and not self.thread.is_alive()

    def save(self, val_loss: float | None = None) -> None:
        """Save the present step: wait for the previous save, copy the state, and write it in the background.

        Without ``checkpoint.asynchronous`` the checkpoint is on disk when this returns.

        Raises:
            UnhealthyError: the state of this or of the previous save is not finite.
        """
        self.wait_pending()
        self.last_save = time.monotonic()
        self.timer = SaveTimer(self.state.counters.step)
        if self.staging is None:
            with watchdog.slow_timeout(), work_span(Event(SpanKind.CHECKPOINT_SAVE)):
                with self.timer.blocking():
                    error = self._write_blocking(val_loss)
                self._end(error)
            return
        with work_span(Event(SpanKind.CHECKPOINT_COPY), slow=True), self.timer.blocking():
            snapshot = self.staging.copy(lambda take: self._snapshot(val_loss, take))
        self.thread = SaveThread(snapshot, self.folder, self.topology, self.keep, self.context, self.timer)
        self.thread.start()

    def wait_pending(self, final: bool = False) -> None:
        """Wait for the save in progress, if there is one, and report it if it failed.

        Raises:
            UnhealthyError: its state was not finite.
            SaveError: with ``final``, if the newest checkpoint could not be written.
        """
        if self.thread is not None:
            with watchdog.slow_timeout(), work_span(Event(SpanKind.CHECKPOINT_PENDING), slow=True):
                with self.timer.blocking():
                    self.context.wait_for(self.thread)
                error, self.thread = self.thread.error, None
                self._end(error)
        if self.failed is not None and final:
            raise self.failed

    def close(self) -> None:
        """Free the buffer. With one rank, wait for the save first: its process group ends next."""
        if self.thread is not None and dist.get_world_size() == 1:
            self.thread.join()
        if self.staging is not None and self.thread is None:
            self.staging.close()

    def _snapshot(self, val_loss: float | None, take: object = None) -> Snapshot:
        configuration = as_mapping(self.config) | self.corpora
        return Snapshot.of(self.state, configuration, self.topology, val_loss, take)  # type: ignore[arg-type]

    def _write_blocking(self, val_loss: float | None) -> BaseException | None:
        try:
            write(self._snapshot(val_loss), self.folder, self.topology, self.keep, self.context)
        except LongCatError as error:
            return error
        return None

    def _record_time(self) -> None:
        problem = self.timer.record(self.config.run.folder)
        if problem and not self.untimed:
            self.terminal.note(f"{problem}; longcat slurm does not learn from it how long a save takes")
        self.untimed = bool(problem)

    def _end(self, error: BaseException | None) -> None:
        """A full disk does not end the run: that would lose steps, and the next save may find space again."""
        self.failed = None
        if error is None:
            if self.topology.is_first:
                self._record_time()
            return
        if not isinstance(error, SaveError):
            raise error
        if error.is_saved:
            self.terminal.note(str(error))
            return
        last = last_committed(self.folder, self.topology).phrase
        self.failed = SaveError(f"{error}; {last}", is_disk_full=error.is_disk_full)
        self.terminal.note(f"NOT SAVED: {self.failed}; training continues and the next save is tried as usual")
