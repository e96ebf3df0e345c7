"""Starts rehearsals in a process of their own, and compares what ranks did."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from tests.support.distributed import ROOT

Found = dict[str, Any]  # the fields of `tests.rehearsal.recorder.Found`


def rehearsals(jobs: list[dict[str, Any]], timeout: float = 600) -> list[dict[int, Found]]:
    """What each rank of each job did; a job has the fields of `tests.rehearsal.step.Rehearsal`."""
    command = [sys.executable, "-m", "tests.rehearsal", json.dumps(jobs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-6000:]
    found: list[dict[str, Found]] = json.loads(done.stdout.splitlines()[-1])
    return [{int(rank): one for rank, one in job.items()} for job in found]


def differences(by_rank: dict[int, Found]) -> list[str]:
    """Groups whose members do not start the same collectives in the same order, and messages that do not meet."""
    wrong = []
    for kind in ("collectives", "messages"):
        for key in {key for found in by_rank.values() for key in found[kind]}:
            members = key.rpartition(" ")[2].split(",") if kind == "collectives" else key.split(">")
            recorded = {rank: by_rank[rank][kind].get(key, []) for rank in map(int, members) if rank in by_rank}
            if len({tuple(sequence) for sequence in recorded.values()}) > 1:
                wrong.append(f"{kind} {key}: {first_difference(recorded)}")
    return wrong


def first_difference(recorded: dict[int, list[str]]) -> str:
    """Where sequences part, and what each rank has there."""
    longest = max(map(len, recorded.values()))
    for place in range(longest):
        here = {rank: (*sequence, *["nothing"] * longest)[place] for rank, sequence in recorded.items()}
        if len(set(here.values())) > 1:
            return f"number {place} is {here}"
    return ""
