"""What a comparison measures of one run: a number from its stored curve, and the intervals of paired differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.evidence.claims import Comparison, Expectation
from benchmarks.evidence.jobs import Result, composed

TAIL = 0.2  # share of the run, at its end, over which the balance is measured


@dataclass(frozen=True)
class Measure:
    """A number of one run, with its unit; a run whose numbers became NaN or infinite has none for a loss."""

    title: str
    unit: str
    of: Callable[[Result], float]


def final_loss(result: Result) -> float:
    """Validation loss after the last step; infinite where the run ended unhealthy."""
    losses = result.column("val_loss")
    return losses[-1] if losses and result.code == 0 else math.inf


def largest_hidden_norm(result: Result) -> float:
    """log10 of the largest hidden norm of any step (a mean over the step's tokens)."""
    return math.log10(max(result.column("hidden_norm_max")))


def tail(result: Result, name: str) -> np.ndarray:
    numbers = np.array(result.column(name), dtype=float)
    return numbers[-max(1, round(TAIL * len(numbers))) :]


def budget_error(result: Result) -> float:
    """|mean FFN experts / K_e − 1| in percent, over the last fifth of the run."""
    target = expert_target(result)
    return float(abs(tail(result, "ffn_experts").mean() / target - 1) * 100)


def budget_swing(result: Result) -> float:
    """Standard deviation of the step's mean FFN experts, over the last fifth, as a percentage of K_e."""
    return float(tail(result, "ffn_experts_std").mean() / expert_target(result) * 100)


def max_violation(result: Result) -> float:
    """Load of the busiest FFN expert over the mean, minus 1, largest over layers: mean over the last fifth."""
    return float(tail(result, "load_max_over_mean").mean() - 1)


def micro_batch_violation(result: Result) -> float:
    """As `max_violation`, in one micro-batch of validation text, at the end of the run."""
    return result.routing.get("micro_batch_violation", math.nan)


def token_spread(result: Result) -> float:
    """Standard deviation of the FFN experts between a layer's tokens of validation text, at the end of the run."""
    return result.routing.get("token_spread", math.nan)


def after_change(result: Result, name: str) -> float:
    """A column's value over the first window after the first stage of `data.stages` began."""
    start = composed(tuple(result.overrides)).data.stages[0].start_tokens
    tokens, numbers = result.column("tokens"), result.column(name)
    return next(value for count, value in zip(tokens, numbers, strict=True) if count > start)


def budget_error_after_change(result: Result) -> float:
    """|mean FFN experts / K_e − 1| in percent, over the first 25 steps after the data changed."""
    return abs(after_change(result, "ffn_experts") / expert_target(result) - 1) * 100


def max_violation_after_change(result: Result) -> float:
    """As `max_violation`, over the first 25 steps after the data changed."""
    return after_change(result, "load_max_over_mean") - 1


def expert_target(result: Result) -> float:
    """K_e of the run."""
    return composed(tuple(result.overrides)).model.expected_ffn_experts


MEASURES = {
    "final_loss": Measure("validation loss at the end", "nats/token", final_loss),
    "largest_hidden_norm": Measure("largest hidden norm", "log10", largest_hidden_norm),
    "budget_error": Measure("error of the compute budget", "% of K_e", budget_error),
    "budget_swing": Measure("swing of the compute budget", "% of K_e", budget_swing),
    "max_violation": Measure("maximum violation by global batch", "", max_violation),
    "micro_batch_violation": Measure("maximum violation by micro-batch", "", micro_batch_violation),
    "token_spread": Measure("spread between tokens", "FFN experts", token_spread),
    "budget_error_after_change": Measure(
        "error of the compute budget after the change", "% of K_e", budget_error_after_change
    ),
    "max_violation_after_change": Measure(
        "maximum violation by global batch after the change", "", max_violation_after_change
    ),
}


def t_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t distribution, by integrating its density; good to 1e-4 for probabilities to 0.999."""
    grid = np.linspace(0.0, 400.0, 400_001)
    scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    density = np.exp(scale - (freedom + 1) / 2 * np.log1p(grid**2 / freedom))
    area = 0.5 + np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(grid))))
    return float(np.interp(probability, area, grid))


@dataclass(frozen=True)
class Interval:
    """A paired difference: its mean over seeds with a confidence interval; NaN bounds with fewer than two seeds."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def half_width(self) -> float:
        """The smallest size of effect that would have been told from 0."""
        return (self.high - self.low) / 2


def interval(differences: list[float], level: float) -> Interval:
    """Student's interval of the mean of paired differences."""
    count = len(differences)
    average = sum(differences) / count if count else math.nan
    if count < 2 or not all(math.isfinite(one) for one in differences):
        return Interval(average, math.nan, math.nan, count)
    deviation = math.sqrt(sum((one - average) ** 2 for one in differences) / (count - 1))
    half = t_quantile(0.5 + level / 2, count - 1) * deviation / math.sqrt(count)
    return Interval(average, average - half, average + half, count)


class Verdict:
    """Words of a verdict."""

    SHOWN, NOT_SHOWN, REFUTED, OPEN, UNFINISHED = "shown", "not shown", "refuted", "reported", "unfinished"


def judge(comparison: Comparison, found: Interval) -> str:
    """The verdict on one comparison by the rule that was registered with it."""
    if comparison.expect == Expectation.open:
        return Verdict.OPEN
    if math.isnan(found.low):
        return infinite_verdict(comparison, found)
    if comparison.expect == Expectation.equal:
        if -comparison.margin < found.low and found.high < comparison.margin:
            return Verdict.SHOWN
        return Verdict.REFUTED if abs_outside(found, comparison.margin) else Verdict.NOT_SHOWN
    sign = 1 if comparison.expect == Expectation.below else -1
    low, high = sorted((sign * found.low, sign * found.high))
    return Verdict.SHOWN if high < 0 else Verdict.REFUTED if low > 0 else Verdict.NOT_SHOWN


def infinite_verdict(comparison: Comparison, found: Interval) -> str:
    """Runs of one arm that did not survive decide, where all of them did not and the other arm's did."""
    if found.seeds < 2 or not math.isinf(found.mean):
        return Verdict.NOT_SHOWN
    is_below = found.mean < 0
    if comparison.expect == Expectation.equal:
        return Verdict.REFUTED
    return Verdict.SHOWN if is_below == (comparison.expect == Expectation.below) else Verdict.REFUTED


def abs_outside(found: Interval, margin: float) -> bool:
    return found.low > margin or found.high < -margin
