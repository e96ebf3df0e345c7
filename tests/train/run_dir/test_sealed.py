"""A changed byte in what a run writes beside its checkpoints is noticed by whatever reads it, or changes nothing."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest

from longcat.errors import ConfigError
from tests.support.mutations import survive_mutations
from tests.support.running import NARROW, train_here
from train.checkpoint.files import HASH
from train.checkpoint.save_times import SAVES, slowest_save
from train.diff import compare_runs, describe
from train.loggers.jsonl import METRICS, move_after, rows
from train.report.reading import read_run
from train.run_dir.folder import CONFIG
from train.run_dir.sealed import (
    DamagedError,
    intact_lines,
    is_yaml_changed,
    read_sealed,
    seal_line,
    seal_yaml,
    unseal_line,
)
from train.sweeps.results import Result, read_result, result_file, write_result
from train.transfer import finished_run

FILES = (METRICS, "routing.jsonl", "health.jsonl", SAVES, "text.json", "baselines.json", CONFIG)


@pytest.fixture
def run(overrides: list[str], tmp_path: Path) -> Path:
    """The folder of a run of six steps, with all files that a report reads."""
    words = [*overrides, *NARROW, "train.steps=6", "checkpoint.every=3", "logging.routing_every=1"]
    words += ["validation.every=3", "validation.documents=1", "validation.ngram_baselines=true"]
    assert train_here(words) == 0
    return tmp_path / "run"


@pytest.fixture
def copy(run: Path) -> Path:
    return Path(shutil.copytree(run, run.with_name("copy")))


def read_all(folder: Path) -> str:
    """All that a report and the launcher read; a note is a refusal, since the report shows it."""
    found = read_run(folder)
    if found.notes:
        raise ConfigError(found.notes[0])
    routing = found.routing
    assert routing is not None
    numbers = {key: column.tolist() for key, column in found.columns.items() if not key.startswith("xxh")}
    tables = [routing.steps.tolist(), routing.counts.tolist(), routing.bias.tolist()]
    return repr([numbers, tables, found.events, found.baselines, found.documents, found.config])


def check(run: Path, tmp_path: Path, count: int, seed: int) -> Counter[str]:
    for name in FILES:
        assert (run / name).is_file(), name
    files = tmp_path / "files"
    files.mkdir()
    for name in (*FILES, "exit.json"):
        shutil.copy(run / name, files / name)
    return survive_mutations(files, lambda: read_all(files), count, seed, kinds=["byte"])


def test_a_report_shows_no_changed_byte(run: Path, tmp_path: Path) -> None:
    found = check(run, tmp_path, 200, 0)
    for name in FILES:
        assert name == SAVES or found[f"{name} refused"], f"no change of {name} was noticed: {found}"


@pytest.mark.long
def test_ten_thousand_changes(run: Path, tmp_path: Path) -> None:
    """About a quarter of an hour."""
    check(run, tmp_path, 10_000, 1)


def change(path: Path, key: str) -> None:
    """Change a digit of the last value of ``key``."""
    before, mark, after = path.read_text().rpartition(f'"{key}": ')
    assert mark and after[0].isdigit()
    path.write_text(f"{before}{mark}{(int(after[0]) + 1) % 10}{after[1:]}")


def test_a_changed_line_is_moved_on_resume(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(run / METRICS, "loss")
    assert [row["step"] for row in rows(run / METRICS)] == [1, 2, 3, 4, 5]
    said = f"{run / METRICS}: 1 lines have changed since they were written and are left out, the first is line 6"
    assert said in capsys.readouterr().err
    moved = move_after(run / METRICS, 6, tmp_path / "aside")
    assert (moved.unreadable, moved.steps) == (1, [1, 2, 3, 4, 5])


def test_a_comparison_refuses_a_changed_line(run: Path, copy: Path) -> None:
    assert compare_runs(copy, run).same
    change(run / METRICS, "grad_norm")
    with pytest.raises(ConfigError, match=r"metrics.jsonl, line 6: .* restore or remove the line"):
        compare_runs(copy, run)


def test_changed_configuration_is_named(run: Path, copy: Path) -> None:
    path = run / CONFIG
    path.write_text(path.read_text().replace("lr: 0.001", "lr: 0.002", 1))
    found = compare_runs(copy, run)
    assert found.same and f"settings     {path} has changed since its run wrote it" in describe(found)
    with pytest.raises(ConfigError, match=r"config.yaml has changed .* restore it"):
        finished_run(run)


def test_a_changed_time_of_a_save_is_not_used(run: Path) -> None:
    times = [line["save_seconds"] for line in intact_lines(run / SAVES)]
    assert len(times) == 2 and slowest_save(run) == max(times)
    change(run / SAVES, "save_seconds")
    assert slowest_save(run) == times[0]


def test_a_changed_result_of_a_sweep_is_a_failed_one(tmp_path: Path) -> None:
    write_result(tmp_path, 3, Result("run", 0, "", process=""))
    assert not read_result(result_file(tmp_path, 3)).failed
    change(result_file(tmp_path, 3), "code")
    assert "not those that were written" in read_result(result_file(tmp_path, 3)).message


@pytest.mark.parametrize(
    "values",
    [{"a": {}}, {"a": [1, -0.0, 1e-300, True, None]}, {"é\udc80": "\ud800 ü"}, {"a": {"b": 10**40}}, {"b": 1, "a": 2}],
)
def test_what_is_sealed_is_read_back(values: dict[str, object]) -> None:
    line = seal_line(values)
    assert unseal_line(line) == values
    assert unseal_line(json.dumps(json.loads(line), indent=1)) == values, "white space changed the hash"


def test_numbers_that_are_not_finite_and_older_lines() -> None:
    assert unseal_line(seal_line({"a": math.nan})) == {"a": "NaN"}
    assert unseal_line('{"a": 1}') == {"a": 1}


@pytest.mark.parametrize("change", [("xxh3_128", "xxh3_12"), ("1", "2"), ("xxh", "yxh"), ("}", ', "b": 1}')])
def test_a_changed_line_is_told(change: tuple[str, str]) -> None:
    """Also where the name of the hash has changed, or a value follows it."""
    with pytest.raises(DamagedError):
        unseal_line(seal_line({"a": 1}).replace(*change, 1))


def test_a_sealed_file_without_its_hash_is_damaged(tmp_path: Path) -> None:
    for text in ('{"a": 1}', json.dumps({"a": 1, HASH: None})):
        (tmp_path / "file").write_text(text)
        with pytest.raises(DamagedError):
            read_sealed(tmp_path / "file")


@pytest.mark.parametrize("text", ["", "7", "[]", "{", "[" * 99_999, b"\xff\xfe"])
def test_what_is_no_object_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        unseal_line(text)
    assert not isinstance(caught.value, DamagedError)


def test_a_changed_yaml_is_told_from_an_older_one() -> None:
    text = seal_yaml("a: 1\nb: # x\n")
    assert not is_yaml_changed(text) and not is_yaml_changed("a: 1\n")
    assert is_yaml_changed(text.replace("1", "2", 1)) and is_yaml_changed(text[:-2])
    assert is_yaml_changed(text.replace("# xxh", "# yxh")) and is_yaml_changed(text.replace("# xxh", "\nxxh"))
