"""`python -m tests.rehearsal JOBS`: rehearses what a JSON list describes, prints what each rank did as JSON."""

from __future__ import annotations

import json
import sys

from tests.rehearsal.device import load

if __name__ == "__main__":
    load()
    from tests.rehearsal.step import Rehearsal, rehearse  # imports torch

    jobs = [Rehearsal(**job) for job in json.loads(sys.argv[1])]
    print(json.dumps([{rank: rehearse(job, rank) for rank in job.ranks} for job in jobs]))
