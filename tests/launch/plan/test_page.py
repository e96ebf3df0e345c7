"""The guide's plan of LongCat-Flash is what the command on that page prints."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.plan.plan import plan, read
from launch.plan.show import table
from tests.support.distributed import run_ranks

PAGE = Path(__file__).resolve().parents[3] / "docs" / "guide" / "plan.md"
SHOWN = re.compile(r"<!-- plan of LongCat-Flash -->\n(.*?)<!-- end of plan -->", re.DOTALL)


def printed(arguments: Sequence[str]) -> list[str]:
    return table(plan(*read(list(arguments))))


@pytest.mark.long
def test_page_shows_what_its_command_prints() -> None:
    text = PAGE.read_text(encoding="utf-8")
    (command,) = [line for line in text.splitlines() if "plan.faults_per_gpu_year=0.0238" in line]
    shown = SHOWN.search(text)
    assert shown is not None
    lines = [line.removeprefix("    ") for line in shown[1].splitlines() if line.strip()]
    (found,) = run_ranks(printed, 1, shlex.split(command)[2:], timeout=600)
    assert len(lines) > 15
    assert set(lines) <= set(found)
