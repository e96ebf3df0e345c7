"""NCCL's flight recorder: writes the last collectives to the run's folder when a run hangs. Never run on a GPU."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

from parallel.torch_internals import can_dump_nccl_trace, dump_nccl_trace
from parallel.watchdog.heartbeats import within


def flight_record_path(folder: Path, rank: int) -> Path:
    return folder / "traces" / f"nccl_{rank}"


def enable_flight_recorder(folder: Path) -> None:
    """Let NCCL record its last collectives and write them to `traces/nccl_<rank>` when one times out.

    Sets defaults in the environment, before the process group is made; variables that are set stay. Read the files with
    `torchfrtrace runs/<name>/traces -p nccl_`.
    """
    if not torch.cuda.is_available():
        return
    path = flight_record_path(folder, 0)
    with contextlib.suppress(OSError):  # a folder that cannot be made costs the records, not the run
        path.parent.mkdir(parents=True, exist_ok=True)
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:  # its older name
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    if "TORCH_NCCL_DEBUG_INFO_TEMP_FILE" not in os.environ:
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(path).removesuffix("0"))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def dump_flight_record(path: Path) -> None:
    """Write NCCL's flight record of this rank now: the process ends before NCCL's own time-out."""
    if can_dump_nccl_trace():
        within(5.0, lambda: path.write_bytes(dump_nccl_trace()))
