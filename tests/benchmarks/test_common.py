"""How a benchmark's program ends."""

from __future__ import annotations

import pytest

from benchmarks import context_extension, coordinate_check
from benchmarks.common import run_main


@pytest.mark.parametrize("program", [coordinate_check, context_extension])
def test_a_wrong_key_is_one_line(
    program: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was a traceback with exit code 1."""
    monkeypatch.setattr("sys.argv", ["program", "optim.lrr=1"])
    with pytest.raises(SystemExit, match="2"):
        run_main(program.main)  # type: ignore[attr-defined]
    assert capsys.readouterr().err == "error: unknown key 'optim.lrr'; the nearest is 'optim.lr'\n"
