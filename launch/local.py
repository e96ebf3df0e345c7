"""`longcat train` on this machine: one rank in this process, several below it, or a node of several."""

from __future__ import annotations

import os
from pathlib import Path

from launch.nodes.rendezvous import find_place, num_nodes
from longcat.garbage import import_without_collections
from parallel.environment import count_gpus
from train.check import check, check_corpora
from train.config import Config
from train.process.search_path import found_by_children


def num_processes(config: Config) -> int:
    """`run.num_processes`, where -1 is one per GPU, or one on a CPU. Never more than there are GPUs."""
    requested, gpus = config.run.num_processes, count_gpus()
    if requested == -1:
        return max(1, gpus)
    return min(requested, gpus) if gpus else requested


def num_ranks(config: Config) -> int:
    """Ranks of the run, on all its nodes."""
    return num_nodes(config.launch, os.environ) * num_processes(config)


def run_ranks(overrides: list[str], config: Config) -> int:
    """Train on the configured number of ranks, here or on several nodes; returns the run's exit code.

    One rank runs in this process; several run as `python -P -m train` below it. `-P` leaves the current folder out of
    the search for modules, where a user's own train.py may be.
    """
    processes = num_processes(config)
    place = find_place(config.launch, os.environ)
    if place is not None:
        from launch.nodes.node import run_node

        return run_node(overrides, config, place, processes)
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    check(config, processes)  # reports a wrong configuration once, before ranks start
    check_corpora(config)
    if processes == 1 and not config.launch.restarts:
        with import_without_collections("train.process.rank"):
            from train.process.rank import main  # torch

        return main(config)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    from launch.this_machine import run_here

    with found_by_children():
        return run_here(overrides, config, processes)
