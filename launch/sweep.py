"""A Hydra multirun: one training run for each choice, one after the other or by a sweeper plugin."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from longcat.errors import BAD_INPUT, STOPPED, ConfigError, LongCatError
from train.compose import check_keys, from_tree, one_line, register
from train.metrics import METRICS

FOLDER = "hydra.sweep.dir=${run.dir}"  # where Hydra leaves multirun.yaml


def run_sweep(words: list[str]) -> int:
    """Hand ``words`` to Hydra's sweeper; each job gets a run folder of its own. Returns the first code that is not 0.

    A job that is refused or fails does not keep the others from running; one that is stopped ends the sweep.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    register()
    check_keys(words)
    codes: list[int] = []

    def job(tree: Any) -> float:
        if STOPPED in codes:
            return math.inf
        name = f"{tree.run.name}-{HydraConfig.get().job.num}"
        overrides = [str(word) for word in HydraConfig.get().overrides.task]
        overrides = [word for word in overrides if not word.startswith("run.name=")] + [f"run.name={name}"]
        tree.run.name = name
        codes.append(run_job(tree, overrides))
        return math.inf if codes[-1] else final_loss(Path(tree.run.dir) / name)

    arguments = sys.argv
    sys.argv = ["longcat train", "--multirun", *words, FOLDER]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # its errors come here as they are, not printed and turned into exit code 1
    try:
        hydra.main(version_base="1.3", config_path="pkg://configs", config_name="config")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error)) from error
    finally:
        sys.argv = arguments
    return next((code for code in codes if code), 0)


def final_loss(folder: Path) -> float:
    """What a sweeper minimises: the last validation loss of a run, or its last training loss without one."""
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    validated = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
    return float(validated[-1] if validated else rows[-1]["loss"])


def run_job(tree: Any, overrides: list[str]) -> int:
    """One run of the sweep; what is wrong with its choice alone is said here."""
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
