"""The sample index on disk: complete or not there, compared when it is read, built again when it is damaged."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from longcat.errors import ConfigError
from tests.support.fixtures import Refused
from tests.support.running import NARROW, lines, train_here
from train.data import index_files
from train.data.index_files import MANIFEST, NAMES, first_to_build, publish_index, read_index
from train.run_dir.sealed import DamagedError
from train.samples import index_folders

ARRAYS = (np.arange(50), np.arange(60).reshape(30, 2), np.random.default_rng(0).permutation(29))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zeros(path: Path) -> None:
    """As after a power cut: the size is right, the contents were never written."""
    path.write_bytes(path.read_bytes()[:128] + bytes(path.stat().st_size - 128))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def remove(path: Path) -> None:
    path.unlink()


DAMAGE = [empty, zeros, truncate, remove]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [*(f"{name}.npy" for name in NAMES), MANIFEST])
def test_damaged_index_is_noticed_and_replaced(damage: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    folder = tmp_path / "epoch"
    assert publish_index(folder, ARRAYS)
    damage(folder / name)
    with pytest.raises(DamagedError):
        read_index(folder)
    assert publish_index(folder, ARRAYS)
    assert not publish_index(folder, ARRAYS), "a valid one stays"
    for read, written in zip(read_index(folder), ARRAYS, strict=True):
        np.testing.assert_array_equal(read, written)
        assert isinstance(read, np.memmap), "ranks share it"
    assert [path.name for path in tmp_path.iterdir()] == ["epoch"]


def test_ranks_that_repair_at_once_leave_one_valid_index(tmp_path: Path) -> None:
    folder = tmp_path / "epoch"
    for _ in range(10):
        publish_index(folder, ARRAYS)
        empty(folder / "samples.npy")
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: publish_index(folder, ARRAYS), range(4)))
        np.testing.assert_array_equal(read_index(folder)[2], ARRAYS[2])
    assert [path.name for path in tmp_path.iterdir()] == ["epoch"]


def test_an_index_that_was_put_aside_and_written_again_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two looks of this rank another one has repaired it."""
    folder = tmp_path / "epoch"
    publish_index(folder, ARRAYS)
    found = iter([FileNotFoundError(folder)])

    def read(*arguments: Any) -> Any:
        for error in found:
            raise error
        return read_index(*arguments)

    monkeypatch.setattr(index_files, "read_index", read)
    assert not publish_index(folder, ARRAYS)


def unexpected(text: str) -> None:
    raise AssertionError(text)


@pytest.mark.parametrize("is_written", [True, False])
def test_ranks_that_miss_an_index_wait_for_the_first(is_written: bool, tmp_path: Path) -> None:
    """Then they read what it has written; where it could not write, all others go on at once."""
    places, begun = [tmp_path / "cache" / "epoch"], list[int]()

    def rank(number: int) -> bool:
        with first_to_build(places, unexpected) as is_first:
            if is_first:
                begun.append(number)
                time.sleep(0.3)
                if is_written:
                    publish_index(places[0], ARRAYS)
        return is_first

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(rank, range(8)))
    assert len(begun) == 1 and found.count(True) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["epoch"] * is_written


def test_a_first_one_that_fails_or_stays_is_not_waited_for(tmp_path: Path) -> None:
    place = tmp_path / "epoch"
    with pytest.raises(OSError, match="planted"), first_to_build([place], unexpected):
        raise OSError("planted")
    with first_to_build([place], unexpected) as is_first:
        with first_to_build([place], unexpected, 0.2) as is_second:
            assert is_first and is_second, "after its patience it builds, too"
        assert [path.name for path in tmp_path.iterdir()] == [".epoch.lock"], "the lock is the first one's"
    assert not list(tmp_path.iterdir())


def test_a_lock_is_removed_by_its_holder_alone(tmp_path: Path) -> None:
    """The second one locks the file that the first has removed, while a third holds a new one."""
    place, lock = tmp_path / "epoch", tmp_path / ".epoch.lock"
    with first_to_build([place], unexpected):
        lock.unlink()
        with first_to_build([place], unexpected) as is_holder:
            assert is_holder and lock.exists()
            inode = lock.stat().st_ino
            with first_to_build([place], unexpected, 0.1):
                pass
            assert lock.stat().st_ino == inode
        lock.touch()
    assert lock.exists(), "another process's file"


def test_waiting_works_where_locks_depend_on_how_a_file_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS has it: a shared lock needs a file open for reading, an exclusive one a file open for writing."""
    real = fcntl.flock

    def flock(file: IO[bytes], operation: int) -> None:
        if not (file.readable() if operation & fcntl.LOCK_SH else file.writable()):
            raise OSError(errno.EBADF, "Bad file descriptor")
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with first_to_build([tmp_path / "epoch"], unexpected):
        start = time.monotonic()
        with first_to_build([tmp_path / "epoch"], unexpected, 0.3):
            assert time.monotonic() - start >= 0.3


def test_a_process_that_waits_says_for_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_files, "SAY_AFTER", 0.1)
    place, notes = tmp_path / "epoch", list[str]()
    with first_to_build([place], unexpected), first_to_build([place], notes.append, 0.5):
        pass
    held = f"it holds {tmp_path / '.epoch.lock'}"
    assert notes == [f"another process builds the sample index ({held}); waiting 0.5 s at most"]


def test_processes_build_at_once_where_nothing_can_be_locked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    places = [tmp_path / "file" / "epoch"]
    with first_to_build(places, unexpected) as is_first, first_to_build(places, unexpected) as is_second:
        assert is_first and is_second


def test_an_index_that_was_in_the_way_may_be_gone_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank puts a damaged folder aside between this rank's rename and its look at what is there."""
    rename, failures = os.rename, [OSError(errno.ENOTEMPTY, "Directory not empty")]

    def renamed(source: Path, target: Path) -> None:
        if failures:
            raise failures.pop()
        rename(source, target)

    monkeypatch.setattr(os, "rename", renamed)
    assert publish_index(tmp_path / "epoch", ARRAYS)


def test_file_in_the_place_of_an_index_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "epoch").write_text("a file")
    with pytest.raises(OSError):
        publish_index(tmp_path / "epoch", ARRAYS)
    assert (tmp_path / "epoch").read_text() == "a file"


def test_contents_are_synced_before_the_name_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        done.append("renamed")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    publish_index(tmp_path / "epoch", ARRAYS)
    assert set(done[: done.index("renamed")]) >= {*(f"{name}.npy" for name in NAMES), MANIFEST}
    assert done[-1] == tmp_path.name, "the folder that holds the new name"


@pytest.fixture
def copied(corpus: Path, tmp_path: Path) -> Path:
    """A copy of the corpus without an index."""
    for path in corpus.parent.glob("*.*"):
        if path.is_file():
            (tmp_path / "c").mkdir(exist_ok=True)
            (tmp_path / "c" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "c" / "corpus"


@pytest.mark.parametrize("damage", DAMAGE)
def test_run_with_a_damaged_index_reads_the_same(
    damage: Callable[[Path], None],
    copied: Path,
    overrides: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = [*overrides, *NARROW, f"data.paths=[{copied}]", "train.steps=3"]
    assert train_here(words) == 0
    capfd.readouterr()
    folders = sorted((copied.parent / "index").glob("epoch-*"))
    assert len(folders) == 1, "no validation in this run"
    for name in NAMES:
        damage(folders[0] / f"{name}.npy")
    assert train_here([*words, "run.name=again"]) == 0
    assert capfd.readouterr().err.count("is damaged") == 1
    losses = [[row["loss"] for row in lines(tmp_path / name)] for name in ("run", "again")]
    assert losses[0] == losses[1]


def in_the_way(folder: Path) -> None:
    """A place that cannot be written, whoever runs the test."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index").write_text("a file where the folder belongs")


def test_corpus_that_cannot_be_written_uses_the_run_folder(
    copied: Path, overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    in_the_way(copied.parent)
    words = [*overrides, *NARROW, f"data.paths=[{copied}]", "train.steps=2", "validation.every=1"]
    assert train_here(words) == 0
    said = capfd.readouterr().err
    assert said.count("cannot be written beside the corpus") == 1 and f"it is in {tmp_path / 'run' / 'index'}" in said
    assert list((tmp_path / "run" / "index").glob("epoch-*"))
    assert train_here([*words, "train.steps=3"]) == 0
    assert capfd.readouterr().err == "", "the second start finds it there"


def test_index_in_the_folder_that_a_key_names(
    copied: Path, overrides: list[str], refused: Refused, tmp_path: Path
) -> None:
    in_the_way(copied.parent)
    words = [*overrides, *NARROW, f"data.paths=[{copied}]", "train.steps=2"]
    assert train_here([*words, f"data.cache_dir={tmp_path / 'cache' / 'deep'}"]) == 0
    assert list((tmp_path / "cache" / "deep").glob("epoch-*"))
    assert not (tmp_path / "run" / "index").exists()
    in_the_way(tmp_path / "wrong")
    refused(["train", *words, "run.name=b", f"data.cache_dir={tmp_path / 'wrong' / 'index'}"], "data.cache_dir")


def test_valid_index_of_a_read_only_folder_is_used(copied: Path, overrides: list[str], tmp_path: Path) -> None:
    words = [*overrides, *NARROW, f"data.paths=[{copied}]", "train.steps=2"]
    assert train_here(words) == 0
    assert train_here([*words, "run.name=b"]) == 0
    assert not (tmp_path / "b" / "index").exists()


def test_places_of_the_index(overrides: list[str], corpus: Path, tmp_path: Path) -> None:
    from train.compose import compose

    assert index_folders(compose(overrides)) == [corpus.parent / "index", tmp_path / "run" / "index"]
    assert index_folders(compose([*overrides, "data.cache_dir=/some/where"])) == [Path("/some/where")]
    with pytest.raises(ConfigError):
        compose(["data.cache_folder=x"])
