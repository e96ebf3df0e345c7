"""A Hydra multirun: one training run per choice, in sequence, by a sweeper plug-in or by a launcher on a cluster."""

from __future__ import annotations

import itertools
import json
import math
import os
import socket
import sys
import traceback
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from launch.sweeps.folder import STOPPED_MARK, is_unfinished, note_finished, open_folder, remove_if_unused, resume
from longcat.errors import BAD_INPUT, CRASHED, OK, STOPPED, ConfigError, LongCatError
from longcat.json_text import NOT_FINITE, dumps
from train.checkpoint.files import read_text
from train.compose import SEARCH_PATH, as_hydra_reads, check_keys, from_tree, one_line, quoted, register
from train.config import Config
from train.keys.dotted import flatten
from train.loggers.jsonl import METRICS, rows
from train.run_dir.exit_file import EXIT
from train.run_dir.folder import lock, read_unchanged_config
from train.sweeps.results import SWEEP_FOLDER, Result, read_result, result_file, results, write_result
from train.transfer import CONSTANT, DEPTH, PROPORTIONAL, SPARSITY

SECTIONS = tuple(section.name for section in fields(Config))
SIZES = ("hidden_size", "vocab_size", *DEPTH, *SPARSITY, *CONSTANT, *PROPORTIONAL)


def run_sweep(overrides: list[str]) -> int:
    """Give ``overrides`` to Hydra's sweeper; each job has its own run folder. Returns the first code that is not 0.

    An unknown key, a wrong type or a value that is no choice of its key is refused before the first job. The sweep
    continues after a job that its own check refuses or that fails; a stopped job ends it. Hydra's multirun.yaml, a
    launcher's logs and a result per run are in a folder of this sweep alone. The same overrides go on in that folder
    until all runs have ended with 0 or have diverged (4); runs that have are not started again.
    """
    register()
    check_keys(overrides, sweep=True)
    folder, made = open_folder(overrides)
    with lock(folder):
        resume(folder)
        try:
            failure = run_jobs(overrides, folder)
        except ConfigError:
            remove_if_unused(made)
            raise
        code = report(folder, failure)
        if not failure and all(result.is_final for result in results(folder)):
            note_finished(folder, overrides, True)
    return code


def run_jobs(overrides: list[str], folder: Path) -> str:
    """Run all jobs of the sweep; returns how a launcher failed, or an empty string.

    Raises:
        ConfigError: Hydra refuses the overrides.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    search = [override for override in overrides if override.startswith(SEARCH_PATH)]
    arguments = sys.argv
    sys.argv = [
        "longcat train",
        "--multirun",
        *map(as_hydra_reads, overrides),
        f"hydra.sweep.dir={quoted(str(folder))}",
    ]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise its errors, instead of printing them and exiting with code 1
    failure = ""
    try:
        job = partial(run_job, folder=folder, search=search)
        hydra.main(version_base="1.3", config_path="pkg://configs", config_name="config")(job)()
    except ConfigError:  # of our sweeper
        raise
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error)) from error
    except Exception as error:  # of a launcher: a job that was killed, a cluster that takes none
        failure = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    finally:
        sys.argv = arguments
    return failure


def run_job(tree: Any, folder: Path, search: list[str]) -> float:
    """One run of the sweep, perhaps in a process of a launcher; returns what a sweeper minimises."""
    from hydra.core.hydra_config import HydraConfig

    if (folder / STOPPED_MARK).exists():
        return math.inf
    hydra = HydraConfig.get()
    number = int(hydra.job.num)
    given = [str(override) for override in hydra.overrides.task if not str(override).startswith("run.name=")]
    path = result_file(folder, number)
    earlier = read_result(path) if path.is_file() else None
    run = run_folder(Path(os.path.expanduser(tree.run.dir)), f"{tree.run.name}-{number}", given, earlier)
    if earlier and earlier.is_final and earlier.overrides == given and run.is_dir():
        return final_loss(run) if earlier.code == OK else math.inf  # the sweep goes on after it was stopped
    tree.run.name = run.name
    task = [*given, f"run.name={run.name}", *search]
    write_result(folder, number, Result(str(run), None, "", this_process(), given))
    os.environ[SWEEP_FOLDER] = str(folder.resolve())
    try:
        code, message = train(tree, task)
    finally:
        del os.environ[SWEEP_FOLDER]
    said, early = ended(run)
    result = Result(str(run), code, message or said, this_process(), given, early and code == OK)
    write_result(folder, number, result)
    if code == STOPPED:
        (folder / STOPPED_MARK).touch()
    return math.inf if code else final_loss(run)


def run_folder(parent: Path, name: str, overrides: list[str], earlier: Result | None) -> Path:
    """The folder of a run: `<parent>/<name>`, or that of the ``earlier`` start of the sweep.

    A sweeper that draws its values may have drawn others then: the run must not go on from their weights, and has a
    folder of its own.
    """
    if earlier is None or not earlier.overrides:  # its result could not be read
        return parent / name
    if earlier.overrides == overrides:
        return parent / Path(earlier.run).name
    names = itertools.chain([name], (f"{name}-{again}" for again in itertools.count(2)))
    run = next(parent / each for each in names if not (parent / each).exists())
    before = " ".join(override for override in earlier.overrides if override not in overrides)
    now = " ".join(override for override in overrides if override not in earlier.overrides)
    print(f"note: {name} had {before} in an earlier start and has {now} now: it trains in {run}", file=sys.stderr)
    return run


def train(tree: Any, overrides: list[str]) -> tuple[int, str]:
    """(exit code, message) of one run; prints an error in its own configuration."""
    from omegaconf.errors import OmegaConfBaseException

    from launch.local import run_ranks

    try:
        config = from_tree(tree)
        config.validate()
        return run_ranks(overrides, config), ""
    except LongCatError as error:
        code, message = error.exit_code, str(error)
    except OmegaConfBaseException as error:
        code, message = BAD_INPUT, one_line(error)
    except Exception as error:  # the sweep goes on
        traceback.print_exc()
        code, message = CRASHED, f"{type(error).__name__}: {error}"
    print(f"error: {tree.run.name}: {message}", file=sys.stderr)
    return code, message


def ended(run: Path) -> tuple[str, bool]:
    """The message of a run's exit.json, and whether the run was hopeless."""
    try:
        said = json.loads(read_text(run / EXIT))
        return str(said["message"]), "stopped_early" in said
    except (OSError, ValueError, KeyError, TypeError):
        return f"no {EXIT} in {run}", False


def report(folder: Path, failure: str) -> int:
    """Print what other processes have not printed here; returns the sweep's exit code.

    A run without an end has failed: its process was killed, or its launcher has lost it.
    """
    found = [
        replace(result, code=CRASHED, message="has not ended", process="") if result.code is None else result
        for result in results(folder)
    ]
    for result in found:
        if result.failed and result.process != this_process():
            print(f"error: {Path(result.run).name}: {result.message} (exit code {result.code})", file=sys.stderr)
    if failure:
        print(f"error: the launcher ended the sweep: {failure}; its logs are in {folder}", file=sys.stderr)
    code = next((result.code for result in found if result.code), OK)
    return code or (CRASHED if failure else OK)


def best_run(folder: Path) -> Path | None:
    """The sweep's run with the lowest final loss, averaged over runs that differ in their seed alone; None if none.

    Only runs that reached their last step count.

    Raises:
        ConfigError: they are of several models, whose losses say nothing about the other hyperparameters.
    """
    losses: dict[str, dict[Path, float]] = {}
    for result in results(folder):
        run = result.folder(folder)
        if result.reached_end and math.isfinite(loss := final_loss(run)):
            losses.setdefault(without_seed(run), {})[run] = loss
    if not losses:
        return None
    best: dict[str, dict[Path, float]] = {}
    for runs in sorted(losses.values(), key=lambda runs: sum(runs.values()) / len(runs)):
        best.setdefault(model_sizes(next(iter(runs))), runs)
    chosen = [(sizes, min(runs, key=lambda run: runs[run])) for sizes, runs in best.items()]
    if len(chosen) > 1:
        found = [dict(json.loads(sizes)) for sizes, _ in chosen]
        key = next(key for key in found[0] if any(sizes[key] != found[0][key] for sizes in found))
        named = ", ".join(f"{run} ({key}={sizes[key]})" for sizes, (_, run) in zip(found, chosen, strict=True))
        raise ConfigError(
            f"proxy={folder} has runs of {len(chosen)} models, whose losses are not compared; name one of their best "
            f"runs: {named}"
        )
    return chosen[0][1]


def describe_choice(folder: Path) -> str:
    """What `best_run` chose from, and whether the sweep may yet have a better run."""
    reached = sum(result.reached_end for result in results(folder))
    rest = "; the sweep has not finished" if is_unfinished(folder) else ""
    return f"lowest loss, by the mean over seeds, of the {reached} runs of {folder} that reached their last step{rest}"


def model_sizes(run: Path) -> str:
    """What makes a run's model another one: its sizes, without initial scales and other hyperparameters."""
    model = read_unchanged_config(run).get("model", {})
    return dumps([[f"model.{name}", model.get(name)] for name in SIZES])


def without_seed(run: Path) -> str:
    """A run's configuration but for its seed and its name."""
    flat = flatten({section: values for section, values in read_unchanged_config(run).items() if section in SECTIONS})
    return dumps({key: value for key, value in sorted(flat.items()) if key not in ("train.seed", "run.name")})


def this_process() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def final_loss(folder: Path) -> float:
    """What a sweeper minimises: a run's last validation loss, or its last training loss if it has none."""
    found = list(rows(folder / METRICS))
    for key in ("val_loss", "loss"):
        if values := [row[key] for row in found if type(row.get(key)) in (int, float) or row.get(key) in NOT_FINITE]:
            return float(values[-1])
    return math.inf
