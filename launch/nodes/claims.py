"""Leader election by numbered files in the run folder: the highest claim names the first node and its store."""

from __future__ import annotations

import json
import os
import re
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from launch.nodes.store import Identity
from longcat.errors import LongCatError
from longcat.json_text import dumps

NAME = re.compile(r"launch\.store-(\d+)\.json")


class ClaimError(LongCatError):
    """The claims cannot be read or written now, so this node cannot know whether another one is the first."""


@dataclass(frozen=True)
class Claim:
    """A node is the first one: it decides, and its store is at this address."""

    number: int
    node: str
    host: str
    port: int
    identity: Identity  # of the run
    code: int | None = None  # the run has ended with this exit code; no store follows
    machine: str = field(default_factory=socket.gethostname)  # of the node runner's process
    pid: int = field(default_factory=os.getpid)


class Claims:
    """The claims in a run folder. Taking one is atomic on a file system that all nodes share.

    The file of a claim is also its lease: the first node sets its time of modification now and then, and another node
    takes the next number only when that has grown old.

    Raises:
        ClaimError: by all methods, where the file system fails.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def newest(self) -> Claim | None:
        """The claim that holds; None without one, or where its file is not whole."""
        with self._explained():
            text = self._read(self.highest())
        try:
            return None if text is None else Claim(**json.loads(text))
        except (ValueError, TypeError):
            return None

    def highest(self) -> int:
        """The number of the claim that holds, 0 without one."""
        with self._explained():
            return max(self._numbers(), default=0)

    def take(self, claim: Claim) -> bool:
        """Make this the claim that holds; False if another node has taken its number, or a higher one."""
        text = dumps(asdict(claim))
        with self._explained():
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.highest() >= claim.number or not self._create(self._path(claim.number), text):
                return False
            with suppress(OSError):
                for number in self._numbers():
                    if number < claim.number - 1:
                        self._path(number).unlink(missing_ok=True)
        return True

    def renew(self, number: int) -> None:
        """On the first node: renew the lease. If that fails, it expires."""
        with suppress(OSError):
            os.utime(self._path(number))

    def release(self, number: int) -> None:
        """On the first node, which gives up: others need not wait until its lease is old."""
        with suppress(OSError):
            os.utime(self._path(number), (0, 0))

    def renewed_at(self, number: int) -> float:
        """When a claim's lease was renewed, by the file system's clock; 0 without such a claim."""
        with self._explained():
            try:
                with self._path(number).open() as file:  # opening makes NFS ask the server
                    return os.fstat(file.fileno()).st_mtime
            except FileNotFoundError:
                return 0.0

    def seconds_since_renewal(self, number: int) -> float:
        """Age of a claim's lease by the file system's clock; infinite without such a claim."""
        renewed, probe = self.renewed_at(number), self.folder / f".clock-{uuid.uuid4().hex}"
        if not renewed:
            return float("inf")
        with self._explained():
            try:
                probe.touch()
                return probe.stat().st_mtime - renewed
            finally:
                with suppress(OSError):
                    probe.unlink(missing_ok=True)

    def _read(self, number: int) -> str | None:
        try:
            return self._path(number).read_text()
        except FileNotFoundError:
            return None

    def _create(self, path: Path, text: str) -> bool:
        """Whether this call made the file; it is whole, or not there."""
        mine = self.folder / f".claim-{uuid.uuid4().hex}"
        try:
            mine.write_text(text)
            try:
                os.link(mine, path)
                return True
            except FileExistsError:
                return False
            except OSError:  # a file system without links
                return self._create_exclusively(path, text)
        finally:
            with suppress(OSError):
                mine.unlink(missing_ok=True)

    @staticmethod
    def _create_exclusively(path: Path, text: str) -> bool:
        try:
            file = path.open("x")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(text)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return True

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ClaimError(
                f"{self.folder}: the claims of the first node (launch.store-*.json) cannot be read or written "
                f"({error.strerror or error}); make room or mend the file system, then start again"
            ) from error

    def _numbers(self) -> list[int]:
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        return [int(found[1]) for name in names if (found := NAME.fullmatch(name))]

    def _path(self, number: int) -> Path:
        return self.folder / f"launch.store-{number}.json"
