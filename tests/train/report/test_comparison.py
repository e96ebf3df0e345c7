"""A comparison of many runs: best first, linked, with what differs only, and the loss against what was swept."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.support.fabricate_run import fabricate
from tests.train.report.html_page import data_of, ends, read, rewrite
from train.report import write_comparison, write_report

RATES, DECAYS = (3e-4, 6e-4, 1e-3, 2e-3, 4e-3, 8e-3), (0.0, 0.1)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """24 runs: 6 learning rates, 2 decays, 2 seeds. The loss depends on the rate and the decay."""
    root, runs = tmp_path_factory.mktemp("sweep"), []
    for number, (rate, decay, seed) in enumerate(itertools.product(RATES, DECAYS, (0, 1))):
        floor = 1.8 + 0.3 * abs(np.log(rate / 2e-3)) + decay + 0.01 * seed
        settings = {"optim.lr": rate, "optim.weight_decay": decay, "train.seed": seed}
        settings |= {
            "environment.started": f"2026-11-28T10:{number:02}:00+00:00",
            "environment.command": f"run {number}",
        }
        name = f"rate_{number}"
        run = fabricate(root / name, 150, seed=7, settings=settings, extras=False, routing_rows=0, floor=floor)
        runs.append(run)
    write_report(runs[3])
    return runs


def column(html: str, head: str) -> list[str]:
    """The texts of one column of the table of results."""
    table = re.search(r"<table>.*?</table>", html, re.DOTALL)
    assert table
    clean = table[0].replace("<wbr>", "")
    heads = re.findall(r"<th>(.*?)</th>", clean)
    rows = [re.findall(r"<td.*?>(.*?)</td>", row) for row in re.findall(r"<tr data-run.*?</tr>", clean)]
    return [re.sub("<[^>]+>", "", row[heads.index(head)]) for row in rows]


def test_24_runs_are_sorted_by_their_final_loss(sweep: list[Path], tmp_path: Path) -> None:
    html, page = read(write_comparison(sweep, tmp_path / "comparison.html"))
    losses = [float(loss) for loss in column(html, "val loss")]
    assert len(losses) == 24 and losses == sorted(losses)
    assert column(html, "optim.lr")[0] == "0.002" and column(html, "optim.weight_decay")[0] == "0.0"
    assert page.text.index("Lowest validation loss: A rate_12") > 0
    assert [name[0] for name in column(html, "run")] == [chr(ord("A") + n) for n in range(24)]


def test_only_what_differs_is_shown(sweep: list[Path], tmp_path: Path) -> None:
    page = read(write_comparison(sweep, tmp_path / "comparison.html"))[1]
    for key in ("optim.lr", "optim.weight_decay", "train.seed"):
        assert key in page.text
    for key in ("optim.eps", "run.name", "started", "model.top_k", "balance.method", "What differs", "run 7"):
        assert key not in page.text
    assert "The same for all: " in page.text and "tokens 1.23M" in page.text, "the same in all runs: no column"


def test_runs_link_to_their_reports(sweep: list[Path], tmp_path: Path) -> None:
    target = sweep[0].parent / "comparison of rates.html"
    links = [value for tag, name, value in read(write_comparison(sweep, target))[1].attributes if name == "href"]
    assert set(links) == {"rate_3/report.html"} and (target.parent / links[0]).is_file()
    odd = fabricate(tmp_path / "a b#c", steps=20)
    write_report(odd)
    page = read(write_comparison([odd, sweep[0]], tmp_path / "comparison.html"))[1]
    assert ("a", "href", "a%20b%23c/report.html") in page.attributes


def test_names_of_24_curves_do_not_touch(sweep: list[Path], tmp_path: Path) -> None:
    html = read(write_comparison(sweep, tmp_path / "comparison.html"))[0]
    assert len(html) < 1_500_000
    charts = data_of(html)["charts"]
    for chart in charts:
        for side in chart["up"].values():
            found = ends(side["ends"])
            assert len(found) >= 24 and (np.diff(sorted(top for _, top in found)) >= 14).all()
    loss = sorted(ends(charts[0]["up"]["log"]["ends"]), key=lambda pair: pair[1])
    values = [float(name.split()[1]) for name, _ in loss]
    assert values == sorted(values, reverse=True), "names are not in the order of their values"
    looks = re.findall(r'<g class="c(\d)" data-run=(\d+)><path class="curve d(\d)"', html)
    assert len({(colour, dash) for colour, _, dash in looks}) == 24, "two runs look the same"


def test_loss_against_each_swept_setting(sweep: list[Path], tmp_path: Path) -> None:
    html, page = read(write_comparison(sweep, tmp_path / "comparison.html"))
    assert {"optim.lr", "optim.weight_decay"} <= set(page.heads) and "train.seed" not in page.heads
    figure = html[html.index("<h3>optim.lr</h3>") : html.index("<h3>optim.weight_decay</h3>")]
    assert "optim.lr, log axis" in figure
    lefts = [float(left) for left in re.findall(r"style=left:([\d.]+)%;bottom", figure)]
    assert len(lefts) == 24 and len(set(lefts)) == 6
    places = sorted(set(lefts))
    steps = np.diff(places) / np.diff(np.log([*RATES]))
    assert steps == pytest.approx(steps[0], rel=1e-2), "rates are not on a logarithmic axis"
    numbers = re.findall(r"<span style=left:[\d.]+%>([^<]+)</span>", figure)
    assert {"3e−4", "0.008"} <= set(numbers), "the ends have no number"
    assert [name for name, _ in sorted(ends(figure), key=lambda pair: pair[1])] == ["0.1", "0.0"]
    assert figure.count('class="curve') == 2 and "A line for each optim.weight_decay." in page.text


def test_choices_that_are_words_have_places_too(tmp_path: Path) -> None:
    methods = ["pid", "sign", "pid"]
    runs = [
        fabricate(tmp_path / f"run{n}", 60, seed=n, settings={"balance.method": method}, extras=False, routing_rows=0)
        for n, method in enumerate(methods)
    ]
    html = read(write_comparison(runs, tmp_path / "comparison.html"))[0]
    figure = html[html.index("<h3>balance.method</h3>") :]
    assert "log axis" not in figure and re.findall(r"class=choice-name [^>]*>(\w+)<", figure) == ["pid", "sign"]


def test_a_run_without_a_finite_loss_comes_last(tmp_path: Path) -> None:
    bad, good = (fabricate(tmp_path / name, 60, extras=False, routing_rows=0) for name in ("bad", "good"))
    third = fabricate(tmp_path / "third", 60, extras=False, routing_rows=0, floor=1.5)
    rewrite(bad, lambda row: row | {"loss": "NaN", "val_loss": None})
    html, page = read(write_comparison([bad, good, third], tmp_path / "comparison.html"))
    assert [name[1:] for name in column(html, "run")] == ["third", "good", "bad"]
    assert column(html, "val loss")[-1] == "–" and "Not every run has a loss" in page.text


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_runs_of_few_steps_are_compared(tmp_path: Path, steps: int) -> None:
    runs = [
        fabricate(tmp_path / name, max(1, steps), extras=False, routing_rows=0, seed=n) for n, name in enumerate("ab")
    ]
    if not steps:
        for run in runs:
            (run / "metrics.jsonl").write_text("")
    page = read(write_comparison(runs, tmp_path / "comparison.html"))[1]
    assert "2 runs" in page.text and ("Training loss" in page.heads) == (steps > 1)


def test_what_ran_where_is_shown_if_it_differs(tmp_path: Path) -> None:
    runs = [
        fabricate(tmp_path / name, 30, extras=False, routing_rows=0, settings={"environment.device": name})
        for name in ("H100", "H200")
    ]
    page = read(write_comparison(runs, tmp_path / "comparison.html"))[1]
    assert "What differs" in page.text and "H100" in page.text and "The configurations are the same." in page.text


def test_many_differing_settings_get_a_table_of_their_own(tmp_path: Path) -> None:
    runs = [
        fabricate(
            tmp_path / name, 30, extras=False, routing_rows=0,
            settings={f"optim.extra_{n}": n + first for n in range(12)} | newer,
        )
        for name, first, newer in (("plain", 0, {}), ("wide", 100, {"optim.newer": 1}))
    ]  # fmt: skip
    html, page = read(write_comparison(runs, tmp_path / "comparison.html"))
    assert html.count("<table>") == 2 and "optim.extra_11" in page.text
    assert "optim.newer" not in page.text, "a key that an older version did not have is no difference"


def test_runs_of_an_older_version_are_compared_with_new_ones(tmp_path: Path) -> None:
    """Older runs lack FLOPs, first samples, norms by layer and the record of the command."""
    old, new = (fabricate(tmp_path / name, 60, extras=False, routing_rows=0) for name in ("old", "new"))
    rewrite(old, lambda row: {k: v for k, v in row.items() if k not in ("flops", "first_sample") and "/" not in k})
    config = json.loads((old / "config.yaml").read_text())
    del config["environment"], config["derived"]
    (old / "config.yaml").write_text(json.dumps(config))
    html, page = read(write_comparison([old, new], tmp_path / "comparison.html"))
    assert "Training loss" in page.heads and list(data_of(html)["axes"]) == ["tokens", "step", "seconds"]
