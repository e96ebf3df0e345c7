"""A sweep's page: one sorted table and one picture, of failed and unfinished runs too."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from launch.__main__ import main as longcat
from longcat.json_text import dumps
from tests.support.fabricate_run import fabricate
from tests.support.fixtures import Refused
from tests.train.report.html_page import ends, read
from train.report.numbers import DASH
from train.sweeps.results import Result, write_result

WIDTHS, RATES = (64, 128, 256, 512), (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
REFUSED, DIVERGED, RUNNING = 5, 23, 22


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 runs, 4 widths and 6 rates: one refused, one diverged, one still running."""
    root = tmp_path_factory.mktemp("runs")
    folder = root / "rates-sweep"
    folder.mkdir()
    for number, (width, rate) in enumerate(itertools.product(WIDTHS, RATES)):
        code, message = {
            REFUSED: (2, "model.top_k=99 exceeds <6>"),
            DIVERGED: (4, "step 40: the loss is not finite"),
            RUNNING: (None, ""),
        }.get(number, (0, ""))
        steps = {DIVERGED: 40, RUNNING: 120}.get(number, 300)
        if number != REFUSED:
            settings = {"optim.lr": rate, "model.hidden_size": width, "train.steps": 300}
            floor = 2.4 - width / 1000 + 20 * abs(rate - 2e-3)
            where = root / f"rates-{number}"
            fabricate(where, steps, seed=7, settings=settings, extras=False, routing_rows=0, floor=floor)
        overrides = ["model=debug", f"model.hidden_size={width}", f"optim.lr={rate:g}"]
        write_result(folder, number, Result(f"elsewhere/rates-{number}", code, message, "", overrides))
    return folder


@pytest.fixture(scope="module")
def html(sweep: Path) -> str:
    assert longcat(["report", str(sweep)]) == 0
    return (sweep / "report.html").read_text()


def rows(html: str) -> list[list[str]]:
    found = re.findall(r"<tr data-run.*?</tr>", html.replace("<wbr>", ""))
    return [[re.sub("<[^>]+>", "", cell) for cell in re.findall(r"<td.*?</td>", row)] for row in found]


def test_one_table_with_what_differs_alone(html: str, sweep: Path) -> None:
    page, _ = read(sweep / "report.html")[1], html
    assert html.count("<table>") == html.count('class="chart sweep') == 1
    heads = re.findall(r"<th>(.*?)</th>", html.replace("<wbr>", ""))
    assert heads == ["run", "validation loss", "model.hidden_size", "optim.lr", "state"]
    found = rows(html)
    assert len(found) == 24 and all(row[4] == "" for row in found[:21])
    losses = [float(row[1]) for row in found[:21]]
    assert losses == sorted(losses) and found[0][2:4] == ["512", "0.002"]
    assert "24 runs, 2 failed, 1 not ended." in page.text and "debug" not in page.text


def test_failed_and_unfinished_runs_come_last(html: str, sweep: Path) -> None:
    page = read(sweep / "report.html")[1]
    assert [(row[0][1:], row[4]) for row in rows(html)[21:]] == [
        ("rates-22", "step 120 of 300"),
        ("rates-23", "failed, step 40 of 300"),
        ("rates-5", "failed"),
    ]
    assert rows(html)[-1][2:4] == ["64", "0.016"], "a refused run has no config.yaml, and has its settings"
    assert "rates-5 (exit code 2): model.top_k=99 exceeds <6>" in page.text
    assert "rates-23 (exit code 4): step 40: the loss is not finite" in page.text


def test_a_line_for_each_width_over_the_rates(html: str) -> None:
    assert "optim.lr, log axis" in html and html.count('class="curve c') == 4
    assert html.count('class="dot') == 21
    assert {name for name, _ in ends(html)} == {"64", "128", "256", "512"}
    assert "lowest at 0.002 (64), 0.002 (128), 0.002 (256), 0.002 (512)." in html


def test_letters_have_the_colour_of_their_line(html: str) -> None:
    """A reader finds the line of a row by its colour; a run that is not in the picture has none."""
    rows_by_run = dict(re.findall(r'<tr data-run=(\d+)><td><span class="tag ?(c?\d?)">', html))
    dots = {run: colour for colour, run in re.findall(r'class="dot (c\d)" data-run=(\d+)', html)}
    assert len(rows_by_run) == 24 and len(dots) == 21 and len(set(dots.values())) == 4
    assert {run: colour for run, colour in rows_by_run.items() if colour} == dots


def test_presets_come_by_size_and_long_numbers_are_short(tmp_path: Path) -> None:
    folder = tmp_path / "w-sweep"
    folder.mkdir()
    rates = (0.0031622776601683794, 0.001)
    for number, (model, rate) in enumerate(itertools.product(("w128", "w64", "w96"), rates)):
        fabricate(tmp_path / f"w-{number}", 60, seed=number, extras=False, routing_rows=0)
        words = [f"model={model}", f"optim.lr={rate}"]
        write_result(folder, number, Result(str(tmp_path / f"w-{number}"), 0, "done", "", words))
    assert longcat(["report", str(folder)]) == 0
    html = (folder / "report.html").read_text()
    assert re.search(r"lowest at \S+ \(w64\), \S+ \(w96\), \S+ \(w128\)\.", html)
    assert {row[3] for row in rows(html)} == {"0.003162", "0.001"}
    assert html.count('<td title="0.0031622776601683794">0.003162</td>') == 3


def test_the_lowest_is_a_mean_over_seeds(tmp_path: Path) -> None:
    folder = tmp_path / "s-sweep"
    folder.mkdir()
    for number, (rate, seed, floor) in enumerate(((1e-3, 0, 2.0), (1e-3, 1, 2.1), (2e-3, 0, 1.9), (2e-3, 1, 2.9))):
        fabricate(tmp_path / f"s-{number}", 60, seed=3, extras=False, routing_rows=0, floor=floor)
        words = [f"optim.lr={rate:g}", f"train.seed={seed}"]
        write_result(folder, number, Result(str(tmp_path / f"s-{number}"), 0, "done", "", words))
    assert longcat(["report", str(folder)]) == 0
    text = read(folder / "report.html")[1].text
    assert re.search(r"Lowest mean validation loss of 2 seeds: [\d.]+ at optim\.lr=0\.001\.", text)


def test_an_unreadable_result_leaves_the_others_their_settings(tmp_path: Path) -> None:
    folder = tmp_path / "s-sweep"
    folder.mkdir()
    for number, rate in enumerate((1e-3, 2e-3)):
        fabricate(tmp_path / f"s-{number}", 60, seed=3, extras=False, routing_rows=0)
        write_result(folder, number, Result(str(tmp_path / f"s-{number}"), 0, "done", "", [f"optim.lr={rate:g}"]))
    (folder / "2.json").write_text("{")
    assert longcat(["report", str(folder)]) == 0
    found = rows((folder / "report.html").read_text())
    assert sorted(row[2] for row in found[:2]) == ["0.001", "0.002"] and found[2][2] == DASH


def test_one_loss_judges_all_runs(tmp_path: Path) -> None:
    """The run that has not ended has no validation yet: its training loss is not in the column."""
    folder = tmp_path / "s-sweep"
    folder.mkdir()
    for number, code in enumerate((0, None)):
        run = tmp_path / f"s-{number}"
        fabricate(run, 60, seed=3, extras=False, routing_rows=0)
        write_result(folder, number, Result(str(run), code, "", "", [f"optim.lr={number}"]))
    metrics = tmp_path / "s-1" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(dumps({**line, "val_loss": None}) + "\n" for line in lines))
    assert longcat(["report", str(folder)]) == 0
    html = (folder / "report.html").read_text()
    assert "<th>validation loss</th>" in html
    assert rows(html)[0][1] != DASH and rows(html)[1][1] == DASH


def test_a_sweep_without_runs_is_refused(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "s-sweep").mkdir()
    (tmp_path / "s-sweep" / "multirun.yaml").write_text("")
    refused(["report", str(tmp_path / "s-sweep")], "has no run yet")
