"""metrics.jsonl after crashes and accidents, and numbers that are not finite."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from launch.sweeps.sweep import final_loss
from longcat.json_text import dumps
from train.loggers.jsonl import METRICS, missing_steps, move_after, rows, step_of_line
from train.report.reading import read_run

ODD = [math.nan, math.inf, -math.inf]


def strict(text: str) -> Any:
    """JSON as other languages read it: no NaN, no Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("value", ODD)
def test_numbers_that_are_not_finite_become_strings(value: float) -> None:
    read = strict(dumps({"a": [1, {"b": value}], "c": (value,), "d": 0.1}))
    for spelt in (read["a"][1]["b"], read["c"][0]):
        assert isinstance(spelt, str) and repr(float(spelt)) == repr(value)
    assert read["d"] == 0.1


def test_report_and_sweep_read_them(tmp_path: Path) -> None:
    """As a gap in the curves, and as the number that they are for the sweeper."""
    lines = [dumps({"step": step, "tokens": step, "loss": 2.0, "val_loss": value}) for step, value in enumerate(ODD, 1)]
    (tmp_path / METRICS).write_text("\n".join(lines))
    run = read_run(tmp_path)
    assert not len(run.series("val_loss")[0]) and len(run.series("loss")[0]) == 3
    assert final_loss(tmp_path) == -math.inf


def test_later_torn_and_repeated_lines_are_moved(tmp_path: Path) -> None:
    kept = ['{"step": 1}', '{"step": 2, "new": 1}', '{"step": 3}']
    path, aside = tmp_path / METRICS, tmp_path / "aside"
    text = [kept[0], '{"step": 2}', "[1]", kept[2], '{"step": "3"}', kept[1], '{"step": 4}', '{"step": 5, "lo']
    path.write_text("\n".join(text))
    moved = move_after(path, 3, aside)
    assert (moved.later, moved.unreadable, moved.repeated, moved.steps) == (1, 3, 1, [1, 2, 3])
    assert path.read_text().splitlines() == kept
    assert sorted(aside.read_text().splitlines()) == sorted(set(text) - set(kept))


def test_moved_lines_are_safe_from_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both files and the folder are synced before the old file is replaced, the folder again afterwards."""
    done: list[str] = []
    sync, rename = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append(f"{path.name} {path.stat().st_size}" if path.is_file() else path.name)
        sync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        done.append("replace")
        return rename(self, target)

    path = tmp_path / METRICS
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    move_after(path, 1, tmp_path / "aside")
    assert sorted(done[:2]) == ["aside 24", "metrics.partial 12"]
    assert done[2:] == [tmp_path.name, "replace", tmp_path.name]


def test_a_clean_file_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    path.write_text('{"step": 1}\n{"step": 2}\n')
    before = path.stat()
    assert not move_after(path, 2, tmp_path / "aside").unreadable
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not (tmp_path / "aside").exists()


@pytest.mark.parametrize("line", [b"", b"7", b"[]", b'{"step": true}', b'{"step": 1e999}', b"\xff\xfe", b"[" * 99_999])
def test_a_line_without_a_step_is_no_row(line: bytes, tmp_path: Path) -> None:
    assert step_of_line(line) is None
    (tmp_path / METRICS).write_bytes(line + b'\n{"step": 4}\n')
    assert list(rows(tmp_path / METRICS)) == [{"step": 4}]


def test_gaps_are_named() -> None:
    assert missing_steps([1, 2, 3]) == ""
    assert missing_steps([1, 3, 7]) == "2, 4-6"
