"""Files and folders written durably: synced, hashed while they are written, renamed when they are complete."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import xxhash

from longcat.errors import ConfigError
from train.checkpoint.failures import describe

PARTIAL = ".partial"  # ends the name of a folder that is still being written
HASH, new_hash = "xxh3_128", xxhash.xxh3_128  # detects accidents at memory speed; no protection against forgery
BLOCK, READ_AHEAD = 1 << 20, 1 << 24  # bytes hashed at a time; bytes that the disk is asked for in advance
SYNC_EVERY = 1 << 26  # bytes after which a second thread syncs them to the disk


def regular(path: str, flags: int) -> int:
    """An opener (see `open`) of files that somebody else may have put there: it never waits.

    Raises:
        OSError: as `open` does, and for a pipe or a device, which could wait for ever.
    """
    special = OSError(errno.EINVAL, "it is no regular file", str(path))
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise special if error.errno == errno.ENXIO else error from None  # a socket, or nobody reads the pipe
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path)) if stat.S_ISDIR(mode) else special


def read_text(path: Path, errors: str = "strict") -> str:
    """The text of a regular file in UTF-8; errors as those of `regular`."""
    with open(path, encoding="utf-8", errors=errors, opener=regular) as file:
        return file.read()


def read_bytes(path: Path) -> bytes:
    """The contents of a regular file; errors as those of `regular`."""
    with open(path, "rb", opener=regular) as file:
        return file.read()


def file_hash(path: Path) -> str:
    """`HASH` of a file. The disk reads ahead while a block is hashed."""
    digest, block, position = new_hash(), memoryview(bytearray(BLOCK)), 0
    with open(path, "rb", buffering=0, opener=regular) as file:
        while count := file.readinto(block):
            position += count
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), position + READ_AHEAD, BLOCK, os.POSIX_FADV_WILLNEED)
            digest.update(block[:count])
    return digest.hexdigest()


class HashedFile(io.IOBase):
    """A file that is hashed while it is written, and synced by a second thread. A context manager.

    On leaving it the data are on disk and `hash` is final. Where writing failed, leaving raises that first OSError:
    torch's writer replaces it by a misleading one.
    """

    def __init__(self, path: Path, mode: str = "xb") -> None:
        self.file: IO[bytes] = path.open(mode)
        self.digest = new_hash()
        self.pool = ThreadPoolExecutor(1)
        self.unsynced = 0
        self.syncing: Future[Any] | None = None
        self.failure: OSError | None = None

    @property
    def hash(self) -> str:
        return str(self.digest.hexdigest())

    def write(self, data: Any) -> int:
        self.digest.update(data)
        try:
            count = int(self.file.write(data))
        except OSError as error:
            self.failure = self.failure or error
            raise
        self.unsynced += count
        if self.unsynced >= SYNC_EVERY and (self.syncing is None or self.syncing.done()):
            self._wait_for_sync()
            self.unsynced, self.syncing = 0, self.pool.submit(os.fdatasync, self.file.fileno())
        return count

    def _wait_for_sync(self) -> None:
        if self.syncing is not None:
            self.syncing.result()  # raises the disk's error, once

    def tell(self) -> int:
        return int(self.file.tell())

    def flush(self) -> None:
        if not self.file.closed:
            self.file.flush()

    def fileno(self) -> int:
        return int(self.file.fileno())

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self._wait_for_sync()
                self.flush()
                os.fsync(self.fileno())
        finally:
            self.pool.shutdown()
            self.file.close()
        if isinstance(error, Exception) and self.failure is not None:
            raise self.failure from None


def write_synced(path: Path, text: str) -> None:
    """Write a text file and sync it."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, text: str) -> None:
    """Write a text file as a whole or not at all, and sync it.

    Raises:
        ConfigError: it cannot be written; nothing has changed.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_synced(partial, text)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}); free space, give write permission, or choose another folder"
        ) from error


def sync_folder(path: Path) -> None:
    """Make a rename in ``path`` last through a power cut."""
    sync_file(path)


def sync_file(path: Path) -> None:
    """Make the contents of a file that another library wrote, or of a folder, last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_absent(target: Path) -> None:
    """Raise ConfigError if ``target`` exists."""
    if os.path.lexists(target):
        raise ConfigError(f"target={target} exists and is not overwritten; choose another or remove it")


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new, locked folder to write in, which is renamed to ``target`` when the block ends, and removed if it fails.

    Raises:
        ConfigError: the target exists, is being written or cannot be written; or the block could not read or write a
            file.
    """
    from safetensors import SafetensorError

    check_absent(target)
    partial = target.with_name(f"{target.name}{PARTIAL}")
    try:
        partial.mkdir(parents=True)
    except FileExistsError as error:
        raise ConfigError(f"{partial} exists: another process writes it; if none does, remove it") from error
    except OSError as error:
        raise ConfigError(f"target={target} cannot be written ({error.strerror}); choose another") from error
    try:
        with lock_folder(partial):
            yield partial
            os.rename(partial, target)
        sync_folder(target.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise ConfigError(
                f"target={target} could not be written: {describe(error)}; nothing is left of it; is the disk full, or "
                f"was the source removed meanwhile?"
            ) from error
        raise


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Let other processes see that this one writes in ``folder``."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: the folder then looks like a dead process's
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def is_locked(folder: Path) -> bool:
    """Whether a living process writes in ``folder`` under `lock_folder`."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
