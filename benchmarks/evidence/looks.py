"""What is judged: the runs of each arm and seed, their paired differences, and the verdicts of one or two looks."""

from __future__ import annotations

from benchmarks.evidence.claims import Claim
from benchmarks.evidence.jobs import Job
from benchmarks.evidence.measures import MEASURES, Interval, Verdict, interval, judge

OVERALL = 0.95  # confidence of a claim's intervals over both looks at the data
FINAL = "final_loss"


def level(claim: Claim) -> float:
    """Confidence of one look: with a second look at more seeds, each takes half of the error (Bonferroni)."""
    return OVERALL if claim.least == claim.most else 1 - (1 - OVERALL) / 2


def best_value(claim: Claim, arm: str) -> float | None:
    """The tuned key's value with the lowest final loss of this arm; None while its runs are missing."""
    assert claim.tuning is not None
    losses = {}
    for value in claim.tuning.values:
        result = Job(claim, claim.arms[arm], claim.tuning.seed, value).result
        if result is None:
            return None
        losses[value] = MEASURES[FINAL].of(result)
    return min(losses, key=lambda value: losses[value])


def judged_job(claim: Claim, arm: str, seed: int) -> Job | None:
    """The run of an arm with one seed; None while the arm's tuned value is not known."""
    if claim.tuning is None:
        return Job(claim, claim.arms[arm], seed)
    value = best_value(claim, arm)
    return None if value is None else Job(claim, claim.arms[arm], seed, value)


def differences(claim: Claim, first: str, second: str, measure: str, seeds: int) -> list[float]:
    """First arm minus second, for each of the first ``seeds`` seeds of which both runs are there."""
    found = []
    for seed in range(1, seeds + 1):
        jobs = [judged_job(claim, arm, seed) for arm in (first, second)]
        results = [job.result for job in jobs if job]
        if len(results) == 2 and results[0] and results[1]:
            numbers = [MEASURES[measure].of(result) for result in results if result]
            found.append(0.0 if numbers[0] == numbers[1] else numbers[0] - numbers[1])
    return found


def look(claim: Claim, seeds: int) -> list[tuple[Interval, str]]:
    """Interval and verdict of each comparison after ``seeds`` seeds; UNFINISHED where runs are missing."""
    found = []
    for one in claim.comparisons:
        numbers = differences(claim, one.first, one.second, one.measure, seeds)
        bounds = interval(numbers, level(claim))
        found.append((bounds, judge(one, bounds) if len(numbers) == seeds else Verdict.UNFINISHED))
    return found


def seeds_wanted(claim: Claim) -> int:
    """`least` seeds; `most` where the first look leaves a comparison undecided."""
    undecided = any(verdict == Verdict.NOT_SHOWN for _, verdict in look(claim, claim.least))
    return claim.most if undecided else claim.least
