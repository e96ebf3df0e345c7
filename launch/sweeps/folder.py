"""The folder of a sweep: a new one, or that of the same sweep if it has not finished."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.nodes.rendezvous import slurm_nodes
from launch.slurm.sweep_jobs import refuse_waiting
from longcat.errors import ConfigError, FolderInUseError
from longcat.json_text import dumps
from train.checkpoint.files import PARTIAL, read_text, write_synced
from train.compose import as_hydra_reads, compose_tree, one_line
from train.run_dir.folder import LOCK, lock
from train.sweeps.results import MULTIRUN, numbered, read_result, results

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

SWEEP = "sweep.json"  # the command's overrides, and whether all of its runs are final
STOPPED_MARK = "stopped"  # a run of this start was stopped: no further one begins
PARAMS = "hydra.sweeper.params"
BATCH_SIZE = "hydra.sweeper.max_batch_size"
LAUNCHING = ("hydra/", "hydra.launcher.", "hydra.sweeper.")  # how runs are chosen and started
LAUNCHER = ("hydra/launcher", "hydra.launcher.")  # where the runs go may change while the sweep is not finished


def open_folder(overrides: list[str]) -> tuple[Path, list[Path]]:
    """The folder of the sweep of ``overrides``: `<run.dir>/<run.name>-sweep`, with a number if there is one already.

    A sweep of the same overrides that has not finished goes on in its folder. Returns also the folders that this start
    has made, innermost first.
    """
    parent, name = _place(overrides)
    existing = _numbered_folders(parent, name)
    for _, folder in sorted(existing.items(), reverse=True):
        stored = _read(folder / SWEEP)
        if stored.get("finished") is False and _same(stored.get("overrides"), overrides):
            return folder, []
    missing = [path for path in (parent, *parent.parents) if not path.exists()]
    folder = _make_folder(parent, name, max(existing, default=0) + 1)
    note_finished(folder, overrides, False)
    return folder, [folder, *missing]


def resume(folder: Path) -> None:
    """Let the runs of an earlier start begin again, but for those that are final, and say how many those are.

    Raises:
        FolderInUseError: one of them still trains or waits in Slurm's queue, since a launcher's jobs outlive the
            command that gave them to it.
    """
    refuse_waiting(folder)
    found = {number: read_result(path) for number, path in numbered(folder)}
    for number, result in sorted(found.items()):
        run = result.folder(folder)
        if result.code is None and run.is_dir():
            try:
                lock(run).close()
            except FolderInUseError as error:
                raise FolderInUseError(
                    f"run {number} of {folder} still trains, in {run}; wait for it or end its job, then start again"
                ) from error
    (folder / STOPPED_MARK).unlink(missing_ok=True)
    if found:
        done = sum(result.is_final for result in found.values())
        print(f"{folder} has not finished: going on, {done} of its runs done", file=sys.stderr)


def note_finished(folder: Path, overrides: list[str], finished: bool) -> None:
    """Write sweep.json."""
    partial = folder / f".{SWEEP}{PARTIAL}"
    write_synced(partial, dumps({"overrides": overrides, "finished": finished}))
    partial.replace(folder / SWEEP)


def is_unfinished(folder: Path) -> bool:
    """Whether the same command would go on in the sweep's folder."""
    return _read(folder / SWEEP).get("finished") is False


def remove_if_unused(made: list[Path]) -> None:
    """Remove the folders that a start has ``made``, if its sweep was refused before its first run."""
    if not made or results(made[0]):
        return
    for name in (MULTIRUN, SWEEP, LOCK):
        (made[0] / name).unlink(missing_ok=True)
    for path in made:
        try:
            path.rmdir()
        except OSError:  # not empty
            return


def _place(overrides: list[str]) -> tuple[Path, str]:
    """`run.dir` and `run.name` of a sweep; raises ConfigError for one that each of several nodes would run."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        parsed = OverridesParser.create().parse_overrides([as_hydra_reads(each) for each in overrides])
        fixed = [each.input_line or "" for each in parsed if not each.is_sweep_override()]
        for each in parsed:
            check_values(each)
        refuse_empty_params(parsed)
        tree = compose_tree(fixed, sweep=True)
        for each in parsed:  # what the file of one run says of the sweep comes too late
            if each.key_or_group == "experiment" and each.is_sweep_override():
                of_runs = [word for word in fixed if not word.lstrip("+").startswith(LAUNCHING)]
                for choice in each.sweep_string_iterator():
                    compose_tree([*of_runs, f"experiment={choice}"])
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(one_line(error)) from error
    if tree.launch.nodes > 1 or slurm_nodes(os.environ) is not None:
        raise ConfigError(
            "a sweep trains each run on one node: start longcat train -m once, without srun and launch.nodes; "
            "hydra/launcher=submitit_slurm spreads its runs over nodes"
        )
    return Path(os.path.expanduser(str(tree.run.dir))), str(tree.run.name)


def check_values(override: Override) -> None:
    """Raise ConfigError for choices or a range without values or an end, and for batches of no runs."""
    from hydra.core.override_parser.types import RangeSweep, ValueType

    size = override.value() if override.key_or_group == BATCH_SIZE else None
    if isinstance(size, int) and size < 1:
        raise ConfigError(f"{BATCH_SIZE}={size} must be at least 1, or null for all runs at once")
    if not override.is_discrete_sweep() or override.value_type == ValueType.GLOB_CHOICE_SWEEP:
        return
    values, first = override.value(), None
    ends = (values.start, values.stop, values.step) if isinstance(values, RangeSweep) else ()
    if all(end is None or math.isfinite(end) for end in ends) and 0 not in ends[2:]:
        first = next(override.sweep_string_iterator(), None)
    if first is None:
        raise ConfigError(f"{override.input_line} has no values, or no end; give those that runs should have")


def refuse_empty_params(parsed: list[Override]) -> None:
    """Hydra's own sweeper has no mapping of parameters that a command line could add to, which it says by a bug."""
    basic = not any(each.key_or_group == "hydra/sweeper" and each.value() != "basic" for each in parsed)
    for each in parsed:
        if basic and f"{each.key_or_group}.".startswith(f"{PARAMS}."):
            raise ConfigError(
                f"{each.input_line}: {PARAMS} can be set in a configuration file, and here with hydra/sweeper=optuna; "
                f"give values as optim.lr=1e-3,2e-3"
            )


def _same(stored: Any, overrides: list[str]) -> bool:
    words = stored if isinstance(stored, list) else []
    return [w for w in words if not str(w).startswith(LAUNCHER)] == [w for w in overrides if not w.startswith(LAUNCHER)]


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):  # of an older version, or half written
        return {}
    return value if isinstance(value, dict) else {}


def _numbered_folder(parent: Path, name: str, number: int) -> Path:
    return parent / (f"{name}-sweep" if number == 1 else f"{name}-sweep-{number}")


def _numbered_folders(parent: Path, name: str) -> dict[int, Path]:
    """{number: folder} of the sweeps of this name; some may have been removed."""
    try:
        names = os.listdir(parent)
    except OSError:  # no folder yet; what cannot be read cannot be written either, which `_make_folder` says
        return {}
    pattern = re.compile(rf"{re.escape(name)}-sweep(?:-([2-9]|[1-9]\d+))?", re.ASCII)
    found = [match for text in names if (match := pattern.fullmatch(text))]
    return {int(match[1] or 1): parent / match[0] for match in found}


def _make_folder(parent: Path, name: str, number: int) -> Path:
    """Make the first folder from ``number`` on that nobody else has made meanwhile."""
    while True:
        folder = _numbered_folder(parent, name, number)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not parent.is_dir():
                raise ConfigError(f"run.dir={parent} is no folder; choose another run.dir") from None
            number += 1
        except OSError as error:
            raise ConfigError(
                f"run.dir={parent}: cannot write in it ({error.strerror}); choose another run.dir"
            ) from error
