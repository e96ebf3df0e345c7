"""`make bench` on a fresh clone: each benchmark that it runs accepts an empty command line."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Parsed(Exception):
    """The command line was accepted; what would follow takes minutes."""


def names_in_make() -> list[str]:
    """The benchmarks that `make bench` runs."""
    command = ["make", "--silent", "--eval=list:; @echo $(BENCH)", "list"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("name", names_in_make())
def test_benchmark_needs_no_argument(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = argparse.ArgumentParser.parse_known_args

    def parse(self: argparse.ArgumentParser, *args: Any, **options: Any) -> Any:
        plain(self, *args, **options)
        raise Parsed

    if "argparse" not in (ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8"):
        return  # it reads no command line
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(Parsed):
        module.main()
