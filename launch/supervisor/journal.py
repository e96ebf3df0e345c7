"""What the supervisor reads and writes in the run folder: launch.jsonl, saves.jsonl, exit.json, checkpoints."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.supervisor.causes import STRIKES, Cause
from launch.supervisor.node_choice import Strike
from train.checkpoint.failures import is_disk_full
from train.checkpoint.files import read_text
from train.checkpoint.manifest import list_checkpoints, step_of, verify
from train.checkpoint.save_times import SAVES
from train.launch_config import JOURNAL
from train.run_dir.exit_file import EXIT
from train.run_dir.files import LineFile, Note, remove_quietly
from train.run_dir.sealed import DamagedError, seal_line, unseal_lines

PROBE_BYTES = 1 << 16


def read_lines(path: Path, note: Note) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines that can be read; ``note`` is told of lines that have changed since."""
    try:
        lines = list(unseal_lines(path))
    except OSError:
        return []
    if changed := sum(isinstance(line, DamagedError) for line in lines):
        note(f"{path}: {changed} lines have changed since they were written and are left out")
    return [line for line in lines if not isinstance(line, ValueError)]


class Journal:
    """The files of one run folder.

    Args:
        folder: the run's.
        note: is told when launch.jsonl cannot be written, and when it can again.
        check: called before each write; raises ConnectionError where another node decides now.
    """

    def __init__(self, folder: Path, note: Note, check: Callable[[], None] = lambda: None) -> None:
        self.folder, self.note, self.check = folder, note, check
        self.file: LineFile | None = None

    def record(self, line: dict[str, Any]) -> None:
        """Append to launch.jsonl. On a full disk lines wait in memory for space."""
        self.check()
        if self.file is None:
            with suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
            self.file = LineFile(self.folder / JOURNAL, self.note)
        self.file.write(seal_line(line))

    def flush(self) -> None:
        """Try lines again that wait for space."""
        if self.file is not None and self.file.pending:
            self.check()
            self.file.flush()

    def close(self) -> None:
        """Say how many lines found no space."""
        if self.file is not None:
            self.file.close()
            self.file = None

    def is_disk_full(self) -> bool:
        """Whether the run folder has no space for the few bytes of an exit.json."""
        path = self.folder / f".space-{os.getpid()}"
        try:
            path.write_bytes(bytes(PROBE_BYTES))
        except OSError as error:
            return is_disk_full(error)
        finally:
            remove_quietly(path)
        return False

    def strikes(self, max_strikes: int, command: str) -> tuple[Strike, ...]:
        """Strikes of other commands than ``command``. A node that computed wrongly has as many as exclude it."""
        found: list[Strike] = []
        for line in read_lines(self.folder / JOURNAL, self.note):
            names, when, cause = line.get("nodes"), line.get("time"), line.get("cause")
            if line.get("event") != "end" or cause not in STRIKES or not isinstance(names, list):
                continue
            if not isinstance(when, int | float) or not math.isfinite(when) or line.get("command") == command:
                continue
            each = max_strikes if cause == Cause.corruption else 1
            fruitless = line.get("first_step_seconds") is None
            found += [Strike(str(name), float(when), False, fruitless) for name in names for _ in range(each)]
        return tuple(found)

    def exit(self) -> dict[str, Any] | None:
        """exit.json."""
        with suppress(OSError, ValueError):
            found = json.loads(read_text(self.folder / EXIT))
            return found if isinstance(found, dict) else None
        return None

    def saves(self) -> Sequence[dict[str, Any]]:
        """Lines of saves.jsonl."""
        return read_lines(self.folder / SAVES, self.note)

    def newest_checkpoint(self) -> int:
        """Step of the newest checkpoint, 0 without one."""
        found = list_checkpoints(self.folder / "checkpoints")
        return step_of(found[-1]) if found else 0

    def checkpoint_steps(self) -> list[int]:
        """Steps of the checkpoints, valid or not."""
        return [step_of(path) for path in list_checkpoints(self.folder / "checkpoints")]

    def checkpoint_before(self, step: int) -> Path | None:
        """The newest valid checkpoint of a step below ``step``."""
        earlier = [path for path in list_checkpoints(self.folder / "checkpoints") if step_of(path) < step]
        return next((path for path in reversed(earlier) if verify(path).problem is None), None)
