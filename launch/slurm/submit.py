"""Writing the script, and giving it to sbatch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from launch.slurm import nodes
from launch.slurm.options import split_slurm_options
from launch.slurm.script import render, signal_time
from longcat.errors import BAD_INPUT, CRASHED, OK, ConfigError
from train.compose import compose, with_search_path
from train.run_dir.folder import check_not_another_run

SCRIPT = "slurm.sh"
SUBMIT = "--submit"
NOT_REACHED = (  # in what sbatch says where the cluster does not answer, whatever the job is
    "contact",
    "connect",
    "timed out",
    "communication",
    "srv lookup",
    "configuration source",
    "fetch config",
    "slurm.conf",
    "resolve",
    "authentication",
    "munge",
    "zero bytes",
    "standby",
    "temporarily",
)


def slurm(arguments: list[str]) -> int:
    """`longcat slurm`: write the script, print its path, and submit it where asked to; returns the exit code."""
    submits = SUBMIT in arguments
    options, overrides = split_slurm_options([argument for argument in arguments if argument != SUBMIT])
    if any(override in ("-m", "--multirun") for override in overrides):
        raise ConfigError(
            "longcat slurm writes one job; longcat train -m hydra/launcher=submitit_slurm … submits a sweep as an array"
        )
    config = compose(overrides)
    notes = nodes.check(options, config)
    check_not_another_run(config)
    run = config.run.folder
    signal = signal_time(options, run)
    path = Path(options.script) if options.script else run / SCRIPT
    text = render(options, with_search_path(overrides), config, path, signal)
    notes += [f"Slurm signals {signal.seconds} s before the time limit: {signal.reason}", *write(path, text)]
    run.mkdir(parents=True, exist_ok=True)  # slurmd does not make the folder of the log
    print(path)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return submit(path) if submits else OK


def write(path: Path, text: str) -> list[str]:
    """Write the script. One that is there and differs, perhaps by a person's hand, is kept under another name."""
    notes = []
    try:
        if path.exists() and path.read_bytes() != text.encode():
            kept = next(each for n in range(1, 10**6) if not (each := path.with_name(f"{path.name}.{n}")).exists())
            path.rename(kept)
            notes = [f"{path} was there and differed; it is now {kept}"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another slurm.script") from error
    return notes


def submit(path: Path) -> int:
    """Give the script to sbatch, which prints the job's number; 2 where it refuses the job, 1 without a controller.

    Raises:
        ConfigError: no sbatch here.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(f"--submit: no sbatch on this machine; call sbatch {path} on the cluster's login node")
    done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True)
    if done.returncode:
        reason = " ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines())
        if any(word in reason.lower() for word in NOT_REACHED):
            print(f"error: sbatch found no cluster for {path}, which is written: {reason}", file=sys.stderr)
            return CRASHED
        print(f"error: sbatch refused {path}: {reason}", file=sys.stderr)
        return BAD_INPUT
    print(done.stdout, end="")
    return OK
