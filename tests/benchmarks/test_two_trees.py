"""`python -m benchmarks.two_trees`: both checkouts in turn, the medians of what they print, a failure by its folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import two_trees

PROGRAM = """
import json, pathlib, sys
log = pathlib.Path("{log}")
log.write_text(log.read_text() + "{tree} ")
print(json.dumps({{"benchmark": "fake", "machine": {{"threads": 1}}, "rounds": 3, "same": True,
                  "{own}": 1, "seconds": {{"words": sys.argv[1:], "a": [{value}, 100, 0]}},
                  "dtypes": [{{"dtype": "float32", "seconds": {value}}}, "words"]}}))
"""


def tree(folder: Path, log: Path, name: str, value: float) -> Path:
    (folder / name / "benchmarks").mkdir(parents=True)
    text = PROGRAM.format(log=log, tree=name, value=value, own=f"only {name}")
    (folder / name / "benchmarks" / "fake.py").write_text(text)
    return folder / name


def test_trees_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    log.write_text("")
    before, now = tree(tmp_path, log, "before", 2.0), tree(tmp_path, log, "now", 1.5)
    monkeypatch.setattr(two_trees, "HERE", now)
    monkeypatch.setattr(sys, "argv", ["two_trees", str(before), "fake", "--turns", "3", "--rounds", "9"])
    two_trees.main()
    assert log.read_text().split() == ["before", "now", "now", "before", "before", "now"]
    shown = capsys.readouterr().out
    printed = json.loads(shown.splitlines()[-1])
    assert printed["words"] == ["--rounds", "9"]
    values = {"before": [2.0] * 3, "now": [1.5] * 3}
    assert printed["values"] == {"seconds.a": values, "dtypes.0.seconds": values}, "rounds are the same in both"
    assert "-25.0%" in shown


def test_a_failure_names_its_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(sys, "argv", ["two_trees", str(tmp_path), "weak_scaling"])
    with pytest.raises(SystemExit, match=r"has no benchmarks/weak_scaling\.py"):
        two_trees.main()
    (tmp_path / "benchmarks" / "fake.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(sys, "argv", ["two_trees", str(tmp_path), "fake"])
    with pytest.raises(SystemExit, match=f"in {tmp_path} ended with 3 and 0 results"):
        two_trees.main()
