"""Exposed communication of ScMoE: two ranks over a link that is slow on purpose.

    sudo .venv/bin/python -m benchmarks.overlap --run runs/quickstart

Two network namespaces with a token bucket between them, one thread per rank, experts sharded over both (ep = 2). A step
is forward and backward of the model of a run that `make train` left, on its own text; gradients of replicated weights
are not reduced. For each router the link's speed is chosen so that a step with blocking collectives is blocked 25 to
30 %. The settings run in turn. Blocked seconds are those of `exposed_comm_share`: from entering a wait to leaving it.

One router is the learned one; the other sends every expert the same number of tokens. `in sequence` is the order of an
ordinary MoE layer: dispatch, experts and combine in sequence, so that only chunks can overlap. `network` is the CPU
time of a rank's network threads: nothing hides it with as many ranks as cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import print_json, print_table
from benchmarks.link import ADDRESSES, inside, shaped_link
from longcat.errors import ConfigError

REPORTED = (0.253, 0.084)  # exposed communication without and with ScMoE's overlap, from the technical report


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", default="runs/quickstart", help="folder of a run with a checkpoint")
    parser.add_argument("--sequences", type=int, default=8, help="per rank")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--blocked", type=float, default=0.275, help="share of a step that is blocked without overlap")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(words: list[str]) -> list[dict[str, Any]]:
    """Run both ranks; returns the figures of each."""
    with tempfile.TemporaryDirectory() as folder, shaped_link():
        ranks = []
        for rank in (0, 1):
            command = [sys.executable, "-m", "benchmarks.overlap", *words, "--rank", str(rank), "--out", folder]
            variables = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29511", "OMP_NUM_THREADS": "1"}
            ranks.append(subprocess.Popen(inside(rank, command), env=os.environ | variables))
        codes = [process.wait() for process in ranks]
        if any(codes):
            raise SystemExit(f"the ranks ended with {codes}")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in (0, 1)]


def together(ranks: list[dict[str, Any]], part: str, name: str) -> dict[str, float]:
    """Medians over rounds, means over ranks, in seconds."""
    kinds = ("step", "blocked", "network", "counts", "dispatch", "combine", "gates")
    found = {
        kind: statistics.mean(statistics.median(row[place] for row in one[part][name]) for one in ranks)
        for place, kind in enumerate(kinds)
    }
    return {**found, "share": found["blocked"] / found["step"]}


def show(title: str, measured: dict[str, dict[str, float]]) -> None:
    kinds = ("step", "blocked", "counts", "dispatch", "combine", "gates", "network")
    rows = [
        [name, f"{one['share']:.1%}", *(f"{one[kind] * 1e3:.0f}" for kind in kinds)] for name, one in measured.items()
    ]
    print_table(f"{title}; milliseconds", ["setting", "exposed", *kinds], rows)


def main() -> None:
    args = arguments()
    if args.rank is not None:
        from benchmarks.overlap_rank import measure_rank

        measure_rank(args)
        return
    words = [f"--{name}={getattr(args, name)}" for name in ("run", "sequences", "rounds", "blocked")]
    try:
        ranks = measure(words)
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    speed = ranks[0]["speed"]
    results = {part: {name: together(ranks, part, name) for name in ranks[0][part]} for part in ("balanced", "learned")}
    for part, measured in results.items():
        show(f"{part} router, link of {speed[part]:.0f} Mbit/s", measured)
    curve = {name: together(ranks, "curve", name) for name in ranks[0]["curve"]}
    show("balanced router, by speed of the link and chunks", curve)
    same = all(one["same_gradients"] for one in ranks)
    print(f"gradients of overlapped and blocking steps with the same chunks are bitwise identical: {same}")
    print(f"tokens to the busier rank over the mean, learned router: {max(one['skew'] for one in ranks):.3f}")
    print("the technical report: {:.1%} exposed without, {:.1%} with ScMoE's overlap".format(*REPORTED))
    print_json("overlap", {"mbit": speed, "same_gradients": same, "curve": curve, **results})


if __name__ == "__main__":
    main()
