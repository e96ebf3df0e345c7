"""A checkpoint loaded into a run's state, whatever layout it was written in."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from longcat.errors import ConfigError
from parallel.reduce import all_gather_object
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import wait_span, work_span
from train.checkpoint.compatibility import TOKENIZER, differences, order_differences, refusal
from train.checkpoint.dcp_tensors import finish_load, loaded, read_values
from train.checkpoint.failures import describe, first_failure
from train.checkpoint.files import read_text
from train.checkpoint.manifest import STATE
from train.checkpoint.shards import ShardReader
from train.health.ranges import SampleRanges
from train.stages.stored import stored_stage
from train.state import Counters, TrainState


def load(
    state: TrainState, path: Path, configuration: dict[str, Any], from_start: bool = False, own: bool = False
) -> None:
    """Read a checkpoint into ``state``, in place, from any layout into any other.

    Args:
        from_start: as `data.from_start`.
        own: whether it is one of this run's own checkpoints: a run goes on with the configuration that it had.

    Raises:
        ConfigError: the checkpoint is of another model or of other data, an own one of another configuration (with the
            differing keys), or a rank could not read it.
    """
    try:
        stored = json.loads(read_text(path / STATE))
    except OSError as error:
        raise ConfigError(
            f"checkpoint {path} could not be read: {describe(error)}; restore its files or name another"
        ) from error
    counters = asdict(Counters()) | stored["counters"]
    position = counters["samples"] - counters["data_start"]
    skipped = SampleRanges((start, stop) for start, stop in (stored.get("health") or {}).get("skipped", []))
    begun = skipped.place(position)
    wrong = order_differences(stored["configuration"], configuration, begun) if position else []
    new_data = from_start and (bool(wrong) or not own)
    check_model(path, stored, configuration, new_data, bool(wrong))
    check_tokenizer(path, stored["configuration"], configuration)
    if own:
        check_unchanged(path, stored, configuration)
    if new_data:
        counters["data_start"] = counters["samples"]
    elif wrong:
        raise ConfigError(
            f"checkpoint {path} is at sample {position} of other data: {'; '.join(wrong)}; set them equal, or "
            f"read this run's data from its first sample with data.from_start=true"
        )
    with work_span(Event(SpanKind.CHECKPOINT_READ), slow=True):
        tensors, boxes = loaded(state)
        cause = read(tensors, path)
    with wait_span(Event(SpanKind.CHECKPOINT_READ_ALL)):
        failures = all_gather_object(describe(cause) if cause else None)
    if failed := {rank: text for rank, text in enumerate(failures) if text}:
        raise ConfigError(
            f"checkpoint {path} could not be read: {first_failure(failed)}; restore its files or name another"
        ) from cause
    finish_load(state, boxes)
    for name, value in counters.items():
        setattr(state.counters, name, value)
    state.health.restore(stored.get("health"))
    if new_data:
        state.health.forget(data=True)


def read(tensors: dict[str, Tensor], path: Path) -> Exception | None:
    """Fill this rank's boxes of ``tensors``, without the other ranks; returns what prevented it.

    In torch's own load with all ranks, the first one would receive every rank's list of boxes and send it back.
    """
    try:
        reader = ShardReader(path)
        read_values(tensors, reader, reader.read_metadata())
    except Exception as error:
        return error
    return None


def check_model(
    path: Path, stored: dict[str, Any], configuration: dict[str, Any], new_data: bool, other_order: bool
) -> None:
    """Raise ConfigError unless the run goes on with the model that the checkpoint's last step had.

    A run that goes on in the same data has equal models before `data.stages` and equal stages as far as begun. One that
    reads ``new_data`` begins before its own first stage with the checkpoint's rotary positions. For data in
    ``other_order`` that it does not read from the start, the message on these comes first if that would do.
    """
    keys = ("model", "balance.method")
    of_run = stored["configuration"]
    model = stored_stage(stored)[0] if (of_run.get("data") or {}).get("stages") else of_run["model"]
    base, of_stage = (differences(side, configuration, keys) for side in (of_run, {**of_run, "model": model}))
    wrong = of_stage if new_data or (other_order and not of_stage) else base
    if wrong:
        where = " in the stage of data.stages that it is in" if wrong != base else ""
        raise ConfigError(f"checkpoint {path} is of another model{where}: {'; '.join(wrong)}; set them equal")


def check_unchanged(path: Path, stored: dict[str, Any], configuration: dict[str, Any]) -> None:
    """Raise ConfigError if a step of this run was trained with other values that decide the results.

    Checkpoints that `longcat grow`, `merge` or `import` put into the folder of a new run are no steps of it.
    """
    is_brought = "growth" in stored or "merged" in stored or not stored["counters"]["step"]
    if not is_brought and (wrong := differences(stored["configuration"], configuration)):
        raise ConfigError(refusal(f"checkpoint {path} of this run is of another configuration", wrong))


def check_tokenizer(path: Path, stored: dict[str, Any], configuration: dict[str, Any]) -> None:
    """Raise ConfigError if a checkpoint and the run's corpora are known to have different tokenizers."""
    theirs, ours = stored.get(TOKENIZER), configuration.get(TOKENIZER)
    if theirs and ours and theirs != ours:
        raise ConfigError(
            f"checkpoint {path} was made with the tokenizer of SHA-256 {theirs[:12]}… and data.paths="
            f"{configuration['data']['paths']} with that of {ours[:12]}…, so token ids mean other text; build the "
            f"corpus with the checkpoint's tokenizer (longcat data build data.tokenizer=FILE) or name one that was"
        )
