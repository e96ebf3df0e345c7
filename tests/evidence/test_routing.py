"""What is measured of a finished run's last checkpoint, and which stored runs lack it."""

from __future__ import annotations

import json
import math
import subprocess
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
        """The first layer: 2 FFN experts for half of the tokens, 0 for the others. The second: 1 for each.

        In the first micro-batch all choices of the second layer are alike, in the others they go through all experts.
        """
        calls.append(ids.size)
        halves = np.where(np.arange(ids.size)[:, None] % 2, [0, 1], [experts, experts])
        turn = np.arange(ids.size) % experts if len(calls) > 1 else np.zeros(ids.size, dtype=int)
        return np.stack([halves, np.stack([turn, np.full(ids.size, experts)], 1)])

    calls: list[int] = []
    monkeypatch.setattr(routing, "chosen_experts", choose)
    routing.measure(config)
    found = routing.measured(config.run.folder)
    assert found["token_spread"] == 0.5  # deviations 1 and 0
    first, later = experts - 1, experts / 2 - 1  # the largest over layers: the second's, then the first's
    assert found["micro_batch_violation"] == round((first + later * (len(calls) - 1)) / len(calls), 5)


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


def test_a_repeated_run_keeps_the_judged_curve(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It adds what the first run was not measured for. A run on another corpus, or with another end, replaces it."""
    monkeypatch.setattr(jobs, "RESULTS", tmp_path)
    spread = CLAIMS["balance_spread"]
    job = jobs.Job(spread, spread.arms["pid"], 1)
    monkeypatch.setattr(jobs.Job, "folder", tmp_path)
    monkeypatch.setattr(jobs, "describe_corpora", lambda _config: corpora)
    monkeypatch.setattr(jobs, "intact_lines", lambda _path: [])
    corpora = {"one": "fingerprint"}
    job.store(0)
    first = jobs.stored(tmp_path / f"{job.key}.json")
    assert first and first.curve == [] and first.routing == {}
    line = {"step": 1, "tokens": 1, "flops": 1.0, "step_seconds": 1.0, "val_loss": 3.0}
    monkeypatch.setattr(jobs, "intact_lines", lambda _path: [line])
    monkeypatch.setattr(routing, "measured", lambda _folder: {"token_spread": 1.0})
    job.store(0)
    assert jobs.stored(tmp_path / f"{job.key}.json") == replace(first, routing={"token_spread": 1.0})
    corpora = {"other": "fingerprint"}
    job.store(0)
    again = jobs.stored(tmp_path / f"{job.key}.json")
    assert again and again.curve[0][3] == 3.0


def test_a_run_that_leaves_nothing_to_compare_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be started again without end."""
    spread = CLAIMS["balance_spread"]
    job = jobs.Job(spread, spread.arms["pid"], 1)
    ended = subprocess.Popen(["true"])
    ended.wait()
    monkeypatch.setattr(jobs, "RESULTS", tmp_path)
    monkeypatch.setattr(jobs.Job, "store", lambda _job, _code: None)
    runner = run.Runner([spread], 1, math.inf, {job.key: (job, ended)})
    assert runner.collect() and runner.failed == [job.label]


def test_page_has_each_arm_s_mean_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "RESULTS", tmp_path)
    spread = CLAIMS["balance_spread"]
    for arm in spread.arms.values():
        for seed in (1, 2, 3) if arm.name == "sign" else (1, 3):
            job = jobs.Job(spread, arm, seed)
            found = {"micro_batch_violation": math.inf if seed == 3 else 0.5, "token_spread": float(seed)}
            result = jobs.Result(job.key, 0, job.overrides, "", seed, "", "", "", 1.0, [], found)
            (tmp_path / f"{job.key}.json").write_text(json.dumps(vars(result)))
    jobs.stored.cache_clear()
    head, _, *rows, _, told = page.arms_table(spread, 3)
    jobs.stored.cache_clear()
    assert head == "| arm | maximum violation by micro-batch | spread between tokens, FFN experts | what it is |"
    assert "| `sign` | 0.500 (1 not finite) | 2.000 ± 1.414 | sign rule, u = 1e-3 |" in rows
    assert len(rows) == len(spread.arms) and "over 2 seeds" in told
