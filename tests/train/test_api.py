"""The Python API trains as the command line does, and each resumes from the other's checkpoints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longcat.errors import ConfigError, FolderInUseError, SaveError
from tests.support.distributed import run_ranks
from tests.support.running import NARROW, lines, train_here
from train import api
from train.api import build_session, compose
from train.checkpoint import save as saving
from train.checkpoint.manifest import list_checkpoints, step_of
from train.run_dir.folder import lock, read_unchanged_config

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


def test_a_session_s_run_is_guarded_as_any_run(overrides: list[str], tmp_path: Path) -> None:
    """config.yaml is written, `checkpoint.keep` applies, another configuration is refused, also without that file."""
    words = [*overrides, *NARROW, "checkpoint.keep=2"]
    folder = tmp_path / "run"
    with build_session(compose(*words)) as session:
        assert not (folder / "config.yaml").exists(), "nothing is saved yet"
        for _ in range(4):
            session.step()
            session.save()
            session.save(tmp_path / "all")
        assert steps(folder / "checkpoints") == [3, 4] and steps(tmp_path / "all") == [1, 2, 3, 4]
    assert read_unchanged_config(folder)["checkpoint"]["keep"] == 2
    with pytest.raises(ConfigError, match=r"belongs to another configuration.*optim\.lr was"):
        build_session(compose(*words, "optim.lr=0.5"))
    (folder / "config.yaml").unlink()
    with (
        build_session(compose(*words, "optim.lr=0.5")) as session,
        pytest.raises(ConfigError, match=r"of this run is of another configuration: optim\.lr was"),
    ):
        session.resume()
    with build_session(compose(*words, "optim.lr=0.5", "run.name=other")) as session:
        assert session.resume(folder / "checkpoints" / "step-00000004") is not None


def test_a_session_that_went_back_keeps_its_own_checkpoints(overrides: list[str], tmp_path: Path) -> None:
    """Those of later steps are another past: they would be the newest, and its own ones be removed."""
    words, checkpoints = [*overrides, *NARROW, "checkpoint.keep=2"], tmp_path / "run" / "checkpoints"
    with build_session(compose(*words)) as session:
        for _ in range(4):
            session.step()
            session.save()
    with build_session(compose(*words)) as session:
        session.resume(checkpoints / "step-00000003")
        assert steps(checkpoints) == [3, 4], "to look at it changes nothing"
    with build_session(compose(*words)) as session:
        session.step()
        with pytest.warns(UserWarning, match=r"step-00000003\.abandoned, step-00000004\.abandoned"):
            session.save()
        assert steps(checkpoints) == [1]
        session.step()
        session.save()
        assert steps(checkpoints) == [1, 2] and (checkpoints / "step-00000004.abandoned").is_dir()


def test_the_best_checkpoint_is_kept(overrides: list[str], tmp_path: Path) -> None:
    keep = ["checkpoint.keep=1", "checkpoint.keep_best=1", "validation.every=1", "validation.batches=1"]
    with build_session(compose(*overrides, *NARROW, *keep)) as session:
        session.step()
        session.validate()
        session.save()
        for _ in range(2):
            session.step()
            session.save()
        assert steps(session.checkpoints) == [1, 3]


def test_a_validation_counts_for_the_state_that_it_measured(overrides: list[str], tmp_path: Path) -> None:
    """`resume` may bring other weights of the same step."""
    lower = [*overrides, *NARROW, "optim.lr=1e-5", "run.name=other"]
    with build_session(compose(*lower)) as session:
        session.step()
        other = session.save()
    with build_session(compose(*overrides, *NARROW)) as session:
        session.step()
        session.validate()
        session.resume(other)
        assert json.loads((session.save() / "state.json").read_text())["val_loss"] is None


def test_a_save_leaves_the_random_state(overrides: list[str], tmp_path: Path) -> None:
    """Where one rank alone drew numbers, ranks would differ; config.yaml has no measured FLOP/s."""
    with build_session(compose(*overrides, *NARROW)) as session:
        session.step()
        before = torch.get_rng_state()
        session.save()
        assert torch.equal(torch.get_rng_state(), before)
    derived = read_unchanged_config(tmp_path / "run")["derived"]
    assert derived["parameters"] > 0 and "peak_gflops_per_rank" not in derived


def test_a_corrected_configuration_builds_after_a_failure(overrides: list[str]) -> None:
    with pytest.raises(ConfigError):
        build_session(compose(*overrides, "model.vocab_size=400"))
    assert not dist.is_initialized()
    with build_session(compose(*overrides)):
        pass


def test_a_second_session_is_refused_and_the_first_goes_on(overrides: list[str]) -> None:
    with build_session(compose(*overrides, *NARROW)) as session:
        with pytest.raises(ConfigError, match=r"another session is open, call its close\(\)"):
            build_session(compose(*overrides, *NARROW, "run.name=other"))
        session.step()
        session.save()
    with build_session(compose(*overrides, *NARROW, "run.name=other")) as other:
        session.close()  # once more
        other.step()
        assert dist.is_initialized()


def config_fails(words: list[str]) -> str:
    """On each of two ranks: how a save ends if the first one cannot write config.yaml."""

    def fail(*arguments: Any) -> None:
        raise ConfigError("config.yaml cannot be read")

    with build_session(compose(*words)) as session, pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "write_config", fail)
        session.step()
        with pytest.raises(SaveError) as failed:
            session.save()
        return str(failed.value)


def test_every_rank_hears_that_config_yaml_is_not_written(overrides: list[str]) -> None:
    two = [*overrides, *NARROW, "parallel.fsdp=2", "parallel.timeout_seconds=20"]
    first, second = run_ranks(config_fails, 2, two)
    assert first == second and "config.yaml cannot be read" in first


def test_a_folder_has_one_session_or_training(overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with lock(tmp_path / "run"), pytest.raises(FolderInUseError, match="in use by a running training"):
        build_session(compose(*overrides))
    assert not dist.is_initialized()
    with build_session(compose(*overrides)):
        assert train_here_locked(overrides) == 2
    with build_session(compose(*overrides)):
        pass


def train_here_locked(words: list[str]) -> int:
    """A training in another process, which ends before it starts."""
    return subprocess.run([sys.executable, "-P", "-m", "train", *words], capture_output=True).returncode


def build_both(words: list[str]) -> list[str]:
    """On each of two ranks: why there is no session."""
    with pytest.raises(FolderInUseError) as refused:
        build_session(compose(*words))
    return [str(refused.value)]


def test_every_rank_hears_that_the_folder_is_in_use(overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with lock(tmp_path / "run"):
        said = run_ranks(build_both, 2, [*overrides, "parallel.fsdp=2"])
    assert said[0] == said[1] and "is in use" in said[0][0]


def test_ctrl_c_waits_for_the_end_of_a_save(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heeds_ctrl_c: None
) -> None:
    """Under torchrun the other ranks wait for this one in the save's collectives."""
    plain = saving.write_shards

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return plain(*arguments)

    monkeypatch.setattr(saving, "write_shards", interrupted)
    with build_session(compose(*overrides, *NARROW)) as session:
        session.step()
        with pytest.raises(KeyboardInterrupt):
            session.save()
        assert steps(session.checkpoints) == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def steps(folder: Path) -> list[int]:
    return [step_of(path) for path in list_checkpoints(folder)]


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
