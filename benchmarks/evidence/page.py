"""docs/evidence.md: for each claim a verdict in words, a figure, a table, the command and the time that it took."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks.evidence import token_kinds, widths
from benchmarks.evidence.claims import FOLDER, Claim, Comparison, Expectation
from benchmarks.evidence.jobs import RESULTS, Result
from benchmarks.evidence.looks import OVERALL, best_value, judged_job, level, look, seeds_wanted
from benchmarks.evidence.measures import MEASURES, Interval, Verdict
from benchmarks.evidence.picture import draw_claim, draw_kinds, draw_overview, draw_widths
from benchmarks.evidence.run import wanted
from longcat.errors import ConfigError

PAGE = Path("docs/evidence.md")
FEW = 4  # comparisons that are also told in sentences; more are a table alone
MANY = 8  # comparisons up to which all of them are shown at once
HEAD = """# Evidence

The technical report's claims about its model, tried again at a size that any machine can train: one experiment for each
claim of its evidence. Every claim was **registered before its first run**: a file of
[evidence/claims](evidence/claims) names the arms, what is equal between them, the measure, the number of seeds and what
counts as shown. Arms share seed, data order and the initial values of all tensors whose shapes agree, so what is judged
is the difference between two runs of one seed. A claim that this size does not show is reported so, with the size of
effect that would have been seen.

- *Shown*: the whole interval lies on the expected side of zero (or, for "equal", inside the margin). *Refuted*: it lies
  wholly on the other side. *Not shown*: neither. A claim is shown where all of its comparisons are, and *unfinished*
  while runs are missing.
- Intervals hold with {overall} over both looks at the data: the first after the smaller number of seeds, the second,
  only where the first decides nothing, after the larger.
- `python -m benchmarks.evidence run --workers 2` makes all runs again, one thread each, and resumes when it was
  stopped. Each run leaves a small file in the folder evidence/runs. `python -m benchmarks.evidence draw` writes
  this page. Up to now the runs took {hours} hours of one processor core; {left} of {all} are left.

- The same run on a later version of the program ended up to 0.007 nats away (15 runs, standard deviation 0.003): a
  single pair of runs says nothing about smaller differences.
- FFN experts are the experts that compute; K_e is how many of them a token should use on average (the compute budget),
  N and Z are the numbers of FFN and identity experts. *Maximum violation*: the busiest FFN expert's load over the mean,
  minus 1, largest over layers; by global batch it is of training text over the last fifth of the run, by micro-batch of
  validation text at the end. *Swing*: the standard deviation of a step's mean FFN experts. *Spread between tokens*: the
  standard deviation of the FFN experts of a layer's tokens, on validation text.

The model has 2.35M parameters and sees 1 million tokens of Python source
([evidence.yaml]({experiment})), where a claim says nothing else. Effects at this size need
not be those of large models.

## Verdicts

{verdicts}
"""


def draw(claims: list[Claim]) -> int:
    """Write the page and a picture for each claim that has results."""
    sweep = widths.load().claim
    kinds = token_kinds.registered()
    jobs = {job.key: job for claim in [*claims, sweep] for _, job in wanted(claim)}
    results = [job.result for job in jobs.values() if job.result]
    for claim in [*claims, sweep]:
        check_corpus(claim)
    parts = [Part(one.title, one.report, verdict_of(one), *progress(one), section(one)) for one in claims]
    tree, drawn_kinds = kinds.tree, draw_kinds(kinds, Path(f"docs/images/evidence/{token_kinds.NAME}.png"))
    text = "\n".join(token_kinds.section(drawn_kinds))
    parts.append(Part(tree["title"], tree["report"], kinds.verdict(), len(kinds.results()), tree["seeds"], text))
    drawn_widths = draw_widths(widths.load(), Path(f"docs/images/evidence/{widths.NAME}.png"))
    text = "\n".join(widths.section(drawn_widths))
    parts.append(Part(sweep.title, sweep.report, widths.verdict(), *progress(sweep), text))
    parts.sort(key=lambda part: part.verdict == Verdict.UNFINISHED)
    overview = Path("docs/images/evidence/overview.png")
    drawn = draw_overview(claims, overview)
    head = HEAD.format(
        overall=f"{OVERALL:.0%}".replace("%", " %"),
        hours=f"{sum(result.seconds for result in results) / 3600:.1f}",
        left=len(jobs) - len(results),
        all=len(jobs),
        experiment="../configs/experiment/evidence.yaml",
        verdicts="\n".join(
            ["| claim | in the report | here | runs |", "|---|---|---|---|", *(part.row for part in parts)]
        )
        + (
            f"\n\n![Differences in loss with their intervals, by claim]({overview.relative_to('docs')})"
            if drawn
            else ""
        ),
    )
    PAGE.write_text("\n".join([head, *(part.text for part in parts)]), encoding="utf-8")
    return 0


@dataclass(frozen=True)
class Part:
    """A claim on the page."""

    title: str
    report: str  # what the technical report says
    verdict: str
    done: int  # runs
    wanted: int
    text: str  # its section

    @property
    def row(self) -> str:
        """Its line in the table of verdicts."""
        link = f"[{self.title}](#{anchor(self.title)})"
        return f"| {link} | {self.report} | {self.verdict} | {self.done} of {self.wanted} |"


def progress(claim: Claim) -> tuple[int, int]:
    """Runs done, and wanted up to now."""
    jobs = {job.key: job for _, job in wanted(claim)}
    return sum(job.result is not None for job in jobs.values()), len(jobs)


def check_corpus(claim: Claim) -> None:
    """Refuse results of one claim on several corpora.

    Raises:
        ConfigError: they cannot be compared.
    """
    corpora = {job.result.corpus for _, job in wanted(claim) if job.result}
    if len(corpora) > 1:
        raise ConfigError(
            f"{RESULTS} has results of {claim.name} on {len(corpora)} corpora, which cannot be compared; "
            f"keep those of one"
        )


def anchor(title: str) -> str:
    """The name that GitHub gives to a heading."""
    kept = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -")
    return kept.replace(" ", "-")


def verdict_of(claim: Claim) -> str:
    """One word: shown where all comparisons are, refuted where one is, unfinished where runs are missing."""
    verdicts = {verdict for _, verdict in look(claim, seeds_wanted(claim))}
    for one in (Verdict.UNFINISHED, Verdict.REFUTED, Verdict.NOT_SHOWN, Verdict.SHOWN):
        if one in verdicts:
            return one
    return Verdict.OPEN


def section(claim: Claim) -> str:
    """The claim's part of the page."""
    seeds = seeds_wanted(claim)
    found = look(claim, seeds)
    jobs = {job.key: job for _, job in wanted(claim)}
    results = [job.result for job in jobs.values() if job.result]
    lines = [f"## {claim.title}", ""]
    lines += [
        f"**{verdict_of(claim).capitalize()}.** In the report: {claim.report}. Equal here: {claim.equal}".strip(),
        "",
    ]
    for comparison, (bounds, verdict) in zip(claim.comparisons, found, strict=True):
        if verdict != Verdict.UNFINISHED and len(claim.comparisons) <= FEW:
            lines.append(f"- {sentence(claim, comparison, bounds, verdict)}")
    if claim.notes:
        lines += [*([""] if lines[-1] else []), claim.notes.strip()]
    picture = Path("docs/images/evidence") / f"{claim.name}.png"
    if draw_claim(claim, seeds, picture):
        lines += ["", f"![{claim.title}: losses and paired differences]({picture.relative_to('docs')})"]
    lines += ["", *arms_table(claim, seeds), ""]
    differences = table(claim, found)
    if len(claim.comparisons) > MANY:
        differences = ["<details><summary>All differences</summary>", "", *differences, "", "</details>"]
    lines += differences
    hours = sum(result.seconds for result in results) / 3600
    lines += [
        "",
        f"[Registered]({FOLDER.name}/claims/{claim.name}.yaml); {len(results)} of {len(jobs)} runs, {hours:.1f} hours "
        f"of one core (claims share runs of the same configuration). "
        f"`python -m benchmarks.evidence run {claim.name}`",
        "",
    ]
    return "\n".join(lines)


def arms_table(claim: Claim, seeds: int) -> list[str]:
    """One row for each arm: what it is, and what was measured over the seeds that all arms have."""
    measures = list(dict.fromkeys(one.measure for one in claim.comparisons))
    heads = [f"{MEASURES[name].title}{f', {unit}' if (unit := MEASURES[name].unit) else ''}" for name in measures]
    results = {arm: [judged_result(claim, arm, seed) for seed in range(1, seeds + 1)] for arm in claim.arms}
    common = [place for place in range(seeds) if all(of_arm[place] for of_arm in results.values())]
    lines = [f"| arm | {' | '.join(heads)} | what it is |", f"|---|{'---|' * (len(heads) + 1)}"]
    for arm in claim.arms.values():
        tuned = best_value(claim, arm.name) if claim.tuning else None
        rate = f"; {claim.tuning.key} {tuned:g}" if claim.tuning and tuned is not None else ""
        found = [one for place in common if (one := results[arm.name][place])]
        cells = [over_seeds([MEASURES[name].of(one) for one in found]) for name in measures]
        lines.append(f"| `{arm.name}` | {' | '.join(cells)} | {arm.what}{rate} |")
    told = f"Mean ± standard deviation over {len(common)} seeds; what is judged are the paired differences."
    return [*lines, "", told]


def judged_result(claim: Claim, arm: str, seed: int) -> Result | None:
    job = judged_job(claim, arm, seed)
    return job.result if job else None


def over_seeds(values: list[float]) -> str:
    """Mean ± standard deviation; without those that are not finite, whose number it tells."""
    finite = [one for one in values if math.isfinite(one)]
    lost = f" ({len(values) - len(finite)} not finite)" if len(finite) < len(values) else ""
    if not finite:
        return lost.strip()
    mean = number(statistics.fmean(finite), sign=False)
    return (f"{mean} ± {number(statistics.stdev(finite), sign=False)}" if len(finite) > 1 else mean) + lost


def table(claim: Claim, found: list[tuple[Interval, str]]) -> list[str]:
    """One row for each comparison of which a pair of runs is done."""
    if not any(bounds.seeds for bounds, _ in found):
        return ["No pair of runs is done yet."]
    lines = ["| difference | measure | expected | mean | interval | seeds | verdict |", "|---|---|---|---|---|---|---|"]
    for comparison, (bounds, verdict) in zip(claim.comparisons, found, strict=True):
        if not bounds.seeds:
            continue
        measure = MEASURES[comparison.measure]
        unit = f", {measure.unit}" if measure.unit else ""
        expected = {
            Expectation.below: "below 0",
            Expectation.above: "above 0",
            Expectation.equal: f"within ±{comparison.margin:g}",
            Expectation.open: "",
        }[comparison.expect]
        span = "" if math.isnan(bounds.low) else f"{number(bounds.low)} to {number(bounds.high)}"
        average = "" if math.isnan(bounds.mean) else number(bounds.mean)
        lines.append(
            f"| {comparison.first} − {comparison.second} | {measure.title}{unit} | {expected} | {average} | {span} | "
            f"{bounds.seeds} | {verdict} |"
        )
    if missing := sum(not bounds.seeds for bounds, _ in found):
        lines += ["", f"Of {missing} further comparisons no pair of runs is done yet."]
    return lines


def sentence(claim: Claim, comparison: Comparison, bounds: Interval, verdict: str) -> str:
    """The comparison's outcome in words."""
    measure = MEASURES[comparison.measure]
    if math.isnan(bounds.low):
        return (
            f"{verdict}: runs of `{comparison.first}` or `{comparison.second}` ended with numbers that are not finite."
        )
    side = "below" if bounds.mean < 0 else "above"
    unit = f" {measure.unit}" if measure.unit else ""
    text = (
        f"`{comparison.first}` ends {number(abs(bounds.mean), sign=False)}{unit} {side} `{comparison.second}` in "
        f"{measure.title}, ± {number(bounds.half_width, sign=False)} ({level(claim) * 100:g} % interval, "
        f"{bounds.seeds} seeds): {verdict}."
    )
    if verdict == Verdict.NOT_SHOWN:
        text += f" A difference of {number(bounds.half_width, sign=False)} would have been told from none."
    return text


def number(value: float, sign: bool = True) -> str:
    """Three decimals, or three digits for small ones, with a real minus."""
    digits = 3 if abs(value) >= 0.01 or value == 0 else 4
    return (f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}").replace("-", "−")
