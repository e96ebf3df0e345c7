"""`overlap.num_chunks=auto`: measured at every start; a deterministic run keeps the number of its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from parallel.chunks import ChunkChoice, measure_chunks
from parallel.config import AUTO, ExpertsAfter
from parallel.mesh import Topology
from parallel.overlap import set_num_chunks
from train.checkpoint.manifest import STATE
from train.config import Config
from train.state import TrainState
from train.terminal import Display


def measure_num_chunks(config: Config, topology: Topology) -> ChunkChoice | None:
    """What `auto` chooses on these ranks; None where there is nothing to choose. A collective of all ranks."""
    if config.overlap.num_chunks != AUTO:
        return None
    sizes = topology.sizes
    if sizes.ep == 1 or not config.overlap.enabled:
        config.overlap.num_chunks = 1
        return None
    train = config.train
    return measure_chunks(
        config.model,
        config.parallel.transport,
        topology,
        max(1, train.micro_batch_size * train.sequence_length // (sizes.cp * sizes.tp)),
        train.sequence_length,
        getattr(torch, train.dtype),
        config.overlap.experts_after == ExpertsAfter.attention,
    )


def decide_num_chunks(
    measured: ChunkChoice, state: TrainState, config: Config, checkpoint: Path | None, terminal: Display
) -> None:
    """Set the number of chunks of model and configuration, which the next checkpoints store.

    The bits depend on it, so a deterministic run goes on with its checkpoint's number while parallel.ep is the same,
    and says what was measured now. Without a checkpoint, or with train.deterministic=false, the measured one is used.
    """
    number = measured.num_chunks
    kept = None if checkpoint is None or not config.train.deterministic else stored_chunks(checkpoint, config)
    if kept is not None and kept != number:
        terminal.note(
            f"overlap.num_chunks=auto: {kept} stands, as in the checkpoint, though {number} was measured now; "
            f"overlap.num_chunks={number} changes it, and with it the bits"
        )
    config.overlap.num_chunks = number if kept is None else kept
    set_num_chunks(state.models, config.overlap.decided_chunks)
    if kept is None and config.train.deterministic:
        terminal.note(
            f"overlap.num_chunks=auto chose {number} by measurement; overlap.num_chunks={number} repeats the bits of "
            f"this run"
        )


def stored_chunks(checkpoint: Path, config: Config) -> int | None:
    """The number of chunks in a checkpoint that was written under the same parallel.ep; None if there is none."""
    stored: dict[str, Any] = json.loads((checkpoint / STATE).read_text())["configuration"]
    number = stored.get("overlap", {}).get("num_chunks")
    same = stored.get("parallel", {}).get("ep") == config.parallel.ep
    return number if same and isinstance(number, int) else None
