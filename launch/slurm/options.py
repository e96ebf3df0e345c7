"""The options of `longcat slurm`, keys that start with `slurm.`: the allocation, what runs in it, its environment."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass, field, fields
from enum import StrEnum

from launch.options import convert, typed_keys
from longcat.config_choices import check_choice
from longcat.errors import ConfigError

PREFIX = "slurm."
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")
NAME = re.compile(r"[A-Za-z_]\w*")
LINE = re.compile(r"[a-z][a-z0-9-]*")
PATHS = ("container", "venv", "measured", "script")
# Lines that the script has anyway, and whose change would break it
OWN_LINES = {
    "job-name": "slurm.job_name",
    "nodes": "slurm.nodes and slurm.spares",
    "time": "slurm.time",
    "partition": "slurm.partition",
    "account": "slurm.account",
    "qos": "slurm.qos",
    "signal": "slurm.signal_seconds",
    "gpus-per-node": "slurm.gpus_per_node",
    "cpus-per-task": "slurm.cpus_per_node",
    "mail-user": "slurm.mail",
    "chdir": "the folder in which you call longcat slurm",
    "output": "run.dir and run.name: the log is in the run folder",
    "ntasks-per-node": "run.num_processes: Slurm starts one task a node, which starts the ranks",
    "requeue": "slurm.max_requeues",
    "open-mode": "slurm.max_requeues",
    "no-kill": "slurm.spares",
    "array": "longcat train -m hydra/launcher=submitit_slurm, which submits a sweep as an array",
}


class ContainerRuntime(StrEnum):
    """What starts the container."""

    pyxis = "pyxis"
    apptainer = "apptainer"


@dataclass
class SlurmOptions:
    """The job that `longcat slurm` writes. The other arguments are those of `longcat train`."""

    nodes: int = 1  # nodes that train
    spares: int = 0  # nodes beside them that stand by, and take the place of a node that is lost (adds --no-kill)
    time: str = "24:00:00"  # time limit, as Slurm takes it: minutes, HH:MM:SS or D-HH:MM:SS
    partition: str = ""  # empty = the cluster's default
    account: str = ""  # empty = yours
    qos: str = ""  # empty = the cluster's default
    gpus_per_node: int = 0  # GPUs, and ranks unless run.num_processes is set; 0 = CPU nodes, asks for no GPU
    cpus_per_node: int = 0  # CPUs that the ranks of a node share; 0 = whole nodes (--exclusive)
    job_name: str = ""  # empty = run.name
    # seconds before the time limit at which the ranks save and stop. 0 = from the slowest save and step of this run so
    # far, or, without any, 300 and at most a quarter of the time limit
    signal_seconds: int = 0
    measured: str = ""  # run folder whose saves are measured; empty = this run's
    max_requeues: int = 1000  # starts of one job after its first, time limits included; 0 = never requeued
    max_failures: int = 5  # starts in a row without a new checkpoint after which the job gives up
    container: str = ""  # image: a .sqsh file or a registry's name for pyxis, a .sif file for apptainer; empty = none
    runtime: str = ""  # pyxis or apptainer; empty = apptainer for a .sif file, else pyxis
    mounts: str = ""  # host folders in the container, separated by commas; the current folder and run.dir are always
    venv: str = ""  # virtual environment with longcat; empty = the Python that runs longcat slurm
    program: str = ""  # command that starts longcat on a node; empty = from the container or the environment
    setup: str = ""  # shell commands before the start, on the first node: `module load …`
    mail: str = ""  # address for mail at the end, at a failure and at a requeue
    script: str = ""  # path of the script; empty = slurm.sh in the run folder
    # slurm.env.NAME=VALUE: environment variables of the ranks
    env: dict[str, str] = field(default_factory=dict)
    # slurm.sbatch.NAME=VALUE: further lines `#SBATCH --NAME=VALUE`; an empty value for a flag, as slurm.sbatch.reboot=
    sbatch: dict[str, str] = field(default_factory=dict)

    @property
    def time_seconds(self) -> int:
        return seconds_of(self.time)

    @property
    def all_nodes(self) -> int:
        return self.nodes + self.spares

    @property
    def container_runtime(self) -> ContainerRuntime | None:
        if not self.container:
            return None
        by_name = ContainerRuntime.apptainer if self.container.endswith(".sif") else ContainerRuntime.pyxis
        return ContainerRuntime(self.runtime) if self.runtime else by_name

    def validate(self) -> None:
        for name, least in (("nodes", 1), ("spares", 0), ("gpus_per_node", 0), ("cpus_per_node", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"slurm.{name}={getattr(self, name)} must be at least {least}")
        for name, least in (("signal_seconds", 0), ("max_requeues", 0), ("max_failures", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"slurm.{name}={getattr(self, name)} must be at least {least}")
        if self.signal_seconds >= self.time_seconds:
            raise ConfigError(
                f"slurm.signal_seconds={self.signal_seconds} is not before the time limit slurm.time={self.time}; "
                f"lower it or raise slurm.time"
            )
        if self.signal_seconds > 65535:
            raise ConfigError(f"slurm.signal_seconds={self.signal_seconds} is more than Slurm takes, 65535; lower it")
        if self.runtime:
            check_choice("slurm.runtime", self.runtime, ContainerRuntime)
        if self.container and self.venv:
            raise ConfigError(
                "slurm.container and slurm.venv both say where longcat is; give one (slurm.program names a longcat "
                "inside the container)"
            )
        for name in ("runtime", "mounts"):
            if getattr(self, name) and not self.container:
                raise ConfigError(f"slurm.{name}={getattr(self, name)} is for a container; give slurm.container too")
        if self.measured and self.signal_seconds:
            raise ConfigError(
                f"slurm.signal_seconds={self.signal_seconds} and slurm.measured={self.measured} both say when Slurm "
                f"signals; give one"
            )
        for name in self.env:
            if not NAME.fullmatch(name):
                raise ConfigError(f"slurm.env.{name}: an environment variable has letters, digits and _ in its name")
        for name in self.sbatch:
            if not LINE.fullmatch(name):
                raise ConfigError(f"slurm.sbatch.{name} is no long option of sbatch, as slurm.sbatch.reservation is")
            if name in OWN_LINES:
                raise ConfigError(f"slurm.sbatch.{name} is a line that the script has already; use {OWN_LINES[name]}")
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name not in ("setup", "env") and "\n" in "".join(map(str, as_texts(value))):
                raise ConfigError(f"slurm.{option.name} has a line feed; give one line")


def as_texts(value: object) -> list[object]:
    return list(value.values()) if isinstance(value, dict) else [value]


def split_slurm_options(arguments: list[str]) -> tuple[SlurmOptions, list[str]]:
    """The options among ``arguments``, validated, and the other arguments, which are those of `longcat train`.

    Raises:
        ConfigError: an unknown key below `slurm.` (with the nearest one), a wrong type or an impossible value.
    """
    types = {name: kind for name, kind in typed_keys(SlurmOptions) if name not in ("env", "sbatch")}
    options, rest = SlurmOptions(), []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not key.startswith(PREFIX):
            rest.append(argument)
            continue
        name = key.removeprefix(PREFIX)
        section, _, entry = name.partition(".")
        if section in ("env", "sbatch") and entry:
            getattr(options, section)[entry] = text
        elif name in types and equals:
            setattr(options, name, convert(key, with_home(name, text), types[name]))
        else:
            raise ConfigError(unknown(argument, key, [*types, "env.NAME", "sbatch.NAME"]))
    options.validate()
    return options, rest


def with_home(name: str, text: str) -> str:
    """The option's text with `~` as a home folder where it begins a path: shells expand it only where a word begins."""
    if name == "mounts":
        return ",".join(map(os.path.expanduser, text.split(",")))
    return os.path.expanduser(text) if name in PATHS else text


def unknown(argument: str, key: str, names: list[str]) -> str:
    known = [PREFIX + name for name in names]
    if key in known:
        return f"{argument!r} is no option; write {key}=VALUE"
    return f"unknown key {key!r}; the nearest is {difflib.get_close_matches(key, known, 1, 0.0)[0]!r}"


def seconds_of(text: str) -> int:
    """A time limit as Slurm reads it (minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S), in seconds.

    Raises:
        ConfigError: another form, or no time at all.
    """
    found = TIME.fullmatch(text)
    if found is None:
        raise ConfigError(f"slurm.time={text} is no time limit; write minutes, HH:MM:SS or D-HH:MM:SS")
    days, first, second, third = (None if each is None else int(each) for each in found.groups())
    if days is not None:
        seconds = ((days * 24 + (first or 0)) * 60 + (second or 0)) * 60 + (third or 0)
    elif third is not None:
        seconds = ((first or 0) * 60 + (second or 0)) * 60 + third
    else:
        seconds = (first or 0) * 60 + (second or 0)
    if not seconds:
        raise ConfigError(f"slurm.time={text} is no time; Slurm would take it for no limit, whose end no one signals")
    return seconds
