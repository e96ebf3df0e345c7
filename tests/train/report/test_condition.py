"""The health of a run on the report's first screen, and spikes on the loss curve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.fabricate_run import fabricate
from tests.train.report.html_page import data_of, read
from train.report import write_report
from train.report.reading import events_in_force

DEAD = {"step": 219, "event": "dead_expert", "layer": 2, "expert": 3, "since": 120}
REVIVED = {"step": 250, "event": "expert_revived", "layer": 2, "expert": 3, "since": 120}
START = {"step": 0, "event": "start", "text": "started at step 0"}


def spike(step: int, action: str, **fields: Any) -> dict[str, Any]:
    text = f"step {step}: the loss of 8.1 is 9.3 σ above 3.2"
    return {"step": step, "event": "spike", "action": action, "loss": 8.1, "grad_norm": 3.0, "text": text, **fields}


def events(folder: Path, *rows: dict[str, Any]) -> Path:
    """A run of 300 steps with these lines in health.jsonl."""
    run = fabricate(folder / "run", steps=300, settings={"health.dead_after": 100})
    (run / "health.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (START, *rows)))
    return run


def text(run: Path) -> str:
    return str(read(write_report(run))[1].text)


def test_a_healthy_run_says_so(tmp_path: Path) -> None:
    html, page = read(write_report(events(tmp_path)))
    for sentence in (
        "No spike of the loss or of the gradient norm.",
        "No expert went without a token for 100 steps.",
        "The busiest expert has at most 1.2",
        "Router: its rows have a mean cosine of at most 0.07",
        "Hidden norm: 136",
    ):
        assert sentence in page.text
    assert "<li class=alarm" not in html
    assert "Red dots" not in page.text


def test_findings_come_before_everything_else(tmp_path: Path) -> None:
    run = events(tmp_path, spike(140, "skip"), spike(200, "rollback", to_step=190), DEAD)
    found = text(run)
    dead = "Expert 3 of layer 2 has received no token since step 120."
    last = "2 spikes: 1 skipped, 1 rolled back. The last was step 200: the loss of 8.1 is 9.3 σ above 3.2."
    assert 0 < found.index(last) < found.index(dead) < found.index("Model tiny")
    (run / "health.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (START, DEAD, REVIVED)))
    assert "Every expert receives tokens; 1 expert had none for a time." in text(run)
    (run / "health.jsonl").write_text(json.dumps(START) + "\n" + json.dumps(spike(140, "stop")) + "\n")
    assert "1 spike, which ended the run: step 140: the loss of 8.1" in text(run)


def test_many_dead_experts_are_summed_up(tmp_path: Path) -> None:
    found = text(events(tmp_path, *({**DEAD, "expert": expert} for expert in range(9))))
    assert "Expert 0 of layer 2 has received no token since step 120, expert 1 of layer 2 since step 120, " in found
    assert "expert 3 of layer 2 since step 120, and 5 more." in found


def test_figures_by_layer_name_the_extremes(tmp_path: Path) -> None:
    run = events(tmp_path)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for layer in range(3):
            row[f"grad_rms/layer_{layer}"] = 10.0 ** (-layer - 14)
            row[f"expert_load_max_over_mean/layer_{layer}"] = 1.5 + layer
            row[f"bias_range/layer_{layer}"] = 0.01 * (layer + 1)
            row[f"router_similarity/layer_{layer}"] = 0.1 * layer
            row[f"router_grad_ratio/layer_{layer}"] = 0.2 / (layer + 1)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = text(run)
    assert "Gradient RMS: 1.0e−16 (layer 2) to 1.0e−14 (layer 0); Adam's ε of 1e−16 is too near" in found
    assert "The busiest expert has 1.50 (layer 0) to 3.50 (layer 2) times its layer's mean load" in found
    assert "selection biases span 0.010 (layer 0) to 0.030 (layer 2)." in found
    assert "a mean cosine of 0 (layer 0) to 0.20 (layer 2)" in found
    assert "the balance loss's gradient is 0.067 (layer 2) to 0.20 (layer 0) of the other losses'" in found
    assert (write_report(run)).read_text().count("<li class=alarm") == 3  # gradients, load and router


def test_spikes_are_dots_and_marks_of_the_loss(tmp_path: Path) -> None:
    run = events(tmp_path, spike(140, "skip"), spike(200, "rollback", to_step=190, first_sample=3040, last_sample=3199))
    html, page = read(write_report(run))
    assert "Red dots are steps that spiked." in page.text
    assert "Spike: the batch is skipped, step 140" in page.text
    assert "Back from a spike at step 200; samples 3040 to 3199 are left out, step 190" in page.text
    loss = data_of(html)["charts"][0]
    assert [(one["x"], one["y"]) for one in loss["curves"] if one["name"] == "spike"] == [([140, 200], [8.1, 8.1])]


def test_a_run_without_the_file_has_no_such_sentences(tmp_path: Path) -> None:
    found = text(fabricate(tmp_path / "run", steps=60))
    assert "spike of the loss" not in found and "without a token" not in found
    assert "Hidden norm:" in found


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        ([DEAD, {**START, "step": 200}], []),  # trained again from step 200 on
        ([DEAD, {**START, "step": 219}], [219]),
        ([DEAD, spike(230, "rollback", to_step=210)], [230]),
        ([spike(230, "rollback", to_step=210), {**START, "step": 215}], [230]),  # it went back before step 215
        ([spike(230, "rollback", to_step=210), {**START, "step": 200}, spike(230, "rollback", to_step=210)], [230]),
        ([spike(140, "skip"), {**START, "step": 100}, spike(140, "skip")], [140]),
        ([DEAD, {**START, "step": 210}, DEAD], [219]),  # the same again
        ([{"event": "spike"}, {"step": "x", "event": "spike"}, {"step": 3}, {"step": 3, "event": None}], []),
    ],
)
def test_undone_steps_take_their_events_with_them(rows: list[dict[str, Any]], kept: list[int]) -> None:
    assert [event["step"] for event in events_in_force([START, *rows])] == kept
