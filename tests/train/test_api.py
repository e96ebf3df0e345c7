"""The Python API trains as the command line does, and each resumes from the other's checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from longcat.errors import ConfigError
from tests.support.running import lines, train_here
from train.api import build_session, compose

KEYS = ("loss", "grad_norm", "tokens", "first_sample")


def test_session_steps_equal_the_command_line_s(overrides: list[str], tmp_path: Path) -> None:
    """Losses and state hash bitwise; the command line resumes from the session's checkpoint."""
    assert train_here([*overrides, "train.steps=5", "run.name=reference"]) == 0
    reference = lines(tmp_path / "reference")
    with build_session(compose(*overrides)) as session:
        assert session.resume() is None, "a new run has no checkpoint"
        for expected in reference[:3]:
            metrics = session.step()
            assert {key: metrics[key] for key in KEYS} == {key: expected[key] for key in KEYS}
            assert session.state_hash() == expected["state_hash"]
        assert session.save() == tmp_path / "run" / "checkpoints" / "step-00000003"
    assert train_here([*overrides, "train.steps=5"]) == 0
    assert [line["state_hash"] for line in lines(tmp_path / "run")] == [line["state_hash"] for line in reference[3:]]
    with build_session(compose(*overrides)) as session:
        assert session.resume() == tmp_path / "run" / "checkpoints" / "step-00000005"
        assert session.state_hash() == reference[-1]["state_hash"]
        assert session.validate().loss > 0


def test_impossible_layout_is_refused_before_ranks_meet(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.ep"):
        build_session(compose(*overrides, "parallel.ep=2"))


def test_resumed_session_keeps_the_checkpoint_s_chunks(overrides: list[str]) -> None:
    """Its bits depend on the number, so `auto` must not choose another one."""
    with build_session(compose(*overrides, "overlap.num_chunks=2")) as session:
        session.step()
        saved = session.save()
    automatic = compose(*overrides, "overlap.num_chunks=auto", "run.name=other")
    with build_session(automatic) as session:
        assert automatic.overlap.num_chunks == 1, "nothing overlaps in one process"
        assert session.resume(saved) == saved
        assert automatic.overlap.num_chunks == 2
