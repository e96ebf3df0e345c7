"""Ends hopeless runs of a sweep: those whose validation loss is far behind that of the finished runs."""

from __future__ import annotations

import math
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from longcat.counts import count_parameters
from longcat.errors import OK, ConfigError, LongCatError
from train.checkpoint.compatibility import ADDED, corpora_differences
from train.config import Config
from train.keys.dotted import value_at
from train.loggers.jsonl import METRICS, rows
from train.run_dir.folder import as_mapping, read_unchanged_config
from train.stages.stored import stored_lengths
from train.sweeps.results import SWEEP_FOLDER, numbered, read_result

COMPARED = (  # keys of config.yaml that decide, with the corpora, what a validation loss at a step means
    "derived.parameters",
    "data.weights",
    "data.validation_fraction",
    "data.mask_documents",
    "data.packing",
    "data.eos_token",
    "train.sequence_length",
    "train.global_batch_size",
    "validation.batches",
)


class StoppedEarly(LongCatError):
    """A run of a sweep was hopeless; its state is saved. Exit code 0: the sweep has what it needs of the run."""

    exit_code = OK

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"stopped early at step {step}: {reason}")
        self.details = {"stopped_early": {"step": step}}


class Pruner:
    """Compares a run with the finished ones of its sweep. Without a sweep it judges nothing.

    ``corpora`` are the fingerprints of `describe_corpora`.
    """

    def __init__(self, config: Config, corpora: dict[str, Any]) -> None:
        self.config, self.corpora = config, corpora
        sweep = os.environ.get(SWEEP_FOLDER) if config.pruning.percentile else None
        self.sweep = None if sweep is None else Path(sweep)
        # {step: validation loss} of the runs that ended with 0, by number; those that do not count have none
        self._curves: dict[int, dict[int, float]] = {}

    def judge(self, step: int, loss: float) -> str:
        """Why the run ends at ``step`` with validation ``loss`` (nats per token); empty if it goes on."""
        settings = self.config.pruning
        if self.sweep is None or step < settings.min_steps:
            return ""
        found = [curve[step] for curve in self._finished(self.sweep) if step in curve]
        if len(found) < settings.min_runs:
            return ""
        limit = float(np.percentile(found, settings.percentile))
        if loss <= limit:
            return ""
        return (
            f"validation loss {loss:.4f} is above {limit:.4f}, percentile {settings.percentile:g} of the {len(found)} "
            f"finished runs of {self.sweep} at this step (pruning.percentile)"
        )

    def _finished(self, sweep: Path) -> list[dict[int, float]]:
        """The validation losses of each comparable run that reached its last step."""
        own = self.config.run.folder.resolve()
        for number, path in numbered(sweep):
            if number in self._curves or (result := read_result(path)).code != OK:
                continue
            folder = result.folder(sweep).resolve()
            counts = result.reached_end and folder != own and self._is_comparable(folder)
            self._curves[number] = _losses(folder) if counts else {}
        return list(self._curves.values())

    def _is_comparable(self, folder: Path) -> bool:
        """Whether the run has as many parameters, and validates on the same sequences at the same tokens."""
        try:
            stored = read_unchanged_config(folder)
        except ConfigError:
            return False
        try:
            same = stored_lengths(stored) == stored_lengths(self._own)
        except (KeyError, TypeError):
            return False  # a config.yaml of another version, or edited by hand
        same = same and all(value_at(stored, key, ADDED.get(key)) == value_at(self._own, key) for key in COMPARED)
        return same and not corpora_differences(stored, self._own)

    @cached_property
    def _own(self) -> dict[str, Any]:
        """What this run's config.yaml says of the compared keys."""
        derived = {"parameters": count_parameters(self.config.model).total}
        return as_mapping(self.config) | self.corpora | {"derived": derived}


def _losses(folder: Path) -> dict[int, float]:
    """{step: validation loss} of a run, the finite ones."""
    found = {row["step"]: row.get("val_loss") for row in rows(folder / METRICS)}
    return {step: loss for step, loss in found.items() if isinstance(loss, float) and math.isfinite(loss)}
