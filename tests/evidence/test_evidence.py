"""Registered claims, their verdicts, and the models that only experiments have."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmarks.evidence.__main__ as evidence
from benchmarks.evidence import jobs, run, token_kinds, widths
from benchmarks.evidence.claims import Claim, Comparison, Expectation, load
from benchmarks.evidence.measures import MEASURES, Interval, Verdict, interval, judge, t_quantile
from benchmarks.evidence.variants import VARIANTS
from longcat.config import ModelConfig
from longcat.init import initialise
from longcat.layer import ShortcutLayer
from longcat.model import LongCat
from train.compose import compose

CLAIMS = load()


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_every_arm_is_a_valid_run(claim: Claim) -> None:
    for arm in claim.arms.values():
        value = claim.tuning.values[0] if claim.tuning else None
        jobs.Job(claim, arm, 1, value).config.validate()
        assert not arm.variant or arm.variant in VARIANTS
    assert all(one.measure in MEASURES for one in claim.comparisons)


@pytest.mark.parametrize("words", [["--workers", "0"], ["--workers=-2"], ["--hours", "0"], ["--hours", "nan"]])
def test_a_runner_that_could_start_nothing_is_refused(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended with 0, as if every run had its result."""
    monkeypatch.setattr("sys.argv", ["evidence", "run", *words])
    monkeypatch.setattr(evidence, "run", lambda *_: 0)
    with pytest.raises(SystemExit, match="2"):
        evidence.main()


def test_equal_runs_are_made_once() -> None:
    """Three claims compare with the same model: they ask for one run of it."""
    arms = [("identity_experts", "identity"), ("shortcut", "shortcut"), ("scale_correction", "corrected")]
    keys = {jobs.Job(CLAIMS[claim], CLAIMS[claim].arms[arm], 3, 6e-3).key for claim, arm in arms}
    assert len(keys) == 1
    assert jobs.Job(CLAIMS["shortcut"], CLAIMS["shortcut"].arms["none"], 3, 6e-3).key not in keys
    grown = CLAIMS["growth"].arms["grown"]
    assert jobs.Job(CLAIMS["growth"], grown, 1).key != jobs.Job(CLAIMS["growth"], grown, 2).key


def test_grown_run_costs_what_full_depth_costs() -> None:
    from longcat.counts import flops_per_token

    claim = CLAIMS["growth"]
    full, half, grown = (jobs.Job(claim, claim.arms[name], 1).config for name in ("full", "half", "grown"))
    step = {one: flops_per_token(config.model, 256) for one, config in (("full", full), ("half", half))}
    spent = half.train.steps * step["half"] + (grown.train.steps - half.train.steps) * step["full"]
    assert abs(spent - full.train.steps * step["full"]) < step["full"]


@pytest.mark.parametrize(
    ("probability", "freedom", "known"),
    [(0.975, 1, 12.706), (0.975, 3, 3.182), (0.975, 9, 2.262), (0.9875, 3, 4.177), (0.95, 30, 1.697)],
)
def test_t_quantiles_are_those_of_tables(probability: float, freedom: int, known: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(known, abs=2e-3)


def test_interval_of_paired_differences() -> None:
    found = interval([0.1, 0.2, 0.3, 0.4], 0.95)
    half = 3.1824 * math.sqrt(0.05 / 3) / 2
    assert (found.low, found.high) == (pytest.approx(0.25 - half, abs=1e-4), pytest.approx(0.25 + half, abs=1e-4))
    assert math.isnan(interval([0.1], 0.95).low)


@pytest.mark.parametrize(
    ("expect", "low", "high", "verdict"),
    [
        (Expectation.below, -0.3, -0.1, Verdict.SHOWN),
        (Expectation.below, -0.3, 0.1, Verdict.NOT_SHOWN),
        (Expectation.below, 0.1, 0.3, Verdict.REFUTED),
        (Expectation.above, 0.1, 0.3, Verdict.SHOWN),
        (Expectation.above, -0.3, -0.1, Verdict.REFUTED),
        (Expectation.equal, -0.04, 0.03, Verdict.SHOWN),
        (Expectation.equal, -0.04, 0.06, Verdict.NOT_SHOWN),
        (Expectation.equal, 0.06, 0.09, Verdict.REFUTED),
        (Expectation.open, 0.06, 0.09, Verdict.OPEN),
        (Expectation.below, math.nan, math.nan, Verdict.NOT_SHOWN),
    ],
)
def test_verdict_is_the_registered_rule(expect: Expectation, low: float, high: float, verdict: str) -> None:
    comparison = Comparison("a", "b", "final_loss", expect, 0.05)
    assert judge(comparison, Interval((low + high) / 2, low, high, 4)) == verdict


def test_runs_that_did_not_survive_decide() -> None:
    below = Comparison("a", "b", "final_loss", Expectation.below)
    nan = math.nan
    assert judge(below, Interval(-math.inf, nan, nan, 4)) == Verdict.SHOWN
    assert judge(below, Interval(math.inf, nan, nan, 4)) == Verdict.REFUTED
    assert judge(below, Interval(-math.inf, nan, nan, 1)) == Verdict.NOT_SHOWN


def test_more_seeds_only_while_undecided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first look decides a clear difference; an unclear one asks for the larger number of seeds."""
    claim = CLAIMS["shortcut"]
    monkeypatch.setattr(jobs, "RESULTS", tmp_path)
    monkeypatch.setattr(token_kinds.Registered, "wants", lambda *_: False)  # it shares runs with this claim

    def finish(gap: list[float]) -> None:
        jobs.stored.cache_clear()
        for _ in range(2):  # the tuning runs, then the judged ones
            for job in run.queue([claim]):
                loss = 3.0 + (gap[job.seed - 1] if job.arm.name == "shortcut" and job.seed < 100 else 0.0)
                result = jobs.Result(job.key, 0, job.overrides, "", job.seed, "", "", "", 1.0, [[500, 1, 1.0, loss]])
                (tmp_path / f"{job.key}.json").write_text(json.dumps(vars(result)))
            jobs.stored.cache_clear()

    finish([0.001, 0.002, -0.001, 0.0])
    assert run.seeds_wanted(claim) == claim.least and not run.queue([claim])
    for path in tmp_path.iterdir():
        path.unlink()
    finish([0.03, -0.02, 0.01, -0.03, *[0.0] * 6])
    assert run.seeds_wanted(claim) == claim.most
    assert {job.seed for job in run.queue([claim])} == set(range(claim.least + 1, claim.most + 1))
    jobs.stored.cache_clear()


def hidden(config: ModelConfig) -> torch.Tensor:
    """Logits of a small model with weights of seed 0."""
    model = LongCat(config)
    initialise(model, config, 0)
    tokens = torch.arange(16).view(1, 16)
    return model.logits(tokens).detach()


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_changes_the_output_of_equal_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(["model=debug", "model.num_mtp_layers=0", "model.vocab_size=64"]).model
    monkeypatch.setattr(ShortcutLayer, "forward", ShortcutLayer.forward)  # both are put back after the test
    for scale in ("query_scale", "latent_scale"):
        monkeypatch.setattr(ModelConfig, scale, vars(ModelConfig)[scale])
    before = hidden(config)
    assert torch.equal(before, hidden(config))
    VARIANTS[name]()
    assert not torch.allclose(before, hidden(config), atol=1e-4)


def finish_grid(folder: Path, loss: Callable[[str, int, float], float]) -> None:
    """Store a result for each run of the grid of widths."""
    sweep = widths.load()
    for kind in widths.PARAMETERISATIONS:
        for width in sweep.widths:
            for rate in sweep.rates:
                for job in sweep.jobs(kind, width, rate):
                    row: list[float | None] = [400, 1, 1.0, loss(kind, width, rate)]
                    result = jobs.Result(job.key, 0, job.overrides, "", job.seed, "", "", "", 1.0, [row])
                    (folder / f"{job.key}.json").write_text(json.dumps(vars(result)))
    jobs.stored.cache_clear()


@pytest.mark.parametrize(
    ("plain_steps", "table_steps", "verdict"),
    [(3, 0, Verdict.SHOWN), (3, 1, Verdict.SHOWN), (1, 0, Verdict.NOT_SHOWN), (3, 2, Verdict.REFUTED)],
)
def test_transfer_is_judged_by_the_registered_rule(
    plain_steps: int, table_steps: int, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best rate moves down with the width by so many steps of the grid; the loss falls by a power law."""
    monkeypatch.setattr(jobs, "RESULTS", tmp_path)
    sweep = widths.load()

    def loss(kind: str, width: int, rate: float) -> float:
        down = {widths.PLAIN: plain_steps, widths.TABLE: table_steps}[kind] * math.log(width / 32, 8)
        best = 1.6e-2 / 2 ** round(down)
        return 40 * sweep.active(width) ** -0.2 * (1 + 0.002 * abs(math.log2(rate / best)))

    finish_grid(tmp_path, loss)
    assert widths.verdict() == verdict
    assert widths.load().best(widths.PLAIN, sweep.widest) == pytest.approx(1.6e-2 / 2**plain_steps)
    if table_steps == 0:
        found = widths.forecast()
        assert found is not None
        assert found["exponent"] == pytest.approx(0.2, abs=1e-6)
        assert found["loss"] == pytest.approx(40 * sweep.active(sweep.widest) ** -0.2)
        assert sweep.regret(widths.TABLE, sweep.widest) == 0
    jobs.stored.cache_clear()


def test_regret_as_compute() -> None:
    """The best run is at 4.5 between its validations at 1 and 2 of 4 FLOPs, before it goes up for a while."""

    def result(*losses: float | None) -> jobs.Result:
        rows: list[list[float | None]] = [[1, 1, float(flops), loss] for flops, loss in enumerate(losses, 1)]
        return jobs.Result("", 0, [], "", 1, "", "", "", 1.0, rows)

    own = result(5.0, 4.0, 4.8, None, 3.0)
    assert widths.lost_compute(result(9.0, 4.5), own) == 1 - 1.5 / 5
    assert widths.lost_compute(own, own) == 0


def test_both_parameterisations_are_one_at_the_proxy() -> None:
    sweep = widths.load()
    kinds = list(widths.PARAMETERISATIONS)
    for width in sweep.widths:
        keys = {sweep.jobs(kind, width, sweep.rates[0])[0].key for kind in kinds}
        assert len(keys) == (1 if width == sweep.proxy else 2)


def test_widest_model_runs_after_its_forecast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All runs of narrower widths, of every seed, come before the widest one's."""
    monkeypatch.setattr(jobs, "RESULTS", tmp_path)
    order = [job.config.model.hidden_size for job in run.queue([widths.load().claim])]
    first = order.index(widths.load().widest)
    assert set(order[first:]) == {widths.load().widest}


def test_runs_of_other_seeds_are_composed_alike() -> None:
    """Seed and rate are set on a composed configuration; the result is what composing them gives."""
    job = jobs.Job(CLAIMS["shortcut"], CLAIMS["shortcut"].arms["shortcut"], 7, 3e-3)
    assert job.config == compose(job.overrides)
    assert (job.config.train.seed, job.config.optim.lr) == (7, 3e-3)


def test_stored_runs_keep_their_keys() -> None:
    """A new configuration key must not make runs unknown that took hours: values at their defaults have no part."""
    found = [one for path in sorted(jobs.RESULTS.glob("*.json")) if (one := jobs.stored(path)) and not one.grown_from]
    assert found
    for result in found:
        assert jobs.key_of(jobs.composed(tuple(result.overrides)), result.variant, []) == result.key


def test_run_without_its_kinds_of_tokens_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result is kept without the checkpoint that kinds are measured in: then the run is made again."""
    monkeypatch.setattr(token_kinds, "RESULTS", tmp_path)
    measured = [job for job in token_kinds.registered().jobs() if job]
    keys = {job.key for job in run.queue([CLAIMS["identity_experts"]])}
    assert measured and {job.key for job in measured} <= keys
    for job in measured:
        (tmp_path / f"{job.key}.json").write_text("{}")
    done = {job.key for job in measured if job.result}
    assert not done & {job.key for job in run.queue([CLAIMS["identity_experts"]])}


def test_kinds_of_tokens_in_code_and_prose() -> None:
    source = 'def area(side):  # the width of 12 sides\n    return side * 2.5 - "it isn\'t"\n'
    words = [
        "def",
        " area",
        "(",
        "side",
        "#",
        " the",
        " width",
        " 12",
        "return",
        " *",
        " 2.5",
        "it",
        " isn't",
        "\n    ",
    ]
    offsets = []
    for word in words:
        at = source.index(word, offsets[-1][1] if offsets and word != "\n    " else 0)
        offsets.append((at, at + len(word)))
    kinds = token_kinds.kinds_of_tokens(source, offsets)
    prose = ["punctuation", "function word", "other word", "number"]
    code = ["keyword", "punctuation", "number", "function word", "function word", "space"]
    assert kinds == ["keyword", "name", "punctuation", "name", *prose, *code]
    assert token_kinds.kinds_of_tokens("def (:\n  '''", [(0, 3)]) is None


def test_ffn_experts_of_each_token_by_layer() -> None:
    config = ModelConfig(
        num_layers=2, num_experts=4, num_zero_experts=4, top_k=3, expected_ffn_experts=2, num_mtp_layers=0
    )
    model = LongCat(config).eval()
    initialise(model, config, seed=1)
    ids = np.arange(10)
    for layer, (router, wanted) in enumerate(zip(model.routers(), (3, 0), strict=True)):
        router.e_score_correction_bias[: config.num_experts] += 10 if layer == 0 else -10
        assert (token_kinds.ffn_experts(model, ids)[:, layer] == wanted).all()
