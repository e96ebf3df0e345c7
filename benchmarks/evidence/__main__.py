"""Experiments for the technical report's claims: run what is registered, show what is done, draw the page.

    python -m benchmarks.evidence run --workers 2 --hours 8    starts or resumes; results go to docs/evidence/runs
    python -m benchmarks.evidence status                       runs done and left, and their time
    python -m benchmarks.evidence draw                         docs/evidence.md and its pictures

A claim is registered by its file in docs/evidence/claims, which is committed before its first run.
"""

from __future__ import annotations

import argparse
from collections import Counter

from benchmarks.common import print_table, run_main
from benchmarks.evidence import widths
from benchmarks.evidence.claims import Claim, load
from benchmarks.evidence.looks import look, seeds_wanted
from benchmarks.evidence.page import draw
from benchmarks.evidence.run import run, wanted
from longcat.errors import OK


def status(claims: list[Claim]) -> int:
    """Print runs done of those wanted so far, their time, and the verdicts up to now."""
    rows = []
    for claim in claims:
        jobs = {job.key: job for _, job in wanted(claim)}
        results = [job.result for job in jobs.values() if job.result]
        hours = sum(result.seconds for result in results) / 3600
        verdicts = Counter(verdict for _, verdict in look(claim, seeds_wanted(claim)))
        text = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()) or widths.verdict()
        rows.append([claim.name, f"{len(results)} of {len(jobs)}", f"{hours:.1f}", text])
    print_table("evidence", ["claim", "runs", "hours of one core", "comparisons"], rows)
    return OK


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "status", "draw"))
    parser.add_argument("claims", nargs="*", help="names of claims; none = all")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--hours", type=float, default=1e6, help="save and stop after this long")
    arguments = parser.parse_args()
    if arguments.workers < 1 or not arguments.hours > 0:
        parser.error("--workers must be at least 1 and --hours above 0, or nothing would run")
    known = load() | {widths.NAME: widths.load().claim}
    if unknown := set(arguments.claims) - set(known):
        parser.error(f"unknown claims {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    claims = [known[name] for name in arguments.claims or known]
    if arguments.action == "run":
        return run(claims, arguments.workers, arguments.hours)
    return status(claims) if arguments.action == "status" else draw(list(load().values()))


if __name__ == "__main__":
    run_main(main)
