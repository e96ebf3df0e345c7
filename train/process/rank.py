"""One rank's process: entering the run folder, ending with an exit code, reporting a hang."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longcat.errors import (
    CRASHED,
    OK,
    STOPPED,
    ConfigError,
    LocalCorruptionError,
    LongCatError,
    MissingRanksError,
    SilentStoreError,
)
from parallel.sizes import world_from_environment
from parallel.watchdog import watchdog
from parallel.watchdog.diagnosis import HangCause
from parallel.watchdog.errors import causes
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import wait_span
from train.check import check
from train.checkpoint.failures import is_disk_full
from train.config import Config
from train.process.stop import Interrupted, StopSignal
from train.run import train
from train.run_dir.exit_file import claim_exit, forget_exit, recorded_code
from train.run_dir.folder import lock, refuse

CPU_ALLOCATOR = "DefaultCPUAllocator"  # begins what torch raises, as a RuntimeError, where memory of a host is out


def main(config: Config) -> int:
    """Train in this process, which is one rank of the world that the environment describes; returns the exit code."""
    folder = config.run.folder
    try:
        folder_lock = enter(config)
    except LongCatError as error:
        return refuse(folder, error)
    with folder_lock, StopSignal(config.train.stop_after_seconds) as stop_signal:
        try:
            code, message, details = outcome(config, stop_signal)
            is_alone = False
        except LocalCorruptionError as error:  # the other ranks wait for a collective that this one cannot finish
            code, message, details, is_alone = error.exit_code, str(error), error.details, True
        except Interrupted as error:  # before the first step
            code, message, details, is_alone = STOPPED, str(error), LongCatError.details, False
        except BaseException as error:
            hang = watchdog.explain(error)
            if hang is not None:
                report_hang(folder, hang)
                watchdog.exit_process(recorded_code(folder))
            if dist.is_initialized() and dist.get_world_size() == 1:
                dist.destroy_process_group()  # a sweep starts its next run in this process
            if claim_exit(folder, CRASHED, f"{type(error).__name__}: {error}", failure_details(error)):
                raise
            return recorded_code(folder)  # another rank ended the run; this failure is a consequence
        finally:
            watchdog.stop()
        claimed = claim_exit(folder, code, message, details)
        if claimed and code != OK:
            print(message if code == STOPPED else f"error: {message}", file=sys.stderr, flush=True)
        if is_alone:
            watchdog.exit_process(code if claimed else recorded_code(folder, code))
        if dist.is_initialized():
            dist.destroy_process_group()
        return code if claimed else recorded_code(folder, code)


def enter(config: Config) -> AbstractContextManager[Any]:
    """Check what can be checked before ranks meet; on the first rank the returned context locks the run folder."""
    rank, _, world_size = world_from_environment()
    check(config, world_size)
    if rank:
        return nullcontext()
    folder_lock = lock(config.run.folder)
    forget_exit(config.run.folder)
    return folder_lock


def outcome(config: Config, stop_signal: StopSignal) -> tuple[int, str, Mapping[str, Any]]:
    """Train; returns the exit code, its message, and what exit.json says beside them."""
    code, message, details = OK, "done", LongCatError.details
    try:
        train(config, stop_signal, partial(report_hang, config.run.folder))
    except LocalCorruptionError:
        raise
    except (ConfigError, MissingRanksError, SilentStoreError) as error:
        return error.exit_code, str(error), error.details  # perhaps on this rank only: do not wait for the others
    except LongCatError as error:
        code, message, details = error.exit_code, str(error), error.details or failure_details(error)
    # Every rank gets here. The launcher may end the others when the first exits, so none may still be writing.
    with watchdog.slow_timeout(), wait_span(Event(SpanKind.END_OF_RUN)):
        dist.barrier()
    return code, message, details


def failure_details(error: BaseException) -> dict[str, Any]:
    """Fields of exit.json for failures that a restart treats apart: `cause` is out_of_memory or disk_full."""
    for cause in causes(error):
        if isinstance(cause, torch.OutOfMemoryError | MemoryError) or CPU_ALLOCATOR in str(cause):
            return {"cause": "out_of_memory"}
        if is_disk_full(cause):
            return {"cause": "disk_full"}
    return {}


def hang_details(finding: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Fields of exit.json for a run that the watchdog ends: `hang`, or a lost store as the cause."""
    if finding is None:
        return {}
    return SilentStoreError.details if finding["kind"] == HangCause.STORE_LOST else {"hang": finding}


_REPORTING = threading.Lock()


def report_hang(folder: Path, message: str) -> None:
    """Record and print, once for all ranks, which rank stopped the run. The watchdog's thread calls this too.

    The second caller ends the process next, so it waits here until the first has printed.
    """
    with _REPORTING:
        if claim_exit(folder, CRASHED, message, hang_details(watchdog.finding())):
            print(f"error: {message}", file=sys.stderr, flush=True)
