"""Spikes in a training from Python: a rollback under either sharding engine, and the end of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from longcat.errors import UnhealthyError
from tests.support.running import NARROW
from tests.train.health.planted import WATCHFUL, plant
from train.api import Session, build_session, compose
from train.checkpoint.dcp_tensors import box_values, saved
from train.checkpoint.manifest import list_checkpoints, step_of


@pytest.fixture
def words(overrides: list[str]) -> list[str]:
    kept = [word for word in overrides if not word.startswith("checkpoint.")]
    return [*kept, *NARROW, *WATCHFUL, "checkpoint.every=5"]


def values(session: Session) -> list[Tensor]:
    """Copies of weights, moments, step counts, biases and the controller's state."""
    tensors = saved(session.state, Tensor.clone)
    others = (tensors[key] for key in tensors if key.startswith(("optimizer", "bias", "control")))
    return [*(one.clone() for one in box_values(tensors)), *others]


@pytest.mark.parametrize("sharding", ["fsdp", "zero1", pytest.param("zero3", marks=pytest.mark.long)])
def test_a_rollback_restores_every_bit_of_the_state(
    words: list[str], monkeypatch: pytest.MonkeyPatch, sharding: str
) -> None:
    plant(monkeypatch, [28])
    config = compose(*words, "health.on_spike=rollback", f"parallel.sharding={sharding}")
    with build_session(config) as session:
        for _ in range(5):
            session.step()
        session.save()
        before = values(session)
        actions = [session.step().get("spike_action") for _ in range(3)]
        assert actions == [None, None, "rollback"]
        assert session.state.counters.step == 5 and session.state.counters.samples == 20
        assert all(map(torch.equal, values(session), before))
        assert session.step()["first_sample"] == 32


def test_without_a_checkpoint_the_step_is_skipped(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, [28])
    with build_session(compose(*words, "health.on_spike=rollback")) as session:
        assert [session.step().get("spike_action") for _ in range(9)] == [None] * 7 + ["skip", None]


def test_a_stop_raises(words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plant(monkeypatch, [28])
    with build_session(compose(*words, "health.on_spike=stop")) as session:
        for _ in range(7):
            session.step()
        with pytest.raises(UnhealthyError, match=r"step 8: the gradient norm of .* σ above"):
            session.step()


@pytest.mark.parametrize("resumes", [True, False])
def test_a_rollback_loads_no_checkpoint_of_another_past(
    words: list[str], monkeypatch: pytest.MonkeyPatch, resumes: bool
) -> None:
    """Without a resume there is none of its own, so the batch is skipped and the folder stays as it is."""
    words = [*words, "health.on_spike=rollback", "checkpoint.keep=0"]
    with build_session(compose(*words)) as session:
        for step in range(1, 7):
            session.step()
            if step in (2, 6):
                session.save()
        checkpoints = session.checkpoints
    plant(monkeypatch, [28])
    with build_session(compose(*words)) as session:
        if resumes:
            session.resume(checkpoints / "step-00000002")
        action = next(filter(None, (session.step().get("spike_action") for _ in range(8))))
        assert (action, session.state.counters.step) == (("rollback", 2) if resumes else ("skip", 8))
    assert [step_of(path) for path in list_checkpoints(checkpoints)] == ([2] if resumes else [2, 6])
