"""What is measured of a finished run's last checkpoint, and which stored runs lack it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.evidence import jobs, page, routing, run
from benchmarks.evidence.claims import load
from train.compose import compose
from train.process.rank import main
from train.samples import open_samples

CLAIMS = load()


def test_violation_is_of_ffn_experts_alone() -> None:
    chosen = np.array([[0, 1, 5], [0, 2, 5], [0, 3, 4], [0, 1, 5]])  # loads 4, 2, 1, 1; 4 and 5 are identity experts
    assert routing.violation(chosen, num_experts=4) == 1.0
    assert routing.violation(chosen % 4, num_experts=4) == 5 / 3 - 1 == routing.violation(chosen[::-1] % 4, 4)


def test_finished_run_is_measured(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens choose the same two FFN experts: there is no spread, and they carry all of the load."""
    config = compose([*overrides, "train.steps=1", "schedule.warmup_steps=1"])
    assert main(config) == 0
    seen: list[np.ndarray] = []

    def choose(_model: object, ids: np.ndarray) -> np.ndarray:
        seen.append(ids)
        same = np.broadcast_to(np.arange(2), (ids.size, 2))
        return np.stack([same, same])

    monkeypatch.setattr(routing, "chosen_experts", choose)
    routing.measure(config)
    assert routing.measured(config.run.folder) == {
        "micro_batch_violation": config.model.num_experts / 2 - 1,
        "token_spread": 0.0,
    }
    samples = open_samples(config, "validation")
    assert len(seen) == min(routing.MICRO_BATCHES, samples.num_samples // 2) > 1
    assert (seen[1] == np.stack([samples[2][:-1], samples[3][:-1]])).all()


def test_spread_is_between_tokens_of_a_layer(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose([*overrides, "train.steps=1", "schedule.warmup_steps=1"])
    assert main(config) == 0
    experts = config.model.num_experts

    def choose(_model: object, ids: np.ndarray) -> np.ndarray:
        """The first layer: 2 FFN experts for half of the tokens, 0 for the others. The second: 1 for each."""
        halves = np.where(np.arange(ids.size)[:, None] % 2, [0, 1], [experts, experts])
        return np.stack([halves, np.broadcast_to([0, experts], (ids.size, 2))])

    monkeypatch.setattr(routing, "chosen_experts", choose)
    routing.measure(config)
    assert routing.measured(config.run.folder)["token_spread"] == 0.5  # deviations 1 and 0


def test_run_that_was_not_measured_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim that compares routing wants a stored run again that lacks it; other claims keep it."""
    monkeypatch.setattr(jobs, "RESULTS", tmp_path)
    spread, rules = CLAIMS["balance_spread"], CLAIMS["balance_rules"]
    job, same = jobs.Job(spread, spread.arms["pid"], 1), jobs.Job(rules, rules.arms["pid"], 1)
    assert job.key == same.key
    result = jobs.Result(job.key, 0, job.overrides, "", 1, "", "", "", 1.0, [])
    for found, is_there in ((result, False), (replace(result, routing={"token_spread": 1.0}), True)):
        monkeypatch.setattr(jobs, "stored", lambda _path, found=found: found)
        assert (job.result is not None) == is_there and same.result is found
        assert (job.key in {one.key for one in run.queue([spread])}) != is_there
    monkeypatch.setattr(jobs, "stored", lambda _path: replace(result, code=4))  # it blew up
    assert job.result is not None


def test_page_has_each_arm_s_mean_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "RESULTS", tmp_path)
    spread = CLAIMS["balance_spread"]
    for seed, value in ((1, 1.0), (2, 2.0), (3, 3.0)):
        job = jobs.Job(spread, spread.arms["sign"], seed)
        result = jobs.Result(job.key, 0, job.overrides, "", seed, "", "", "", 1.0, [], {"token_spread": value})
        (tmp_path / f"{job.key}.json").write_text(json.dumps(vars(result)))
    jobs.stored.cache_clear()
    head, _, *rows = page.arms_table(spread, 3)
    jobs.stored.cache_clear()
    assert head == "| arm | maximum violation by micro-batch | spread between tokens, FFN experts | |"
    assert "| `sign` |  | 2.000 ± 1.000 | sign rule, u = 1e-3 |" in rows and len(rows) == len(spread.arms)
