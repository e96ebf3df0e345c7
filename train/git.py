"""The git commit of the running code."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UNKNOWN = "unknown"
SECONDS = 10.0


def git(*words: str) -> str:
    """Output of a git command in the folder of the running code; empty where git is missing or refuses.

    Variables such as GIT_DIR, which a git hook sets, would name another repository.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def git_commit() -> str:
    """The commit of the running code; `unknown` where git cannot say it.

    A package that is installed inside another project's checkout is not part of that project's commit.
    """
    top, _, commit = git("rev-parse", "--show-toplevel", "HEAD").partition("\n")
    return commit if commit and Path(top).resolve() == ROOT else UNKNOWN
