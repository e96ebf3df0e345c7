"""When training saves: at once, or as a copy in memory that a thread writes while training goes on.

One checkpoint is written at a time. How it ended is looked up after the step in which a rank finds it ended, and all
ranks with it, since the step's exchange carries that.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from longcat.errors import LongCatError, SaveError
from parallel.mesh import Topology, group_beside_training
from parallel.watchdog import watchdog
from parallel.watchdog.spans import wait_span, work_span
from train.checkpoint.find import last_valid
from train.checkpoint.retention import Keep
from train.checkpoint.save import SaveContext, Snapshot, write
from train.checkpoint.staging import StagingBuffer
from train.config import Config
from train.run_dir import as_mapping
from train.state import TrainState
from train.terminal import Display


class SaveThread(threading.Thread):
    """One checkpoint on its way to the disk; ``error`` says afterwards what went wrong.

    A daemon: a process that has to end does not wait for it, and half a checkpoint has another name.
    """

    def __init__(self, snapshot: Snapshot, folder: Path, topology: Topology, keep: Keep, context: SaveContext) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.work = (snapshot, folder, topology, keep, context)
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            write(*self.work)
        except BaseException as error:
            self.error = error


class Saver:
    """Saves a run's state. `save`, `wait_pending` and making one are collectives.

    Args:
        terminal: reports what went wrong without ending the run.
        corpora: what a checkpoint says of the data beside the configuration (`describe_corpora`).
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
        self.keep = Keep(settings.keep, settings.keep_every, settings.keep_best)
        self.stage = StagingBuffer(topology.device) if settings.asynchronous else None
        self.context = SaveContext()
        if settings.asynchronous:
            with watchdog.slow_timeout(), wait_span("making the group for checkpoints"):
                self.context = SaveContext(group_beside_training(watchdog.longest(config.parallel.timeout_seconds)))
        self.writing: SaveThread | None = None
        self.failed: SaveError | None = None  # the newest checkpoint could not be written
        self.last = time.monotonic()

    def is_overdue(self) -> bool:
        """Whether the clock asks for a checkpoint; the first rank's clock does."""
        seconds = 60 * self.config.checkpoint.every_minutes
        return self.topology.is_first and seconds > 0 and time.monotonic() - self.last >= seconds

    def has_ended(self) -> bool:
        """Whether there is a checkpoint to `wait_pending` that has been written, or could not be."""
        return self.writing is not None and not self.writing.is_alive()

    def save(self, val_loss: float | None = None) -> None:
        """Save the present step: wait for the checkpoint before, copy the state, and write it beside training.

        Without ``checkpoint.asynchronous`` it is on disk afterwards.

        Raises:
            UnhealthyError: this or the former one's state is not finite.
        """
        self.wait_pending()
        self.last = time.monotonic()
        if self.stage is None:
            with watchdog.slow_timeout(), work_span("saving"):
                self._end(self._write_here(val_loss))
            return
        with work_span("copying the state for the checkpoint", slow=True):
            snapshot = self.stage.copy(lambda take: self._snapshot(val_loss, take))
        self.writing = SaveThread(snapshot, self.folder, self.topology, self.keep, self.context)
        self.writing.start()

    def wait_pending(self, final: bool = False) -> None:
        """Wait for the checkpoint that is being written, if one is, and say so if it failed.

        Raises:
            UnhealthyError: its state was not finite.
            SaveError: with ``final``, where the newest checkpoint could not be written.
        """
        if self.writing is not None:
            with watchdog.slow_timeout(), work_span("waiting for the checkpoint to be written", slow=True):
                self.context.wait_for(self.writing)
                error, self.writing = self.writing.error, None
                self._end(error)
        if self.failed is not None and final:
            raise self.failed

    def close(self) -> None:
        """Let go of the buffer. In one process nothing may still write when its process group ends."""
        if self.writing is not None and dist.get_world_size() == 1:
            self.writing.join()
        if self.stage is not None and self.writing is None:
            self.stage.close()

    def _snapshot(self, val_loss: float | None, take: object = None) -> Snapshot:
        configuration = as_mapping(self.config) | self.corpora
        return Snapshot.of(self.state, configuration, self.topology, val_loss, take)  # type: ignore[arg-type]

    def _write_here(self, val_loss: float | None) -> BaseException | None:
        try:
            write(self._snapshot(val_loss), self.folder, self.topology, self.keep, self.context)
        except LongCatError as error:
            return error
        return None

    def _end(self, error: BaseException | None) -> None:
        """A full disk ends no run: steps would be lost for certain, and there may be room again by the next time."""
        self.failed = None
        if error is None:
            return
        if not isinstance(error, SaveError):
            raise error
        if error.is_saved:
            self._say(str(error))
            return
        self.failed = SaveError(f"{error}; {last_valid(self.folder, self.topology)}")
        self._say(f"NOT SAVED: {self.failed}; the next one that is due will be tried all the same")

    def _say(self, text: str) -> None:
        self.terminal.note(text)
