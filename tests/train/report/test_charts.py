"""Charts: names in order and apart, scales that say what they are, axes to choose from, marks of events."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fabricate_run import fabricate
from tests.train.report.html_page import data_of, ends, read, rewrite
from train.report import write_report
from train.report.axes import Axes
from train.report.chart import LABEL_PIXELS, Chart, Guide, Page, Series
from train.report.labels import spread
from train.report.marks import marks_of
from train.report.numbers import log_ticks
from train.report.reading import read_run

STAGES = {
    "data.stages": [{"start_tokens": 100_000, "weights": [3, 7]}, {"start_tokens": 200_001, "weights": [1, 0]}],
    "data.paths": ["data/web/corpus", "data/code"],
    "schedule.name": "wsd",
    "schedule.warmup_steps": 10,
    "schedule.decay_start": 40,
    "schedule.decay_steps": 20,
}


@given(st.lists(st.floats(0, 300), max_size=19))
def test_names_stay_in_order_and_apart(wanted: list[float]) -> None:
    placed = spread(wanted, 15, 0, 300)
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    gaps = np.diff([placed[index] for index in order])
    assert (gaps > 15 - 1e-6).all() and all(-1e-6 <= place <= 300 + 1e-6 for place in placed)
    if len(wanted) > 1 and (np.diff(sorted(wanted)) >= 15).all():
        assert placed == pytest.approx(wanted)


def test_names_that_collide_share_the_displacement() -> None:
    assert spread([100, 100, 100], 15, 0, 300) == [85, 100, 115]
    assert spread([0, 0, 299], 15, 0, 300) == [0, 15, 299]
    assert spread(list(range(100)), 15, 0, 300)[-1] == pytest.approx(300), "too many: the gap is what fits"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_chart_of_a_report_has_names_over_each_other(tmp_path: Path, seed: int) -> None:
    run = fabricate(tmp_path / "run", steps=300, layers=28, seed=seed)
    html = read(write_report(run))[0]
    checked = 0
    for chart in data_of(html)["charts"]:
        for side in chart["up"].values():
            tops = [top for _, top in ends(side["ends"])]
            assert tops == sorted(tops) or sorted(tops) == sorted(set(tops))
            assert (np.diff(sorted(tops)) >= LABEL_PIXELS - 1).all(), ends(side["ends"])
            checked += len(tops) > 1
    assert checked >= 6


def test_names_are_in_the_order_of_what_they_say(tmp_path: Path) -> None:
    """A curve whose smoothed end is above a guide, while its last values are below it."""
    run = read_run(fabricate(tmp_path / "run", steps=200, extras=False, routing_rows=0))
    steps = np.arange(1.0, 201)
    noisy = np.linspace(5, 4, 200)
    series = [
        Series("train", steps, noisy, 0, end="train 3.86", value=3.86),
        Series("MTP", steps, noisy + 0.4, 1, end="MTP 4.17", value=4.17),
    ]
    html = Page(Axes([run])).render(Chart("Loss", "", series, guides=[Guide(4.24, "trigram 4.24")], log=True))
    names = [name for name, _ in sorted(ends(html), key=lambda pair: pair[1])]
    assert names == ["trigram 4.24", "MTP 4.17", "train 3.86"]


def test_a_logarithmic_axis_says_so(tmp_path: Path) -> None:
    html = read(write_report(fabricate(tmp_path / "run", steps=60)))[0]
    figures = html.split("<figure")
    loss = next(one for one in figures if "<h3>Loss</h3>" in one)
    rate = next(one for one in figures if "<h3>Learning rate</h3>" in one)
    assert ">log</button>" in loss and ">linear</button>" in rate
    sides = data_of(html)["charts"][0]["up"]
    assert sides["log"]["log"] and not sides["linear"]["log"]
    assert sides["log"]["numbers"] != sides["linear"]["numbers"]


def test_an_axis_with_values_below_zero_has_no_logarithm(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", steps=60, extras=False, routing_rows=0)
    rewrite(run, lambda row: row | {"router_similarity": -0.1})
    figures = read(write_report(run))[0].split("<figure")
    assert "class=scale" not in next(one for one in figures if "<h3>Router similarity</h3>" in one)


@given(st.floats(1e-9, 1e3), st.floats(1.05, 1e9))
def test_both_ends_of_a_logarithmic_axis_have_a_number(low: float, factor: float) -> None:
    high = low * factor
    ticks = log_ticks(low, high)
    assert ticks == sorted(ticks) and 1 <= len(ticks) <= 9
    allowed = max(0.16 * math.log10(factor), math.log10(2.5)) + 1e-9
    assert math.log10(high / ticks[-1]) <= allowed and math.log10(ticks[0] / low) <= allowed


def test_each_axis_ends_with_the_last_number(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", steps=147, extras=False, routing_rows=0)
    axes = data_of(read(write_report(run))[0])["axes"]
    last = {key: re.findall(r">([^<]+)</span>", axis["across"])[-1] for key, axis in axes.items()}
    assert last["step"] == "147" and last["tokens"] == "1.2M" and last["flops"] == "6.86e13"
    assert list(axes) == ["tokens", "step", "flops", "seconds"]
    assert axes["seconds"]["name"] in ("seconds", "minutes")
    assert {axis["at"][0][-1] for axis in axes.values()} == {2000}


def test_flops_of_older_runs_follow_from_the_configuration(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", steps=30, extras=False, routing_rows=0)
    rewrite(run, lambda row: {key: value for key, value in row.items() if key not in ("flops", "first_sample")})
    found = read_run(run)
    assert found.position("flops")[-1] == pytest.approx(30 * 8192 * 5.7e7)
    (run / "config.yaml").unlink()
    assert [axis.key for axis in Axes([read_run(run)]).all] == ["tokens", "step", "seconds"]


def test_a_run_with_steps_alone_has_one_axis(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "loss": {9 / step}}}\n' for step in range(1, 50)))
    html, page = read(write_report(run))
    assert list(data_of(html)["axes"]) == ["step"] and "Loss" in page.heads


def test_time_is_a_sum_and_lost_rows_count_as_the_mean(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", steps=10, extras=False, routing_rows=0)
    rewrite(run, lambda row: row | {"step_seconds": None if row["step"] == 4 else 2.0})
    assert read_run(run).position("seconds").tolist() == [2.0 * step for step in range(1, 11)]


def test_script_gets_the_curves_that_are_drawn(tmp_path: Path) -> None:
    """Its points without smoothing, at the places of the static picture."""
    run = fabricate(tmp_path / "run", steps=50, extras=False, routing_rows=0)
    html = read(write_report(run))[0]
    data = data_of(html)
    curve = data["charts"][0]["curves"][0]
    assert curve["name"] == "train" and curve["x"] == list(range(1, 51)) and curve["smooth"]
    drawn = re.search(r'<path class="curve d0" d="M([^"]+)"', html)
    assert drawn
    tokens = np.interp(curve["x"], data["knots"][0], data["axes"]["tokens"]["at"][0])
    assert [int(point.split()[0]) for point in drawn[1].split("L")] == pytest.approx(tokens, abs=1)
    low, high = (math.log10(data["charts"][0]["up"]["log"][end]) for end in ("low", "high"))
    heights = [(1 - (math.log10(y) - low) / (high - low)) * 1000 for y in curve["y"]]
    assert [int(point.split()[1]) for point in drawn[1].split("L")] == pytest.approx(heights, abs=2)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_script_draws_what_the_page_shows_without_it(tmp_path: Path) -> None:
    """In a browser: the same curves at the start and after another axis and back; no error."""
    html = read(write_report(fabricate(tmp_path / "run", steps=300)))[0]
    click = """<script>addEventListener("load", () => {
      for (const key of ["seconds", "flops", "step", "tokens"]) document.querySelector(`[data-axis=${key}]`).click();
      for (const button of document.querySelectorAll(".scale")) { button.click(); button.click(); }
      document.title = "switched";
    });</script>"""
    (tmp_path / "page.html").write_text(html.replace("</body>", f"{click}</body>"))
    words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "page.html").as_uri()]
    shown = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "<title>switched</title>" in shown
    paths = [re.findall(r'class="(?:curve d0|envelope|dots)" d="([^"]+)"', text) for text in (html, shown)]
    assert len(paths[0]) == len(paths[1]) > 20
    for static, drawn in zip(*paths, strict=True):
        numbers = [[int(number) for number in re.findall(r"-?\d+", text)] for text in (static, drawn)]
        assert numbers[0] == pytest.approx(numbers[1], abs=2)


def test_marks_name_phases_mixtures_and_mtp(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", steps=60, settings=STAGES, extras=False, routing_rows=0)
    found = [(mark.step, mark.text) for mark in marks_of(read_run(run))]
    # Samples of 512 tokens, 16 in a step: 100,000 is in sample 195, 200,001 in sample 390
    assert found == [
        (10, "Warm-up ends"),
        (13, "Mixture web 30\u202f%, code 70\u202f%"),
        (16, "MTP starts"),
        (25, "Mixture web 100\u202f%, code 0\u202f%"),
        (40, "Decay of the learning rate starts"),
        (59, "Decay ends"),
    ]
    html, page = read(write_report(run))
    assert "Mixture web 30\u202f%, code 70\u202f%, step 13" in page.text
    for axis in data_of(html)["axes"].values():
        places = [float(left) for left in re.findall(r"<b style=left:([\d.]+)%>", axis["marks"])]
        assert len(places) == 6 and (np.diff(places) >= 6.9).all(), "numbers over each other"
        assert axis["lines"].count("V1000") == 6


def test_marks_name_what_a_stage_changes(tmp_path: Path) -> None:
    """Steps of 16 × 512 tokens, from step 14 on of 8 × 1,024; 200,001 tokens are in sample 300, which is in step 25."""
    first, second = STAGES["data.stages"]
    longer = {"sequence_length": 1024, "rope_scaling": {"factor": 2, "original_max_position_embeddings": 512}}
    stages = [first | longer | {"ramp_tokens": 5000, "mtp_weight": 0.1}, second]
    run = fabricate(tmp_path / "run", steps=60, settings={**STAGES, "data.stages": stages}, extras=False)
    rewrite(run, lambda row: row | {"first_sample": min(row["step"] - 1, 13) * 16 + max(row["step"] - 14, 0) * 8})
    found = {mark.step: mark.text for mark in marks_of(read_run(run))}
    shares = "Mixture web 30\u202f%, code 70\u202f% over 5,000 tokens"
    assert found[14] == f"{shares}; sequences of 1,024 tokens; YaRN factor 2; MTP weight 0.1"
    assert found[25] == "Mixture web 100\u202f%, code 0\u202f%"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"data.stages": "web", "schedule.warmup_steps": "soon"},
        {"data.stages": [7, {"start_tokens": None}, {"start_tokens": 5, "weights": ["a"]}], "data.paths": None},
        {"schedule.warmup_steps": 10_000, "schedule.name": "wsd"},
    ],
)
def test_configurations_of_older_or_odd_runs_have_no_marks(tmp_path: Path, settings: dict[str, Any]) -> None:
    run = fabricate(tmp_path / "run", steps=4, settings=settings, extras=False, routing_rows=0)
    rewrite(run, lambda row: row | {"loss_mtp": None})
    assert "class=marks" not in read(write_report(run))[0]


def test_gradient_norms_by_layer_are_drawn_and_named(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", steps=200, layers=28, routing_rows=0)
    html, page = read(write_report(run))
    assert "Gradient norm by layer" in page.heads
    charts = data_of(html)["charts"]
    chart = next(one for one in charts if any(curve["name"] == "layer 27" for curve in one["curves"]))
    assert [curve["name"] for curve in chart["curves"]] == [f"layer {n}" for n in range(28)] + ["embed", "head", "MTP"]
    names = {name.split()[0] for name, _ in ends(chart["up"]["log"]["ends"])}
    assert {"L0", "L27", "embed", "head", "MTP"} < names and len(names) <= 17
    rewrite(run, lambda row: {key: value for key, value in row.items() if "/" not in key})
    assert "Gradient norm by layer" not in read(write_report(run))[1].heads


NUMBERS_LEFT_OUT = [
    float("nan"),
    float("inf"),
    None,
    "NaN",
    "Infinity",
    "-Infinity",
    10**400,
    "x",
    [1.0],
    {"a": 1},
    True,
]


@pytest.mark.parametrize("value", NUMBERS_LEFT_OUT, ids=lambda value: str(value)[:10])
def test_every_form_of_no_number_is_left_out(tmp_path: Path, value: object) -> None:
    run = fabricate(tmp_path / "run", steps=80, extras=False, routing_rows=0)
    rewrite(
        run, lambda row: row | ({"loss": value, "grad_norm": value, "tokens": value} if row["step"] in (40, 80) else {})
    )
    html, page = read(write_report(run))
    assert "2 steps have no finite loss" in page.text and "Gradient norm" in page.heads
    assert len(data_of(html)["charts"][0]["curves"][0]["x"]) == 78
    assert not re.search(r"\b(NaN|Infinity)\b", html.split("<main>")[1].split("<script>")[0])


def test_a_resumed_run_begins_where_it_resumed(tmp_path: Path) -> None:
    """A run that started from another run's checkpoint: its first row is step 501."""
    run = fabricate(tmp_path / "run", steps=800, extras=False, routing_rows=0)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[500:]))
    axes = Axes([read_run(run)])
    by_step = next(axis for axis in axes.all if axis.key == "step")
    assert by_step.scale.low == 501 and by_step.scale.high == 800
    assert "800 steps" in read(write_report(run))[1].text


def test_header_shows_command_python_driver_and_changes(tmp_path: Path) -> None:
    settings = {
        "environment.command": "python -P -m train 'run.name=<a>'",
        "environment.python": "3.12.1",
        "environment.driver": "570.86.15",
        "environment.git_dirty": True,
        "environment.started": "yesterday",
    }
    text = read(write_report(fabricate(tmp_path / "run", steps=5, settings=settings)))[1].text
    assert "python -P -m train 'run.name=<a>'" in text
    assert "Python 3.12.1, torch 2.13.0, NVIDIA driver 570.86.15, commit 0123abcd with uncommitted changes" in text
    clean = settings | {"environment.git_dirty": False}
    text = read(write_report(fabricate(tmp_path / "run", steps=5, settings=clean)))[1].text
    assert "commit 0123abcd." in text


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "routing.jsonl", "text.json", "baselines.json"])
def test_changed_bytes_give_a_page_or_one_sentence(tmp_path: Path, name: str) -> None:
    from longcat.errors import ConfigError

    run = fabricate(tmp_path / "run", steps=12, routing_rows=4)
    draw = np.random.default_rng(0)
    before = (run / name).read_bytes()
    for _ in range(40):
        changed = bytearray(before)
        for at in draw.integers(0, len(before), 3):
            changed[at] = draw.integers(0, 256)
        (run / name).write_bytes(bytes(changed))
        try:
            read(write_report(run))
        except ConfigError as error:
            assert name == "config.yaml" and "\n" not in str(error)
