"""`overlap.num_chunks=auto`: measured at every start; a deterministic run keeps the number that it has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from parallel.chunks import ChunkChoice, measure_chunks
from parallel.config import AUTO, ExpertsAfter
from parallel.mesh import Topology
from parallel.overlap import set_num_chunks
from parallel.reduce import broadcast
from train.checkpoint.files import read_text
from train.checkpoint.manifest import STATE
from train.config import Config
from train.run_dir.folder import CONFIG, is_first_rank, read_config
from train.state import TrainState
from train.terminal import Display


def measure_num_chunks(config: Config, topology: Topology) -> ChunkChoice | None:
    """What `auto` chooses on these ranks; None where nothing overlaps. A collective of all ranks."""
    sizes = topology.sizes
    if config.overlap.num_chunks != AUTO or sizes.ep == 1 or not config.overlap.enabled:
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
    measured: ChunkChoice | None, state: TrainState, config: Config, checkpoint: Path | None, terminal: Display
) -> None:
    """Turn `auto` into a number of chunks, in model and configuration, which the next checkpoints store.

    The bits depend on it, so a deterministic run keeps, while parallel.ep is the same, the number of its checkpoint, or
    before the first one that of its config.yaml, and says what was measured now. Otherwise the measured one is used,
    and one chunk where nothing was measured. A collective of all ranks.
    """
    if config.overlap.num_chunks != AUTO:
        return
    number = 1 if measured is None else measured.num_chunks
    kept = broadcast(kept_chunks(config, checkpoint) if is_first_rank() else None)
    if kept is not None and kept[0] != number:
        why = f"{number} was measured now" if measured is not None else "nothing overlaps now"
        terminal.note(
            f"overlap.num_chunks=auto: {kept[0]} stands, as in the {kept[1]}, though {why}; "
            f"overlap.num_chunks={number} changes it, and with it the bits"
        )
    config.overlap.num_chunks = number if kept is None else kept[0]
    set_num_chunks(state.models, config.overlap.decided_chunks)
    if kept is None and measured is not None and config.train.deterministic:
        terminal.note(
            f"overlap.num_chunks=auto chose {number} by measurement; overlap.num_chunks={number} repeats the bits of "
            f"this run"
        )


def kept_chunks(config: Config, checkpoint: Path | None) -> tuple[int, str] | None:
    """The number that a deterministic run goes on with, and where it stands; None if there is none."""
    if not config.train.deterministic:
        return None
    if checkpoint is not None:
        number = stored_chunks(json.loads(read_text(checkpoint / STATE))["configuration"], config)
        if number is not None:
            return number, "checkpoint"
    if (config.run.folder / CONFIG).is_file():
        number = stored_chunks(read_config(config.run.folder), config)
        if number is not None:
            return number, CONFIG
    return None


def stored_chunks(stored: dict[str, Any], config: Config) -> int | None:
    """The number of chunks in a stored configuration of the same parallel.ep; None if there is none."""
    number = (stored.get("overlap") or {}).get("num_chunks")
    same = (stored.get("parallel") or {}).get("ep") == config.parallel.ep
    return number if same and isinstance(number, int) else None
