"""Where the nodes of a run meet, and which of them this one is: from keys or from Slurm's environment."""

from __future__ import annotations

import itertools
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.nodes.store import Identity
from longcat.errors import ConfigError
from train.launch_config import LaunchConfig, split_address

NODE_NAME = "LONGCAT_NODE"  # this node's name where the host's name does not tell nodes apart
FIRST_PORT, NUM_PORTS = 20000, 12000
SLURM_START = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")


@dataclass(frozen=True)
class RendezvousParameters:
    """Where this node meets the others, and as what; ``id`` is Slurm's, None where the order of arrival decides."""

    nodes: int
    name: str
    host: str
    port: int
    id: int | None
    hosts: tuple[str, ...] = ()  # names of all nodes, where Slurm tells

    @property
    def may_be_first(self) -> bool:
        """Whether this node may start the store: Slurm's node 0, or one that has the address."""
        return self.id == 0 if self.id is not None else is_own(self.host)


def slurm_nodes(environment: Mapping[str, str]) -> int | None:
    """Nodes of the Slurm step that this process is a task of; None outside of a step on several nodes.

    Raises:
        ConfigError: the step has several tasks on a node.
    """
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    if "SLURM_NODEID" not in environment or nodes < 2:
        return None
    if int(environment.get("SLURM_STEP_NUM_TASKS", nodes)) != nodes:
        raise ConfigError(
            f"this Slurm step has {environment['SLURM_STEP_NUM_TASKS']} tasks on {nodes} nodes; longcat train starts "
            f"the ranks of its node itself: use srun --ntasks-per-node=1"
        )
    return nodes


def num_nodes(config: LaunchConfig, environment: Mapping[str, str]) -> int:
    """Nodes that train: `launch.nodes`, or those of the Slurm step, or one."""
    return config.nodes or slurm_nodes(environment) or 1


def find_place(config: LaunchConfig, environment: Mapping[str, str]) -> RendezvousParameters | None:
    """Read keys and Slurm's environment; None for a run on one machine.

    Raises:
        ConfigError: no rendezvous is given and Slurm gives none, or no number of nodes beside it, or Slurm has another.
    """
    in_step, nodes = slurm_nodes(environment), num_nodes(config, environment)
    if config.rendezvous and not config.nodes and "SLURM_NODEID" not in environment:
        raise ConfigError(
            f"launch.rendezvous={config.rendezvous} is for several nodes; give their number too, launch.nodes=N, or "
            f"leave it out"
        )
    if nodes == 1:
        return None
    hosts = tuple(expand_hosts(environment.get("SLURM_STEP_NODELIST", ""))) if in_step is not None else ()
    name = environment.get(NODE_NAME) or environment.get("SLURMD_NODENAME") or socket.gethostname()
    if in_step is not None and (in_step < nodes or (in_step > nodes and not config.restarts)):
        raise ConfigError(
            f"launch.nodes={nodes} and this Slurm step runs on {in_step} nodes; leave launch.nodes out, or use "
            f"srun --nodes={nodes} --ntasks-per-node=1"
        )
    identity = int(environment["SLURM_NODEID"]) if in_step is not None else None
    if config.rendezvous:
        return RendezvousParameters(nodes, name, *split_address(config.rendezvous), identity, hosts)
    if in_step is None:
        raise ConfigError(
            f"launch.nodes={nodes} needs launch.rendezvous=HOST:PORT, the first node's address, the same on every node"
        )
    # Each start of a job, and each of its steps, has a port of its own: a lost node's processes may outlive their step
    job, restart, step = (int(environment.get(name) or "0") for name in SLURM_START)
    port = FIRST_PORT + (job * 64 + restart * 8 + step) % NUM_PORTS
    if not hosts:
        raise ConfigError("Slurm names no nodes (SLURM_STEP_NODELIST); give launch.rendezvous=HOST:PORT")
    return RendezvousParameters(nodes, name, hosts[0], port, identity, hosts)


def find_identity(folder: Path, environment: Mapping[str, str]) -> Identity:
    """What all nodes of one run, and none of another, have in common."""
    identity = {"run folder": str(folder.absolute())}
    if slurm_nodes(environment) is not None:
        identity["Slurm job"] = ".".join(environment.get(name) or "0" for name in SLURM_START)
    return identity


def expand_hosts(nodes: str) -> list[str]:
    """The names of Slurm's compact list: `a[01-03,7]-ib,b2` → `a01-ib`, `a02-ib`, `a03-ib`, `a7-ib`, `b2`."""
    found = []
    for entry in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        parts = [expand_numbers(part) if part.startswith("[") else [part] for part in re.split(r"(\[[^\]]*\])", entry)]
        found += ["".join(words) for words in itertools.product(*parts)]
    return found


def expand_numbers(brackets: str) -> list[str]:
    """`[01-03,7]` → `01`, `02`, `03`, `7`."""
    found = []
    for part in brackets.strip("[]").split(","):
        first, _, last = part.partition("-")
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
    return found


def is_own(host: str) -> bool:
    """Whether an address of this name belongs to this machine."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return any(can_bind(family, address[0]) for family, _, _, _, address in found)


def can_bind(family: int, address: str | int) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True
