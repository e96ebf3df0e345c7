"""Background saves: the state of their step, one at a time; a full disk ends no run and loses no checkpoint."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longcat.errors import ConfigError, UnhealthyError
from parallel.mesh import connect
from tests.support.running import NARROW, exact, exit_json, lines, train_here, trained_state, uninterrupted
from train.checkpoint import save as saving
from train.checkpoint.find import find_start
from train.checkpoint.manifest import list_checkpoints, verify
from train.checkpoint.retention import Keep, make_space, prune, validation_loss
from train.checkpoint.save_times import SAVES, slowest_save
from train.checkpoint.saver import SaveThread
from train.checkpoint.staging import StagingBuffer
from train.checkpoint.thread_context import ThreadContext
from train.compose import compose
from train.step import Stepper


@pytest.fixture
def narrow(overrides: list[str]) -> list[str]:
    return [*overrides, *NARROW]


def steps_there(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(folder / "checkpoints")]


# ------------------------------------------------------------------------------------- background saves


def slow_disk(patch: pytest.MonkeyPatch, seconds: float) -> list[str]:
    """Make every save take ``seconds``; returns a list that collects the names of the writing threads."""
    plain, threads = saving.write_shards, []

    def slowly(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        time.sleep(seconds)
        return plain(*arguments)

    patch.setattr(saving, "write_shards", slowly)
    return threads


def test_background_save_holds_the_state_of_its_step(
    corpus: Path, narrow: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 2 is written while later steps are trained; a run from it repeats them bitwise."""
    words = [*narrow, "train.steps=10", "checkpoint.keep=0"]
    reference = uninterrupted(corpus, words)
    with monkeypatch.context() as patch:
        threads = slow_disk(patch, 0.5)
        seen: list[bool] = []
        step = Stepper.step

        def watched(self: Stepper, *arguments: Any) -> Any:
            seen.append(any(isinstance(thread, SaveThread) for thread in threading.enumerate()))
            return step(self, *arguments)

        patch.setattr(Stepper, "step", watched)
        assert train_here([*words, "checkpoint.every=2"]) == 0
    assert any(seen), "no step was trained while a checkpoint was written"
    assert set(threads) == {"checkpoint"}
    assert steps_there(tmp_path / "run") == [2, 4, 6, 8, 10]
    assert exact(tmp_path / "run") == reference
    for name in (4, 6, 8, 10):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{name:08d}")
    assert train_here(words) == 0
    assert exact(tmp_path / "run") == reference
    assert [row["first_sample"] for row in lines(tmp_path / "run")] == list(range(0, 40, 4))


def test_one_checkpoint_is_written_at_a_time(
    narrow: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, at_once, most = saving.write_shards, [0], [0]

    def counted(*arguments: Any) -> Any:
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        time.sleep(0.1)
        at_once[0] -= 1
        return plain(*arguments)

    monkeypatch.setattr(saving, "write_shards", counted)
    assert train_here([*narrow, "train.steps=5", "checkpoint.every=1", "checkpoint.keep=0"]) == 0
    assert steps_there(tmp_path / "run") == [1, 2, 3, 4, 5] and most == [1]


def test_save_blocks_if_asked(narrow: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = slow_disk(monkeypatch, 0.0)
    assert train_here([*narrow, "train.steps=2", "checkpoint.every=1", "checkpoint.asynchronous=false"]) == 0
    assert set(threads) == {"MainThread"} and steps_there(tmp_path / "run") == [1, 2]


def test_stop_waits_for_the_save_under_way(narrow: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_disk(monkeypatch, 0.3)
    assert train_here([*narrow, "train.stop_after_seconds=0.01", "checkpoint.every=1"]) == 3
    assert steps_there(tmp_path / "run") == [1]
    assert verify(list_checkpoints(tmp_path / "run" / "checkpoints")[0]).problem is None


def test_staging_buffer_is_allocated_once() -> None:
    tensors = [torch.arange(5.0), torch.tensor(3, dtype=torch.int64), torch.ones(2, 3), torch.empty(0)]
    stage = StagingBuffer(torch.device("cpu"))
    first = stage.copy(lambda take: [take(tensor) for tensor in tensors])
    memory = stage.memory
    assert stage.num_bytes == 64 * 3
    assert all(copy.equal(tensor) for copy, tensor in zip(first, tensors, strict=True))
    assert all(copy.untyped_storage().size() == copy.nbytes for copy in first), "the writer would copy it again"
    tensors[0].add_(1)
    assert not first[0].equal(tensors[0]), "a copy shares memory with its source"
    second = stage.copy(lambda take: [take(tensor) for tensor in tensors])
    assert stage.memory is memory and second[0].data_ptr() == first[0].data_ptr()
    assert second[0].equal(tensors[0])


def test_saves_by_minutes(narrow: list[str], tmp_path: Path) -> None:
    words = [*narrow, "train.steps=6", "checkpoint.every=0", "checkpoint.keep=0"]
    in_step = [*words, "checkpoint.asynchronous=false"]  # a save under way delays the next one
    assert train_here([*in_step, "checkpoint.every_minutes=1e-12"]) == 0
    assert steps_there(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    assert train_here([*words, "checkpoint.every_minutes=60", "run.name=seldom"]) == 0
    assert steps_there(tmp_path / "seldom") == [6]


# ------------------------------------------------------------------------------------- retention


def test_newest_periodic_and_best_are_kept(tmp_path: Path) -> None:
    losses = {1: 5.0, 2: 3.0, 3: None, 4: 3.5, 5: float("nan"), 6: 3.0, 7: 4.0, 8: None}
    for step, loss in losses.items():
        path = tmp_path / f"step-{step:08d}"
        path.mkdir()
        (path / "state.json").write_text(json.dumps({"val_loss": loss}))
    (tmp_path / "step-00000003" / "state.json").unlink()

    def left(keep: Keep) -> list[int]:
        prune(tmp_path, keep)
        return [int(path.name.removeprefix("step-")) for path in list_checkpoints(tmp_path)]

    assert left(Keep()) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert left(Keep(newest=2, every=4, best=2)) == [2, 4, 6, 7, 8]
    assert left(Keep(newest=1, best=1)) == [6, 8], "of two equal ones the later is kept"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [1, 2, 3, 4])
def test_only_a_finite_loss_can_be_the_best(bad: float, place: int, tmp_path: Path) -> None:
    finite = iter((3.0, 2.0, 4.0))
    losses = {step: bad if step == place else next(finite) for step in (1, 2, 3, 4)}
    for step, loss in (losses | {5: None}).items():
        path = tmp_path / f"step-{step:08d}"
        path.mkdir()
        (path / "state.json").write_text(json.dumps({"val_loss": loss}))
    prune(tmp_path, Keep(newest=1, best=1))
    best = next(step for step, loss in losses.items() if loss == 2.0)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-{best:08d}", "step-00000005"]


def test_keeping_the_best_needs_validation() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.keep_best=2 .* validation\.every=0 measures none"):
        compose(["checkpoint.keep_best=2", "validation.every=0"])


def test_best_checkpoint_by_validation_is_kept(narrow: list[str], tmp_path: Path) -> None:
    words = ["validation.every=2", "validation.batches=1", "checkpoint.every=1", "checkpoint.keep=1"]
    enough = ["train.steps=8", "checkpoint.keep_best=1", "data.validation_fraction=0.1"]
    assert train_here([*narrow, *words, *enough]) == 0
    measured = {row["step"]: row["val_loss"] for row in lines(tmp_path / "run") if "val_loss" in row}
    best = min(measured, key=lambda step: (measured[step], -step))
    assert steps_there(tmp_path / "run") == sorted({best, 8})
    found = {path.name: validation_loss(path) for path in list_checkpoints(tmp_path / "run" / "checkpoints")}
    assert found[f"step-{best:08d}"] == measured[best]


@pytest.mark.parametrize("key", ["every_minutes", "keep_every", "keep_best"])
def test_negative_retention_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"checkpoint\.{key}=-1\S* must not be negative"):
        compose([f"checkpoint.{key}=-1"])


# ------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "small", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path, left: int) -> Path:
    """Write a file that leaves ``left`` bytes free."""
    stuff = disk / "stuff"
    with stuff.open("wb") as file:
        file.truncate(0)
        file.write(bytes(max(0, shutil.disk_usage(disk).free - left)))
    return stuff


@pytest.mark.parametrize("asynchronous", ["true", "false"])
@pytest.mark.parametrize("foreseen", [True, False], ids=["foreseen", "while_writing"])
def test_full_disk_keeps_the_last_checkpoint_and_the_run(
    foreseen: bool,
    asynchronous: str,
    corpus: Path,
    narrow: list[str],
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """On a full disk the last valid checkpoint stays and training continues."""
    words = [*narrow, f"run.dir={small_disk}", f"checkpoint.asynchronous={asynchronous}", "checkpoint.keep=0"]
    run = small_disk / "run"
    assert train_here([*words, "train.steps=4"]) == 0
    if not foreseen:
        monkeypatch.setattr(saving, "SPARE_BYTES", -(1 << 30))
    stuff = fill(small_disk, 200_000)
    capfd.readouterr()
    assert train_here([*words, "train.steps=10", "checkpoint.every=2"]) == 1
    reason = (
        r"checkpoints has 0\.\d MiB left; free some, lower checkpoint\.keep or"
        if foreseen
        else "No space left on device"
    )
    printed = capfd.readouterr()
    said = exit_json(run)["message"]
    assert "the checkpoint of step 10 is not saved: " in said and "step-00000004" in said
    assert re.search(reason, said), said
    assert printed.out.count("NOT SAVED: the checkpoint of step") == 3, "6, 8 and 10"
    assert "Traceback" not in printed.err and printed.err.count("error: ") == 1
    assert len(lines(run)) == 10, "training continued"
    assert steps_there(run) == [4] and not list(run.glob("checkpoints/*.partial"))
    found, skipped = find_start(run / "checkpoints", "auto")
    assert found is not None and found.name == "step-00000004" and skipped == []
    stuff.unlink()
    assert train_here([*words, "train.steps=10"]) == 0
    assert exact(run) == uninterrupted(corpus, [*words, "train.steps=10"])


def test_space_freed_in_time_is_used(
    narrow: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first two saves fail (each tries twice), the third does not: the run ends with a checkpoint."""
    plain, calls = shutil.disk_usage, [0]

    def usage(path: Any) -> Any:
        calls[0] += 1
        return plain(path)._replace(free=17) if calls[0] < 5 else plain(path)

    monkeypatch.setattr(saving.shutil, "disk_usage", usage)
    assert train_here([*narrow, "train.steps=3", "checkpoint.every=1"]) == 0
    assert steps_there(tmp_path / "run") == [3]
    assert capfd.readouterr().out.count("NOT SAVED") == 2


def test_keeping_fewer_frees_space(
    narrow: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """There is no space for a third checkpoint."""
    run, plain = tmp_path / "run", shutil.disk_usage
    assert train_here([*narrow, "train.steps=3", "checkpoint.every=1", "checkpoint.keep=3"]) == 0

    def usage(path: Any) -> Any:
        return plain(path)._replace(free=17 if len(list_checkpoints(run / "checkpoints")) > 2 else 1 << 40)

    monkeypatch.setattr(saving.shutil, "disk_usage", usage)
    capfd.readouterr()
    assert train_here([*narrow, "train.steps=4", "checkpoint.keep=3"]) == 1, "as many are to be kept"
    assert steps_there(run) == [1, 2, 3]
    assert train_here([*narrow, "train.steps=4", "checkpoint.keep=1"]) == 0
    assert "NOT SAVED" in capfd.readouterr().out and steps_there(run) == [4]


def test_newest_valid_checkpoint_is_never_removed_for_space(narrow: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train_here([*narrow, "train.steps=3", "checkpoint.every=1", "checkpoint.keep=3"]) == 0
    (run / "checkpoints" / "step-00000003" / "manifest.json").unlink()
    topology = connect(compose(narrow).parallel)
    make_space(run / "checkpoints", Keep(newest=1), topology, ThreadContext())
    dist.destroy_process_group()
    assert steps_there(run) == [2, 3]


def test_checkpoint_that_cannot_be_removed_is_only_reported(
    narrow: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "step-00000001")

    monkeypatch.setattr(saving, "prune_after_commit", refuse)
    assert train_here([*narrow, "train.steps=2", "checkpoint.every=1"]) == 0
    printed = capfd.readouterr().out
    assert printed.count("is saved, but older ones could not be removed: rank 0: Permission denied") == 2
    assert "NOT SAVED" not in printed and steps_there(tmp_path / "run") == [1, 2]


def test_error_in_the_save_thread_is_raised(narrow: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unexpected error ends the run as it would without a thread."""

    def fail(*arguments: Any) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(saving, "write_shards", fail)
    with pytest.raises(ZeroDivisionError):
        train_here([*narrow, "train.steps=3", "checkpoint.every=1"])
    assert exit_json(tmp_path / "run")["code"] == 1


def test_non_finite_state_in_the_save_thread_ends_the_run(
    narrow: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Stepper._update

    def blow_up(self: Stepper, *arguments: Any) -> None:
        plain(self, *arguments)
        if self.state.counters.step == 3:  # the last step: no later step can raise it
            next(iter(self.state.store.local_boxes())).values.view(-1)[0] = float("inf")

    monkeypatch.setattr(Stepper, "_update", blow_up)
    assert train_here([*narrow, "train.steps=4", "checkpoint.every=1", "validation.every=0"]) == 4
    assert steps_there(tmp_path / "run") == [2, 3]
    assert "step 4: a weight, a moment or a bias is not finite" in exit_json(tmp_path / "run")["message"]


@pytest.mark.parametrize("part", ["bias", "controller"])
def test_non_finite_bias_is_not_saved(part: str, narrow: list[str], tmp_path: Path) -> None:
    """Also where it was not this step that made it so."""
    state, topology, _ = trained_state([*narrow, "train.dtype=float32"], 1)
    try:
        tensor = state.biases if part == "bias" else next(iter(state.controller.state().values()))
        tensor.view(-1)[0] = float("inf")
        with pytest.raises(UnhealthyError, match="a weight, a moment or a bias is not finite"):
            saving.save(state, tmp_path / "checkpoints", {}, topology)
    finally:
        state.engine.close()
        dist.destroy_process_group()
    assert steps_there(tmp_path) == []


# ------------------------------------------------------------------------------------------ how long they take


@pytest.mark.parametrize("asynchronous", [True, False])
def test_each_save_is_timed(
    asynchronous: bool, narrow: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line for each checkpoint; training waits for a blocking save and at the end of a run, else for a copy."""
    slow_disk(monkeypatch, 0.3)
    words = [*narrow, "train.steps=4", "checkpoint.every=3", f"checkpoint.asynchronous={asynchronous}"]
    assert train_here(words) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / SAVES).read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 4]
    assert all(0.3 <= row["save_seconds"] < 5 for row in rows), rows
    assert all(row["blocked_seconds"] > 0 for row in rows) and rows[1]["blocked_seconds"] >= 0.3, rows
    assert slowest_save(tmp_path / "run") == max(row["save_seconds"] for row in rows)
    with (tmp_path / "run" / SAVES).open("a") as file:
        file.write('{"step": 5, "save_sec')
    assert slowest_save(tmp_path / "run") == max(row["save_seconds"] for row in rows), "a torn line counts for nothing"
    assert slowest_save(tmp_path) is None


def test_times_that_cannot_be_written_are_noted_once(
    narrow: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A folder is where saves.jsonl would be; training goes on."""
    (tmp_path / "run" / SAVES).mkdir(parents=True)
    assert train_here([*narrow, "train.steps=3", "checkpoint.every=1"]) == 0
    log = (tmp_path / "run" / "run.log").read_text()
    assert log.count(f"{SAVES} cannot be written: Is a directory") == 1, log
