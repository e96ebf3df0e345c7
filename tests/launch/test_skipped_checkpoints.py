"""A run as a source: damaged newer checkpoints are skipped by name, and the newest valid one is used."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.exporting import run_command, trained


def without_notes(errors: str) -> list[str]:
    """The lines but those of an export about programs that cannot serve it."""
    return [line for line in errors.splitlines() if not line.startswith("note: ")]


@pytest.mark.parametrize("verb", ["export", "generate", "grow"])
def test_skipped_checkpoints_are_reported(
    verb: str, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    newest = trained(corpus, tmp_path, "checkpoint.every=1")
    older = newest.with_name("step-00000001")
    (newest / "manifest.json").unlink()
    words = {"generate": ["max_tokens=2"]}.get(verb, [f"target={tmp_path / 'out'}"])
    capfd.readouterr()
    run_command(verb, f"source={newest.parents[1]}", *words)
    assert without_notes(capfd.readouterr().err) == [
        f"skipped {newest}: no readable manifest.json",
        f"used instead: {older}",
    ]
    (older.parent / "step-00000001").rename(tmp_path / "valid")
    run_command(verb, f"source={tmp_path / 'valid'}", *(word.replace("/out", "/again") for word in words))
    assert without_notes(capfd.readouterr().err) == []
