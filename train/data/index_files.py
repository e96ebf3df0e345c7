"""The sample index of one epoch on disk: synced and hashed when written, compared when read, shared by ranks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from train.checkpoint.files import HashedFile, file_hash, sync_folder
from train.run_dir.files import Note, remove_quietly
from train.run_dir.sealed import DamagedError, read_sealed, write_sealed

NAMES = ("documents", "samples", "shuffle")  # of an epoch of samples that are cut anywhere
MANIFEST = "index.json"  # the hash of each file
PATIENCE, SAY_AFTER, POLL_SECONDS = 600.0, 30.0, 0.1  # of a process that waits for one that builds an index


def read_index(folder: Path, names: Sequence[str] = NAMES) -> tuple[np.ndarray, ...]:
    """The arrays of ``names``, mapped into memory: ranks of one machine share them.

    Raises:
        FileNotFoundError: there is no such folder.
        DamagedError: a file is missing or is not what was written.
    """
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    try:
        hashes = read_sealed(folder / MANIFEST)
        for name in names:
            if file_hash(folder / f"{name}.npy") != hashes.get(name):
                raise DamagedError(f"{name}.npy is not what was written")
        return tuple(np.load(folder / f"{name}.npy", mmap_mode="r") for name in names)
    except (OSError, ValueError) as error:
        raise DamagedError(str(error)) from error


@contextlib.contextmanager
def first_to_build(places: Sequence[Path], note: Note, patience: float = PATIENCE) -> Iterator[bool]:
    """Yields whether this process is to build a missing index: False once another one, which came first, has ended.

    Building takes a core and many times the index's memory, and the ranks of a machine come to it together. The first
    holds a lock beside the first of ``places`` that can be written. Where there are no locks (some network file
    systems), or the holder does not end within ``patience`` seconds (it may be suspended), each process builds.

    Args:
        note: is told that this process waits, and for what.
    """
    paths = [folder.with_name(f".{folder.name}.lock") for folder in places]
    file = next((opened for path in paths if (opened := _open_lock(path)) is not None), None)
    if file is None:
        yield True
        return
    with file:
        is_holder = _lock(file)
        try:
            yield is_holder or not _wait(file, note, patience)
        finally:
            if is_holder and _is_current(file):  # who waits has it open, and who comes later makes another
                remove_quietly(Path(file.name))


def _is_current(file: IO[bytes]) -> bool:
    """Whether the open file is still the one at its path: the process that held its lock before has removed it."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    return False


def _open_lock(path: Path) -> IO[bytes] | None:
    """The file, made if it is not there; another user's, which a killed process left, can be locked too.

    NFS gives shared locks only to a file that is open for reading, and exclusive ones to one open for writing.
    """
    for mode in ("a+b", "rb"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open(mode)
        except OSError:
            continue
    return None


def _lock(file: IO[bytes]) -> bool:
    """Whether the file is locked for this process now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _wait(file: IO[bytes], note: Note, patience: float) -> bool:
    """Wait until nobody holds the lock; False where it cannot be known, or after ``patience`` seconds."""
    start, is_said = time.monotonic(), False
    while time.monotonic() - start < patience:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(POLL_SECONDS)
        except OSError:
            return False
        else:
            return True
        if not is_said and time.monotonic() - start > SAY_AFTER:
            note(f"another process builds the sample index (it holds {file.name}); waiting {patience:g} s at most")
            is_said = True
    return False


def publish_index(folder: Path, arrays: tuple[np.ndarray, ...], names: Sequence[str] = NAMES) -> bool:
    """Write ``arrays``, by their ``names``, as ``folder``; returns whether this call wrote it.

    It appears when all is on disk. A damaged folder is replaced. A valid one, which another rank has written meanwhile,
    stays.

    Raises:
        OSError: the folder cannot be written.
    """
    temporary = _beside(folder)
    try:
        temporary.mkdir(parents=True)
        hashes = {}
        for name, array in zip(names, arrays, strict=True):
            with HashedFile(temporary / f"{name}.npy") as file:
                np.save(file, array)  # type: ignore[arg-type]
            hashes[name] = file.hash
        write_sealed(temporary / MANIFEST, hashes)
        sync_folder(temporary)
        return _put_in_place(temporary, folder, names)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, folder: Path, names: Sequence[str]) -> bool:
    while True:
        try:
            os.rename(temporary, folder)
        except OSError as error:
            # A lost race, also where the folder that was in the way has been put aside since; else it cannot be written
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) and not os.path.lexists(folder):
                raise
        else:
            sync_folder(folder.parent)
            return True
        try:
            read_index(folder, names)
        except FileNotFoundError:  # another rank put it aside, and perhaps its own in place since
            if _is_no_folder(folder):
                raise
        except DamagedError:
            _remove(folder)
        else:
            return False


def _is_no_folder(path: Path) -> bool:
    """Whether something else than a folder has this name."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    return not stat.S_ISDIR(mode) and not path.is_dir()


def _remove(folder: Path) -> None:
    """Remove a damaged index. The rename keeps another rank from finding half of it."""
    aside = _beside(folder)
    try:
        os.rename(folder, aside)
    except FileNotFoundError:  # another rank was faster
        return
    shutil.rmtree(aside, ignore_errors=True)


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
