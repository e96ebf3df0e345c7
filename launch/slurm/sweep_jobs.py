"""The jobs that submitit has given to Slurm for a sweep: whether some of them still wait or run."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from longcat.errors import ConfigError, FolderInUseError

SUBMITTED, BATCH, FINISHED = "_submitted.pkl", "_submission.sh", "_result.pkl"  # ends of submitit's files
SQUEUE = ("squeue", "--noheader", "--array", "--me", "--format=%i %T")
SQUEUE_SECONDS = 60.0
SHOWN = 4


def refuse_waiting(folder: Path) -> None:
    """Refuse to go on with a sweep of which Slurm still has jobs.

    Raises:
        FolderInUseError: it has.
        ConfigError: it cannot be asked.
    """
    unfinished = without_result(folder)
    if not unfinished:
        return
    try:
        queued = states()
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"cannot ask Slurm whether its jobs {shown(unfinished)} of {folder} have ended ({error}); start again "
            f"where squeue works, or remove {folder / '.submitit'} if they have"
        ) from error
    alive = [f"{job} ({queued[job]})" for job in unfinished if job in queued]
    if alive:
        arrays = sorted({job.partition("_")[0] for job in unfinished if job in queued})
        raise FolderInUseError(
            f"Slurm still has jobs of an earlier start of {folder}: {shown(alive)}; wait for them or scancel "
            f"{' '.join(arrays)}, then start again"
        )


def without_result(folder: Path) -> list[str]:
    """Slurm's numbers of the sweep's jobs, `12` or `12_0` in an array, that have left no result.

    submitit writes the files of a job, whose names begin with its number, as soon as Slurm has taken it.
    """
    arrays = {path.name.removesuffix(BATCH) for path in folder.rglob(f"*{BATCH}")}
    found = []
    for path in folder.rglob(f"*{SUBMITTED}"):
        job = path.name.removesuffix(SUBMITTED)
        has_ended = any(path.parent.glob(f"{job}_*{FINISHED}"))
        if job.partition("_")[0] in arrays and not has_ended:  # a job that runs on this machine has no batch script
            found.append(job)
    return sorted(found, key=lambda job: [int(number) for number in re.findall(r"\d+", job)])


def states() -> dict[str, str]:
    """{number: state} of this user's jobs that wait or run."""
    lines = subprocess.run(
        SQUEUE, check=True, capture_output=True, text=True, timeout=SQUEUE_SECONDS, stdin=subprocess.DEVNULL
    ).stdout.splitlines()
    return {words[0]: words[1] for line in lines if len(words := line.split()) == 2}


def shown(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + f" and {len(names) - SHOWN} more" * (len(names) > SHOWN)
