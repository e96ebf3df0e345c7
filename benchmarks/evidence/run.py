"""Runs what the claims ask for, a process a core, until nothing is left or time is up; stopped runs resume."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.evidence import routing, token_kinds
from benchmarks.evidence.claims import Claim
from benchmarks.evidence.jobs import Job
from benchmarks.evidence.looks import judged_job, seeds_wanted
from benchmarks.evidence.widths import register_forecast
from longcat.errors import OK, STOPPED, UNHEALTHY

ROOT = Path(__file__).resolve().parents[2]


def wanted(claim: Claim) -> list[tuple[int, Job]]:
    """(round, run) of everything that the claim asks for as far as it is known; round 0 tunes, round n is seed n."""
    rounds: list[tuple[int, Job]] = []
    if claim.tuning:
        for arm in claim.arms.values():
            rounds += [(0, Job(claim, arm, claim.tuning.seed, value)) for value in claim.tuning.values]
    for seed in range(1, seeds_wanted(claim) + 1):
        jobs = (judged_job(claim, arm, seed) for arm in claim.arms)
        rounds += [(seed + job.arm.turn, job) for job in jobs if job]
    return rounds


def queue(claims: list[Claim]) -> list[Job]:
    """Runs without a result or its kinds of tokens, each once: first seeds of all claims before second ones."""
    found: dict[str, Job] = {}
    for _, job in sorted(((turn, job) for claim in claims for turn, job in wanted(claim)), key=lambda pair: pair[0]):
        if job.result is None or token_kinds.registered().wants(job):
            found.setdefault(job.key, job)
    return list(found.values())


@dataclass
class Runner:
    """Processes that train, at most ``workers`` at a time, until ``end`` (time.monotonic)."""

    claims: list[Claim]
    workers: int
    end: float
    running: dict[str, tuple[Job, subprocess.Popen[bytes]]] = field(default_factory=dict)
    stopping: bool = False
    failed: list[str] = field(default_factory=list)

    def run(self) -> int:
        """Returns 0 when every wanted run has a result, 3 when stopped, 1 when a run failed."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: self.stop())
        waiting = queue(self.claims)
        while True:
            if self.collect():
                register_forecast()
                waiting = queue(self.claims)
            left = [job for job in waiting if job.key not in self.running and job.label not in self.failed]
            ready = [job for job in left if job.source is None or job.source.result is not None]
            if self.end - time.monotonic() < 1:
                self.stop()
            while ready and len(self.running) < self.workers and not self.stopping:
                self.start(ready.pop(0))
            if not self.running:
                if self.failed:
                    return 1
                if self.stopping and left:
                    return STOPPED
                print("every run that is wanted has its result; one whose file is removed is made again")
                return OK
            time.sleep(1.0)

    def start(self, job: Job) -> None:
        print(f"{time.strftime('%H:%M')} {job.key} {job.label}", flush=True)
        job.prepare()
        job.folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "benchmarks.evidence.train_arm", *job.command(self.end - time.monotonic())]
        with (job.folder / "output.txt").open("ab") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        self.running[job.key] = job, process

    def collect(self) -> bool:
        """Store the results of runs that have ended; whether there were any."""
        before = len(self.running)
        for key, (job, process) in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[key]
            if code in (OK, UNHEALTHY):
                if job.result is None:
                    job.store(code)
                if token_kinds.registered().wants(job):
                    token_kinds.measure(job)
                if job.result is None:  # it would be started again without end
                    self.failed.append(job.label)
                    print(f"error: {job.label} left no {routing.FILE} in {job.folder}", file=sys.stderr)
            elif code != STOPPED and not (self.stopping and code == -signal.SIGTERM):
                self.failed.append(job.label)
                print(f"error: {job.label} ended with code {code}; see {job.folder}/output.txt", file=sys.stderr)
        return len(self.running) < before

    def stop(self) -> None:
        """Ask every run to save and stop, once."""
        if not self.stopping:
            self.stopping = True
            for _, process in self.running.values():
                process.terminate()  # before its handler is set this ends it, and nothing is lost


def run(claims: list[Claim], workers: int, hours: float) -> int:
    return Runner(claims, workers, time.monotonic() + hours * 3600).run()
