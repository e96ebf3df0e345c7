"""A Hydra multirun: one training run per choice, in sequence or by a sweeper plugin."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

from longcat.errors import BAD_INPUT, STOPPED, ConfigError, LongCatError
from train.compose import check_keys, from_tree, one_line, register
from train.loggers.jsonl import METRICS, rows
from train.spelling import keep_spelling

FOLDER = "hydra.sweep.dir=${run.dir}"  # where Hydra writes multirun.yaml


def run_sweep(overrides: list[str]) -> int:
    """Give ``overrides`` to Hydra's sweeper; each job has its own run folder. Returns the first code that is not 0.

    An unknown key, a wrong type or a value that is no choice of its key is refused before the first job. The sweep
    continues after a job that its own check refuses or that fails; a stopped job ends it.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    register()
    check_keys(overrides)
    codes: list[int] = []

    def job(tree: Any) -> float:
        if STOPPED in codes:
            return math.inf
        name = f"{tree.run.name}-{HydraConfig.get().job.num}"
        task = [str(override) for override in HydraConfig.get().overrides.task]
        task = [override for override in task if not override.startswith("run.name=")] + [f"run.name={name}"]
        tree.run.name = name
        codes.append(run_job(tree, task))
        return math.inf if codes[-1] else final_loss(Path(tree.run.dir) / name)

    arguments = sys.argv
    sys.argv = ["longcat train", "--multirun", *map(keep_spelling, overrides), FOLDER]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise its errors, instead of printing them and exiting with code 1
    try:
        hydra.main(version_base="1.3", config_path="pkg://configs", config_name="config")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error)) from error
    finally:
        sys.argv = arguments
    return next((code for code in codes if code), 0)


def final_loss(folder: Path) -> float:
    """What a sweeper minimises: a run's last validation loss, or its last training loss if it has none."""
    found = list(rows(folder / METRICS))
    for key in ("val_loss", "loss"):
        if values := [row[key] for row in found if row.get(key) is not None]:
            return float(values[-1])
    return math.inf


def run_job(tree: Any, overrides: list[str]) -> int:
    """One run of the sweep; prints an error in its own choice."""
    from omegaconf.errors import OmegaConfBaseException

    from launch.local import run_ranks

    try:
        config = from_tree(tree)
        config.validate()
        return run_ranks(overrides, config)
    except LongCatError as error:
        print(f"error: {tree.run.name}: {error}", file=sys.stderr)
        return error.exit_code
    except OmegaConfBaseException as error:
        print(f"error: {tree.run.name}: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
