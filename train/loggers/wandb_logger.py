"""Metrics to Weights & Biases, from a thread of its own."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import work_span
from train.checkpoint.files import read_text
from train.config import Config, WandbMode
from train.run_dir.files import write_file

if TYPE_CHECKING:
    from torch import Tensor

RUN_ID = "wandb-run-id.txt"  # in the run folder: a restart continues the same wandb run
START_SECONDS = 30.0  # that the first step waits for wandb, so that a failure is said there
CLOSE_SECONDS = 600.0  # that the end of a run waits for an upload
UNSTARTED_SECONDS = 10.0  # that it waits for a wandb that has not started


class WandbLogger:
    """Sends metrics as they come; `write` and `close` raise what went wrong in the thread.

    wandb silently drops a row whose number is not above that of the last one. So rows of steps that are trained again
    get new numbers, and charts have the metric `step` as their axis.

    The thread is a daemon: a wandb that hangs does not keep the process from ending.
    """

    def __init__(self, config: Config, note: Any) -> None:
        self.queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.started = threading.Event()
        self.is_first = True
        self.error: BaseException | None = None
        run_id = run_id_of(config.run.folder, note)
        self.thread = threading.Thread(target=self._send, args=(config, run_id), daemon=True, name="wandb")
        self.thread.start()

    def write(self, metrics: dict[str, Any], counts: Tensor, biases: Tensor) -> None:
        self.queue.put({key: value for key, value in metrics.items() if value is not None})
        if self.is_first:
            self.is_first = False
            with work_span(Event(SpanKind.REPORT), slow=True):  # other ranks wait for this one
                self.started.wait(START_SECONDS)
        self._check()

    def rewind(self, step: int) -> None:
        """Nothing to do: wandb keeps the rows that it has, and gets the steps again in new rows."""

    def flush(self) -> None:
        """Nothing to do: the run folder's readers do not read wandb's files."""

    def close(self) -> None:
        """Wait until all is sent."""
        self.queue.put(None)
        if not self.started.wait(UNSTARTED_SECONDS):
            raise TimeoutError("it has never started; the metrics are in the run folder alone")
        self.thread.join(CLOSE_SECONDS)
        self._check()
        if self.thread.is_alive():
            raise TimeoutError(f"not finished after {CLOSE_SECONDS:.0f} s; `wandb sync` sends the rest")

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    def _send(self, config: Config, run_id: str) -> None:
        try:
            run = start_wandb(config, run_id)
            self.started.set()
            run.define_metric("*", step_metric="step")
            row = run.starting_step  # of a resumed run: after its last row
            while (metrics := self.queue.get()) is not None:
                row = max(row, metrics["step"])
                run.log(metrics, step=row)
                row += 1
            run.finish()
        except Exception as error:
            self.error = error
            with contextlib.suppress(Exception):
                import wandb

                wandb.teardown()  # a dead service would fail again at the end of the process, with a traceback
        finally:
            self.started.set()


def run_id_of(folder: Path, note: Any) -> str:
    """The id of this run at wandb: WANDB_RUN_ID, or what an earlier start stored, or a new one, which is stored."""
    path = folder / RUN_ID
    with contextlib.suppress(OSError, UnicodeDecodeError):
        stored = read_text(path).strip()
        if re.fullmatch(r"[\w.-]+", stored) and not os.environ.get("WANDB_RUN_ID"):
            return stored
    run_id = os.environ.get("WANDB_RUN_ID") or os.urandom(4).hex()
    write_file(path, run_id + "\n", note)
    return run_id


def start_wandb(config: Config, run_id: str) -> Any:
    """A wandb run, offline by default; the same one after a restart.

    Raises:
        RuntimeError: `online` without an API key. wandb itself would ask for one at the terminal.
    """
    import wandb
    from omegaconf import OmegaConf

    settings = config.logging
    if settings.wandb == WandbMode.online and not wandb.login(prompt=False):
        raise RuntimeError("no API key; run `wandb login`, set WANDB_API_KEY or use logging.wandb=offline")
    return wandb.init(
        project=settings.wandb_project or os.environ.get("WANDB_PROJECT") or "longcat",
        entity=settings.wandb_entity,
        group=settings.wandb_group,
        tags=list(settings.wandb_tags) or None,
        id=run_id,
        resume="allow",
        name=config.run.name,
        dir=str(config.run.folder),
        mode=str(settings.wandb),  # type: ignore[arg-type]
        config=OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True),  # type: ignore[arg-type]
        settings=wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True),
    )
