"""Seconds from a fault to the end of the next step, beside a bare start's to the end of its first step.

    python -m benchmarks.restarts --rounds 4 -- model=tiny

Each round starts a run of two node runners on this machine, each with one rank, times its first step, and then plants a
fault of each kind in it, so that starts and restarts alternate. `one machine` is the same with two ranks under one
`longcat train`. A hang waits for parallel.timeout_seconds, a lost node for launch.node_timeout: they are told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from tests.support.soak import PLANT, Cluster, Soak

BARE = "bare start"
KINDS = ("kill -9", "NaN", "corrupt checkpoint", "kill -9", "hang", "node lost")
TIMEOUT, NODE_TIMEOUT = 10, 20
RUN = [
    "train.steps=100000",
    "checkpoint.every=5",
    "validation.every=0",
    "validation.documents=0",
    "logging.wandb=disabled",
    "parallel.fsdp=2",
    "run.name=run",
    "launch.restarts=20",
    "launch.backoff_seconds=0.1",
    "launch.on_unhealthy=retry",
    f"launch.node_timeout={NODE_TIMEOUT}",
    f"parallel.timeout_seconds={TIMEOUT}",
]
Times = dict[tuple[str, str], list[tuple[float, float]]]  # (way, kind) → seconds to all ranks' end, to the next step


def measure_fault(soak: Soak, kind: str) -> tuple[float, float]:
    """Plant a fault after some steps → seconds until all ranks had ended, and until a later start finished a step."""
    cluster = soak.cluster
    before = cluster.rows()
    cluster.wait("steps", lambda: len(cluster.rows() - before) > 7)
    incarnation, ranks = soak.newest("start"), cluster.ranks()
    rank = soak.chance.choice(sorted(ranks))
    if kind == "node lost" and ranks[rank][1] == cluster.first:
        rank = 1 - rank
    pid, node = ranks[rank]
    planted = time.time()
    PLANT[kind](soak, rank, pid, node, soak.ended(incarnation))
    cluster.wait("the next start", lambda: soak.newest("start") > incarnation)
    known = cluster.rows()
    cluster.wait("the next step", lambda: bool(cluster.rows() - known))
    finished = time.time()
    end = next(line for line in cluster.journal() if line["event"] == "end" and line["incarnation"] == incarnation)
    return end["time"] - planted, finished - planted


def run_round(words: Sequence[str], way: str, seed: int, times: Times) -> None:
    """A bare start and the faults that follow it."""
    one = way == "one machine"
    own = ["run.num_processes=2"] if one else ["run.num_processes=1", "launch.nodes=2", "launch.join_seconds=600"]
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        with Cluster([*words, *RUN, *own, f"run.dir={folder}"], folder / "run", folder / "nodes") as cluster:
            began = time.time()
            for name in "a" if one else "ab":
                cluster.start(name)
            cluster.wait("a first step", lambda: bool(cluster.rows()))
            times[way, BARE].append((0.0, time.time() - began))
            if not one:
                cluster.start("c")  # a spare
                cluster.wait_for_members()
            soak = Soak(cluster, seed)
            for kind in KINDS:
                if not (one and kind == "node lost"):
                    times[way, kind].append(measure_fault(soak, kind))
                    print(f"{way}, {kind}: {times[way, kind][-1]}", flush=True)


def rows(times: Times) -> list[list[object]]:
    """Way and kind → how often, medians, the ratio to the bare start of the same way."""
    table = []
    for (way, kind), found in sorted(times.items()):
        bare = median(seconds for _, seconds in times[way, BARE])
        ended, stepped = (median(column) for column in zip(*found, strict=True))
        most = max(seconds for _, seconds in found)
        first = None if kind == BARE else round(ended, 2)
        table.append([way, kind, len(found), first, round(stepped, 1), round(most, 1), round(stepped / bare, 2)])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=["nodes", "one machine"])
    parser.add_argument("words", nargs="*", default=["model=tiny"])
    options = parser.parse_args()
    times: Times = defaultdict(list)
    load = os.getloadavg()[0]
    for number in range(options.rounds):
        for way in options.ways:
            run_round(options.words, way, random.Random(number).randrange(1 << 30), times)
    columns = ["start", "fault", "times", "s to the end of all ranks", "s to the next step", "at most", "× bare start"]
    print(json.dumps({"columns": columns, "rows": rows(times), "load": [load, os.getloadavg()[0]]}))


if __name__ == "__main__":
    main()
