"""A session's saves keep only what its state comes from, and a warning comes before checkpoints older than it go."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest

from longcat.errors import SaveError
from tests.support.distributed import run_ranks
from tests.support.running import NARROW
from train.api import Session, build_session, compose
from train.checkpoint import earlier
from train.checkpoint.manifest import list_checkpoints, step_of


@pytest.fixture
def words(overrides: list[str]) -> list[str]:
    kept = [word for word in overrides if not word.startswith("checkpoint.")]
    return [*kept, *NARROW, "checkpoint.keep=2"]


def steps(folder: Path) -> list[int]:
    return [step_of(path) for path in list_checkpoints(folder)]


def train(words: list[str], *saved: int) -> Path:
    """A session of before, which saved at these steps; returns the run's folder of checkpoints."""
    with build_session(compose(*words)) as session:
        advance(session, *saved)
        return session.checkpoints


def advance(session: Session, *saved: int) -> None:
    for step in saved:
        while session.state.counters.step < step:
            session.step()
        session.save()


@pytest.mark.parametrize("step", [3, 5])
def test_what_the_state_does_not_come_from_counts_for_nothing(words: list[str], step: int) -> None:
    """Neither before nor behind the saved step: counted as one of the two newest, it would push out step 2."""
    checkpoints = train(words, 2, 4)
    with build_session(compose(*words)) as session:
        session.resume(checkpoints / "step-00000002")
        assert steps(checkpoints) == [2, 4], "to look at it changes nothing"
        with pytest.warns(UserWarning, match=rf"step-0000000{step} does not come from .*step-00000004\.abandoned"):
            advance(session, step)
        assert steps(checkpoints) == [2, step]
        assert (checkpoints / "step-00000004.abandoned").is_dir()


def test_a_renamed_checkpoint_s_past_stays(words: list[str]) -> None:
    checkpoints = train(words, 1, 2)
    (checkpoints / "step-00000002").rename(checkpoints / "step-00000002.abandoned")
    with build_session(compose(*words)) as session:
        session.resume(checkpoints / "step-00000002.abandoned")
        advance(session, 3)
        assert steps(checkpoints) == [1, 3]


def test_a_damaged_checkpoint_that_resume_skipped_is_renamed(words: list[str]) -> None:
    checkpoints = train(words, 2, 4)
    (checkpoints / "step-00000004" / "state.json").unlink()
    with build_session(compose(*words)) as session:
        assert session.resume() == checkpoints / "step-00000002"
        with pytest.warns(UserWarning, match=r"step-00000004\.damaged"):
            advance(session, 5)
        assert steps(checkpoints) == [2, 5]


def test_a_warning_comes_before_older_checkpoints_go(words: list[str]) -> None:
    """Once, with their names; what this session saved goes without one."""
    checkpoints = train([*words, "checkpoint.keep=0"], 1, 2, 3)
    with build_session(compose(*words)) as session:
        session.resume()
        with pytest.warns(UserWarning, match=r"step-00000001, step-00000002 stayed.*checkpoint\.keep=2 .*keep=0"):
            advance(session, 4)
        assert steps(checkpoints) == [1, 2, 3, 4]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for number, left in ((5, [4, 5]), (6, [5, 6])):
                advance(session, number)
                assert steps(checkpoints) == left


def settle_fails(words: list[str]) -> str:
    """On each of two ranks: how a save ends if the first one cannot rename."""

    def fail(*arguments: Any) -> None:
        raise PermissionError(1, os.strerror(1))

    with build_session(compose(*words)) as session, pytest.MonkeyPatch.context() as patch:
        patch.setattr(earlier, "set_aside", fail)
        session.resume(session.checkpoints / "step-00000001")
        session.step()
        with pytest.raises(SaveError) as failed:
            session.save()
        assert failed.value.is_saved
        return str(failed.value)


def test_every_rank_hears_that_a_checkpoint_is_not_renamed(words: list[str]) -> None:
    train(words, 1, 3)
    two = [*words, "parallel.fsdp=2", "parallel.timeout_seconds=20"]
    first, second = run_ranks(settle_fails, 2, two)
    assert first == second and "step-00000002 is saved, but others could not be renamed" in first
