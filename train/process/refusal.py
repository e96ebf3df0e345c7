"""A file that tells a scheduler's batch script why the program that it started refused its configuration."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from longcat.errors import BAD_INPUT, FolderInUseError, LongCatError

REFUSAL = "LONGCAT_REFUSAL"  # environment variable: path of the file


def leave_refusal(error: LongCatError) -> None:
    """Write the message where $LONGCAT_REFUSAL says, if another start would be refused too.

    exit.json cannot tell it: the run folder may be another run's. An agent's exit code cannot either: torchrun ends in
    1 whatever its ranks end in.
    """
    path = os.environ.get(REFUSAL)
    if path and error.exit_code == BAD_INPUT and not isinstance(error, FolderInUseError):
        with contextlib.suppress(OSError):  # then the script starts again and finds the same
            Path(path).write_text(f"{error}\n", encoding="utf-8", errors="backslashreplace")
