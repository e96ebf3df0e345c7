"""exit.json in the run folder: how the run ended, written by the first process that knows."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longcat.errors import CRASHED, ConfigError, LongCatError
from longcat.json_text import dumps
from train.checkpoint.files import read_text
from train.launch_config import GAVE_UP
from train.run_dir.files import remove_quietly

EXIT = "exit.json"
NO_DETAILS = LongCatError.details


def forget_exit(folder: Path) -> None:
    """Remove the exit.json of an earlier start, and the page of one that gave up.

    Raises:
        ConfigError: it cannot be removed; readers would take it for this start's.
    """
    try:
        (folder / EXIT).unlink(missing_ok=True)
        (folder / GAVE_UP).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder / EXIT} cannot be removed ({error.strerror}); remove it, or choose another run.name"
        ) from error


def claim_exit(folder: Path, code: int, message: str, details: Mapping[str, Any] = NO_DETAILS) -> bool:
    """Write exit.json unless another rank has; True if this rank wrote it and must print the message.

    ``details`` are further keys, for machines.
    """
    mine = folder / f".{EXIT}-{uuid.uuid4().hex}"
    try:
        write_exit(mine, code, message, details)
        os.link(mine, folder / EXIT)  # atomic
    except FileExistsError:
        return False
    except OSError:
        return create_exit(folder / EXIT, code, message, details)
    finally:
        remove_quietly(mine)
    return True


def create_exit(path: Path, code: int, message: str, details: Mapping[str, Any] = NO_DETAILS) -> bool:
    """As `claim_exit`, on a file system without links; True too where the file cannot be written: each rank prints."""
    try:
        with path.open("x") as file:
            file.write(dumps({"code": code, "message": message, **details}))
    except FileExistsError:
        return False
    except OSError:
        remove_quietly(path)
    return True


def write_exit(path: Path, code: int, message: str, details: Mapping[str, Any] = NO_DETAILS) -> None:
    path.write_text(dumps({"code": code, "message": message, **details}))


def recorded_code(folder: Path, otherwise: int = CRASHED) -> int:
    """The code in exit.json; ``otherwise`` if it cannot be read."""
    try:
        return int(json.loads(read_text(folder / EXIT))["code"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return otherwise


def exit_written(folder: Path) -> tuple[int, int] | None:
    """Identity of the exit.json in the folder, or None."""
    try:
        status = (folder / EXIT).stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns
