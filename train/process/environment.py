"""What a run was started with, for its record: command line, Python, CUDA, driver, uncommitted changes."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from train.process.git import git_dirty

COMMAND = "LONGCAT_COMMAND"  # environment variable: what a person typed, for the ranks that it starts
DRIVER = Path("/proc/driver/nvidia/version")


def software() -> dict[str, Any]:
    """Part of the section `environment` of config.yaml; null is what does not exist here or cannot be found out."""
    import torch

    return {
        "git_dirty": git_dirty(),
        "command": os.environ.get(COMMAND) or shlex.join(sys.orig_argv),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "driver": driver_version(),
    }


def driver_version(path: Path = DRIVER) -> str | None:
    """The version of the NVIDIA driver's kernel module, such as `570.86.15`; None without one."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", path.read_text(errors="replace"))
    except OSError:
        return None
    return found[1] if found else None
