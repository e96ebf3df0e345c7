"""Which store the nodes of a run meet at: numbered files in the run folder, of which the highest holds."""

from __future__ import annotations

import json
import os
import re
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from longcat.json_text import dumps

NAME = re.compile(r"launch\.store-(\d+)\.json")


@dataclass(frozen=True)
class Claim:
    """A node is the first one: it decides, and its store is at this address."""

    number: int
    node: str
    host: str
    port: int
    code: int | None = None  # the run has ended with this exit code; no store follows


class Claims:
    """The claims in a run folder. Taking one is atomic on a file system that all nodes share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def newest(self) -> Claim | None:
        """The claim that holds; None without one, or where it cannot be read yet."""
        try:
            return Claim(**json.loads(self._path(self.highest()).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def highest(self) -> int:
        """The number of the claim that holds, 0 without one."""
        try:
            return max(self._numbers(), default=0)
        except FileNotFoundError:
            return 0

    def take(self, claim: Claim) -> bool:
        """Make this the claim that holds; False if another node has taken its number, or a higher one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.highest() >= claim.number:
            return False
        mine = self.folder / f".claim-{uuid.uuid4().hex}"
        try:
            mine.write_text(dumps(asdict(claim)))
            os.link(mine, self._path(claim.number))
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            try:
                with self._path(claim.number).open("x") as file:
                    file.write(dumps(asdict(claim)))
            except FileExistsError:
                return False
        finally:
            mine.unlink(missing_ok=True)
        for number in self._numbers():
            if number < claim.number - 1:
                with suppress(OSError):
                    self._path(number).unlink(missing_ok=True)
        return True

    def _numbers(self) -> list[int]:
        return [int(found[1]) for name in os.listdir(self.folder) if (found := NAME.fullmatch(name))]

    def _path(self, number: int) -> Path:
        return self.folder / f"launch.store-{number}.json"
