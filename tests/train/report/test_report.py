"""report.html: self-contained, escaped, with a section for each kind of data that exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from longcat.errors import ConfigError
from tests.support.fabricate_run import SOURCE, fabricate
from tests.train.report.html_page import read
from train.report import write_report


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fabricate(tmp_path_factory.mktemp("runs") / "quickstart")


def rewrite_metrics(run: Path, change: object) -> None:
    """Apply `change` to every row of metrics.jsonl."""
    assert callable(change)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(change(row)) + "\n" for row in rows))


def test_complete_run_shows_every_section(full_run: Path) -> None:
    target = write_report(full_run)
    assert target == full_run / "report.html"
    _, page = read(target)
    for head in (
        "Loss",
        "Learning rate",
        "FFN experts per token",
        "Busiest expert",
        "Expert load by layer",
        "Selection bias by layer",
        "Gradient norm",
        "Hidden norm",
        "Router similarity",
        "Router gradient ratio",
        "Throughput",
        "MFU",
        "Memory",
        "Compute by token",
        "Settings",
    ):
        assert head in page.heads
    for fact in (
        "quickstart",
        "18.4M parameters",
        "9.45M of them active",
        "CPU (16 cores), 2 ranks",
        "2.13.0",
    ):
        assert fact in page.text


def test_page_is_self_contained(full_run: Path) -> None:
    html, page = read(write_report(full_run))
    for tag, name, value in page.attributes:
        if name in ("src", "href", "srcset", "action", "data", "poster"):
            assert value.startswith(("data:image/png;base64,", "#")), f"{tag} {name}={value[:60]}"
    assert "@import" not in html and "url(" not in html
    assert not re.search(r"https?://|//cdn", html)
    assert "link" not in {tag for tag, _, _ in page.attributes}


def test_sentences_hold_the_run_s_numbers(full_run: Path) -> None:
    _, page = read(write_report(full_run))
    rows = [json.loads(line) for line in (full_run / "metrics.jsonl").read_text().splitlines()]
    final = sum(row["loss"] for row in rows[-24:]) / 24
    assert f"falls from {rows[0]['loss']:.2f} to {final:.2f} nats" in page.text
    crossing = next(row["tokens"] for row in rows if row.get("val_loss", 99) < 2.74)
    assert f"trigram (2.74) by {crossing / 1e6:.3g}M tokens" in page.text
    share = sum(row["grad_norm"] > 1 for row in rows) / len(rows)
    assert f"Clipped at 1 on {100 * share:.3g}" in page.text


def test_text_keeps_white_space_and_escapes_markup(full_run: Path) -> None:
    page = read(write_report(full_run))[1]
    assert page.code == SOURCE.strip("\n") + "\n" + 'html = "<b>&amp;</b>"\nprint(html if a < b else "</pre>")\n'
    titles = [float(value) for tag, name, value in page.attributes if tag == "span" and name == "title"]
    wanted = [
        value for d in json.loads((full_run / "text.json").read_text())["documents"] for value in d["ffn_experts"]
    ]
    assert titles == pytest.approx(wanted, abs=0.0051)


def test_names_from_files_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    run = fabricate(tmp_path / "run", steps=40, settings={"run.name": evil, "environment.device": f'"{evil}'})
    html, page = read(write_report(run))
    assert evil in page.text
    assert evil not in html


@pytest.mark.parametrize(
    ("missing", "head"),
    [("text.json", "Compute by token"), ("routing.jsonl", "Expert load by layer"), ("metrics.jsonl", "Loss")],
)
def test_a_missing_file_leaves_its_section_out(tmp_path: Path, missing: str, head: str) -> None:
    run = fabricate(tmp_path / "run", steps=60)
    assert head in read(write_report(run))[1].heads
    (run / missing).unlink()
    page = read(write_report(run))[1]
    assert head not in page.heads
    assert "Settings" in page.heads


def test_without_validation_and_baselines_the_loss_still_shows(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", steps=60, extras=False, routing_rows=0)
    rewrite_metrics(run, lambda row: {key: value for key, value in row.items() if not key.startswith("val_")})
    page = read(write_report(run))[1]
    assert "Loss" in page.heads
    assert "Validation loss" not in page.text and "unigram" not in page.text


def test_one_step_gives_figures_and_no_curves(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", steps=1, routing_rows=1)
    page = read(write_report(run))[1]
    assert "1 step, 8.19k tokens" in page.text and "Loss" not in page.heads
    assert "Training loss" in page.text


@pytest.mark.parametrize("content", ["", "\n\n", '{"step": 1, "lo', "[1, 2]\n"])
def test_metrics_without_a_complete_line_are_no_error(tmp_path: Path, content: str) -> None:
    run = fabricate(tmp_path / "run", steps=2, extras=False)
    (run / "metrics.jsonl").write_text(content)
    assert "No step is recorded yet" in read(write_report(run))[1].text


def test_cut_last_line_is_dropped_and_broken_line_reported(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", steps=50, extras=False, routing_rows=0)
    whole_text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole_text[:-30])
    page = read(write_report(run))[1]
    assert "49 of 50 steps" in page.text and "could not be read" not in page.text
    lines = whole_text.splitlines()
    lines[20] = lines[20][:40]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert "metrics.jsonl: 1 line could not be read" in read(write_report(run))[1].text


def test_nan_and_null_are_left_out_of_curves(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", steps=80, routing_rows=0)

    def damage(row: dict[str, object]) -> dict[str, object]:
        if row["step"] in (40, 41, 80):
            row |= {"loss": float("nan"), "grad_norm": float("inf"), "mfu": None}
        return row

    rewrite_metrics(run, damage)
    html, page = read(write_report(run))
    assert "3 steps have no finite loss" in page.text
    assert "Gradient norm" in page.heads
    assert "nan" not in html.split("<main>")[1].lower().split("<script>")[0]
    assert re.search(r'd="[^"]*(nan|inf)', html) is None


def test_run_of_only_nan_gives_a_page(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", steps=30, routing_rows=0)
    rewrite_metrics(run, lambda row: {key: float("nan") if key != "step" else row[key] for key in row})
    page = read(write_report(run))[1]
    assert "30 steps" in page.text and "Loss" not in page.heads


def test_steps_repeated_after_a_restart_replace_the_lost(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", steps=30, extras=False, routing_rows=0)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    again = [json.loads(line) | {"loss": 1.25} for line in lines[20:]]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in again)
    page = read(write_report(run))[1]
    assert "30 steps" in page.text and "to 1.25 nats" in page.text


def test_a_long_run_of_a_large_model_stays_small(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", steps=1000, layers=28, experts=128, zero_experts=64, routing_rows=40)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    with (run / "metrics.jsonl").open("a") as file:
        for step in range(1001, 100_001):
            rest = lines[step % 1000].split('"loss"', 1)[1]
            file.write(f'{{"step": {step}, "tokens": {step * 8192}, "loss"{rest}\n')
    target = write_report(run)
    assert target.stat().st_size < 3_000_000
    assert len(re.findall("<figcaption>Layer ", target.read_text())) == 2 * 28
    assert "100,000 steps, 819M tokens" in target.read_text()


def test_damaged_extra_file_is_reported_in_the_footer(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", steps=30)
    (run / "text.json").write_text('{"documents": [')
    assert "text.json is left out" in read(write_report(run))[1].text


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"is no run: it has no config\.yaml and no metrics\.jsonl") as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "config.yaml").write_text("model: [1, 2\nrun: }")
    with pytest.raises(ConfigError, match=r"config\.yaml") as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_configuration_written_by_yaml_shows_its_dotted_keys(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", steps=5, extras=False, routing_rows=0)
    config = {"optim": {"lr": 0.003, "betas": [0.9, 0.95]}, "data": {"stages": {"first": {"weight": 0.25}}}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    text = read(write_report(run))[1].text
    assert "data.stages.first" in text and "[0.9, 0.95]" in text
