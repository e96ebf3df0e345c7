"""Seconds and CPU seconds from `torchrun` to the end of step 1, by rank; steps end when metrics.jsonl has their line.

    python -m benchmarks.startup --ranks 2 -- model=tiny
    python -m benchmarks.startup --ranks 32 --steps 3 -- model=debug

Every rank starts on this machine. CPU seconds are those of the rank's process when step 1 was logged; with more ranks
than processors the wall time is mostly their sum divided by the processors. `seconds_by_part` is what the first rank
writes into metrics.jsonl; `seconds_outside` went before its process began and after its step.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from train.process.search_path import ROOT
from train.process.start_clock import PARTS, PREFIX
from train.run_dir.sealed import intact_lines

LIMIT = 900.0  # seconds until a run that does not come to step 1 is given up


def ranks_of(agent: psutil.Process) -> list[psutil.Process]:
    """The agent's children that are ranks."""
    return [child for child in agent.children() if "RANK" in child.environ()]


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def measure(ranks: int, words: list[str], steps: int) -> dict[str, Any]:
    """Start the ranks, wait for the line of step 1 and for the end."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "startup" / "metrics.jsonl"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--no-python"]
        command += [sys.executable, "-P", "-m", "train", *words, f"train.steps={steps}"]
        command += [f"run.dir={folder}", "run.name=startup", "logging.wandb=disabled", "validation.every=0"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": ROOT}
        load = os.getloadavg()[0]
        started = time.perf_counter()
        agent = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = {"ranks": ranks, "overrides": words, "load_before": load}
        try:
            while not (metrics.is_file() and metrics.read_text().count("\n")):
                if agent.poll() is not None or time.perf_counter() - started > LIMIT:
                    raise SystemExit(f"no step 1 after {time.perf_counter() - started:.0f} s, code {agent.poll()}")
                time.sleep(0.02)
            found["seconds_to_step_1"] = time.perf_counter() - started
            processes = ranks_of(psutil.Process(agent.pid))
            cpu = sorted(cpu_seconds(process) for process in processes)
            found["cpu_seconds_per_rank"] = {"least": cpu[0], "median": cpu[len(cpu) // 2], "most": cpu[-1]}
            found["rss_mib"] = max(process.memory_info().rss for process in processes) / 2**20
            found["descriptors"] = max(process.num_fds() for process in processes)
            code = agent.wait(LIMIT)
        finally:
            if agent.poll() is None:
                agent.send_signal(signal.SIGTERM)
        found["seconds_to_end"], found["code"] = time.perf_counter() - started, code
        lines = list(intact_lines(metrics))
        for kind in ("seconds", "cpu_seconds"):
            found[f"{kind}_by_part"] = {part: lines[0][f"{PREFIX}{part}_{kind}"] for part in PARTS}
        found["seconds_outside"] = found["seconds_to_step_1"] - sum(found["seconds_by_part"].values())
        found["step_seconds"] = [line["step_seconds"] for line in lines]
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("overrides", nargs="*", default=["model=tiny"])
    options = parser.parse_args()
    print(json.dumps(measure(options.ranks, options.overrides, options.steps), indent=1))


if __name__ == "__main__":
    main()
