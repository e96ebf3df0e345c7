"""The sbatch script: job.sh with the options, the configuration's keys and what is known of earlier saves filled in."""

from __future__ import annotations

import re
import shlex
import site
import sys
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from launch.slurm.options import ContainerRuntime, SlurmOptions
from longcat.errors import ConfigError
from train.checkpoint.save_times import SAVES, slowest_save
from train.config import Config
from train.loggers.jsonl import METRICS, rows
from train.process.search_path import ROOT

TEMPLATE = Path(__file__).with_name("job.sh")
DEFAULT_SIGNAL_SECONDS = 300
REACTION_SECONDS = 30  # of Slurm, the script and the end of a run: report, exit.json
NEWEST_STEPS = 200
PLAIN = re.compile(r"[\w./:@%+,=\[\]-]+")  # what a line #SBATCH holds without quotes
LOG = "slurm-%j.log"

# The first rank's node as Slurm reaches it, and a port that no other start of a job uses, and hardly another cluster's
RENDEZVOUS = """\
    local address port sum
    address=$(scontrol -o show node "${1%%,*}" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
    sum=$(cksum <<<"$run")
    port=$((20000 + (${sum%% *} + SLURM_JOB_ID * 64 + ${SLURM_RESTART_COUNT:-0} * 8 + num_starts) % 12000))
"""


@dataclass(frozen=True)
class SignalTime:
    """How long before the time limit Slurm signals, and why."""

    seconds: int
    reason: str


def signal_time(options: SlurmOptions, run: Path) -> SignalTime:
    """Seconds that the ranks need to finish a step, the save in progress and the last save.

    Raises:
        ConfigError: no more than half of the time limit would be left for training.
    """
    limit = options.time_seconds
    if options.signal_seconds:
        return SignalTime(options.signal_seconds, "slurm.signal_seconds")
    measured = Path(options.measured) if options.measured else run
    save = slowest_save(measured)
    if save is None:
        if options.measured:
            raise ConfigError(f"slurm.measured={options.measured} has no {SAVES}; name a run folder with saves")
        seconds = min(DEFAULT_SIGNAL_SECONDS, limit // 4)
        return SignalTime(seconds, "a default, since no save of this run is recorded yet; slurm.signal_seconds sets it")
    step = max((row["step_seconds"] for row in list(rows(measured / METRICS))[-NEWEST_STEPS:]), default=0.0)
    seconds = ceil(2 * save + 2 * step) + REACTION_SECONDS
    reason = f"2 × {save:.1f} s, the slowest save in {measured / SAVES}, 2 × {step:.1f} s, the slowest step, and " + (
        f"{REACTION_SECONDS} s"
    )
    if seconds > limit // 2:
        raise ConfigError(
            f"slurm.time={options.time} is too short: the ranks must be told to save {seconds} s before it ({reason}), "
            f"which leaves less than half for training; raise slurm.time, or set slurm.signal_seconds"
        )
    return SignalTime(seconds, reason)


def render(options: SlurmOptions, overrides: list[str], config: Config, path: Path, signal: SignalTime) -> str:
    """The text of the script at ``path`` for ``config``, which ``overrides`` compose."""
    run = config.run.folder.absolute()
    values = {
        "run_name": config.run.name,
        "script": shlex.quote(str(path.absolute())),
        "sbatch": "\n".join(f"#SBATCH --{line}" for line in sbatch_lines(options, config, signal)),
        "run": shlex.quote(str(run)),
        "num_nodes": str(options.nodes),
        "most_nodes": str(options.all_nodes if restarts_inside(options, config) else options.nodes),
        "max_requeues": str(options.max_requeues),
        "max_failures": str(options.max_failures),
        "environment": environment(options),
        "resume_from": shlex.quote(config.checkpoint.resume),
        "signal_seconds": str(signal.seconds),
        "save_seconds": str(max(signal.seconds - 15, signal.seconds // 2)),
        "srun": " ".join(srun_options(options, run, outlives_nodes(options, config))),
        "rendezvous": RENDEZVOUS if options.nodes > 1 else "",
        "command": command(options, overrides, run),
    }
    return re.sub(rf"\{{({'|'.join(values)})\}}", lambda found: values[found[1]], TEMPLATE.read_text())


def sbatch_lines(options: SlurmOptions, config: Config, signal: SignalTime) -> list[str]:
    """What follows `#SBATCH --` on each line.

    Raises:
        ConfigError: a value that Slurm would not read as it is.
    """
    spares = f"   # {options.nodes} train, {options.spares} stand by" if options.spares else ""
    lines = [
        f"job-name={quoted(options.job_name or config.run.name, 'slurm.job_name or run.name')}",
        f"nodes={options.all_nodes}{spares}",
        "ntasks-per-node=1   # longcat train, which starts the ranks of its node",
        f"time={options.time}",
    ]
    for name in ("partition", "account", "qos"):
        if getattr(options, name):
            lines.append(f"{name}={quoted(getattr(options, name), f'slurm.{name}')}")
    if options.gpus_per_node:
        lines.append(f"gpus-per-node={options.gpus_per_node}")
    if options.cpus_per_node:
        lines.append(f"cpus-per-task={options.cpus_per_node}")
    else:
        lines += ["exclusive", "mem=0   # all memory of the nodes"]
    lines += [
        "distribution=block   # ranks that follow each other (tp, cp, ep) are on one node, then on the next",
        f"signal=B:USR1@{signal.seconds}   # {signal.reason}",
        "requeue" if options.max_requeues else "no-requeue",
        "open-mode=append",
        f"chdir={quoted(str(Path.cwd()), 'the folder in which you call longcat slurm')}",
        f"output={quoted(log_path(config), 'run.dir or run.name')}",
    ]
    if outlives_nodes(options, config):
        lines.append("no-kill   # the job outlives a lost node")
    if options.mail:
        lines += [f"mail-user={quoted(options.mail, 'slurm.mail')}", "mail-type=END,FAIL,REQUEUE"]
    further = options.sbatch.items()
    return lines + [f"{name}={quoted(value, f'slurm.sbatch.{name}')}" if value else name for name, value in further]


def quoted(value: str, name: str) -> str:
    """A value for a line `#SBATCH`, in double quotes where Slurm would end it early; ``name`` says what to change.

    Raises:
        ConfigError: it has a double quote, a backslash or a line feed.
    """
    if wrong := next((each for each in ('"', "\\", "\n") if each in value), None):
        raise ConfigError(f"{name}: {value!r} has {wrong!r}, which a line #SBATCH cannot hold; choose another")
    return value if PLAIN.fullmatch(value) else f'"{value}"'


def log_path(config: Config) -> str:
    """The log of all starts of a job, in which only the job's number is a pattern of Slurm's."""
    return str(config.run.folder.absolute()).replace("%", "%%") + f"/{LOG}"


def environment(options: SlurmOptions) -> str:
    """Shell lines that set up the environment of the ranks."""
    lines = [options.setup] if options.setup else []
    if options.venv:
        lines.append(f"source {shlex.quote(str(Path(options.venv).absolute() / 'bin' / 'activate'))}")
    if not (options.container or options.venv or options.program) and not is_installed():
        lines.append(f"export PYTHONPATH={shlex.quote(ROOT)}${{PYTHONPATH:+:$PYTHONPATH}}")
    lines += ["export PYTHONUNBUFFERED=1", "export PYTHONSAFEPATH=1   # a train.py in this folder is not ours"]
    lines.append("export SLURM_EXPORT_ENV=ALL   # srun takes all of it to the nodes, also after sbatch --export=NONE")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in options.env.items()]
    return "\n".join(lines) + "\n"


def outlives_nodes(options: SlurmOptions, config: Config) -> bool:
    """Whether training goes on, on other nodes or on fewer, when one is lost."""
    return bool(options.spares or (restarts_inside(options, config) and config.launch.shrink))


def restarts_inside(options: SlurmOptions, config: Config) -> bool:
    """Whether `longcat train` runs on spare nodes too, and starts ranks on them again."""
    return options.nodes > 1 and config.launch.restarts > 0


def srun_options(options: SlurmOptions, run: Path, outlives_nodes: bool) -> list[str]:
    """Options of the one srun."""
    words = ["--ntasks-per-node=1", "--cpu-bind=none"]
    if options.cpus_per_node:
        words.append(f"--cpus-per-task={options.cpus_per_node}")
    # Slurm keeps the step of a lost node, and its CPUs, for good: the next start has to share them
    words.append("--overlap")
    # A rank that fails must not end the ranks that still save: longcat train decides what ends when
    words.append("--kill-on-bad-exit=0")
    if outlives_nodes:
        words.append("--no-kill")
    if options.container_runtime is ContainerRuntime.pyxis:
        words += [
            f"--container-image={shlex.quote(options.container)}",
            f"--container-mounts={shlex.quote(','.join(mounts(options, run)))}",
            f"--container-workdir={shlex.quote(str(Path.cwd()))}",
        ]
    return words


def mounts(options: SlurmOptions, run: Path) -> list[str]:
    """Host folders that the container sees, as HOST:CONTAINER."""
    own = [f"{folder}:{folder}" for folder in dict.fromkeys([Path.cwd(), run.parent])]
    return own + [each if ":" in each else f"{each}:{each}" for each in options.mounts.split(",") if each]


def command(options: SlurmOptions, overrides: list[str], run: Path) -> str:
    """What a node runs, one key on a line; in a container, the command that enters it."""
    words = []
    if options.container_runtime is ContainerRuntime.apptainer:
        words = ["apptainer", "exec", *(["--nv"] if options.gpus_per_node else [])]
        words += ["--pwd", str(Path.cwd()), "--bind", ",".join(mounts(options, run)), options.container]
    start = shlex.join(words) + " " if words else ""
    start += " ".join([*program(options), "train", *several_nodes(options)])
    return " \\\n            ".join([start, *map(shlex.quote, overrides), '${resume:+"$resume"}'])


def program(options: SlurmOptions) -> list[str]:
    """What starts longcat on a node: on the path of a container or venv, else the code that writes the script."""
    if options.program:
        return [shlex.join(shlex.split(options.program))]
    if options.container or options.venv:
        return ["longcat"]
    return [shlex.quote(sys.executable), "-P", "-m", "launch"]


def several_nodes(options: SlurmOptions) -> list[str]:
    """Keys that let the nodes of a step meet."""
    return [f"launch.nodes={options.nodes}", '"launch.rendezvous=$address:$port"'] if options.nodes > 1 else []


def is_installed() -> bool:
    """Whether Python finds this code by itself; a checkout has to be named."""
    return ROOT in (*site.getsitepackages(), site.getusersitepackages())
