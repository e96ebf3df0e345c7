"""The git commit of the running code, and whether files differ from it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
UNKNOWN = "unknown"
SECONDS = 10.0


def git(root: Path, *words: str) -> str | None:
    """Output of a git command in a folder; None where git is missing or refuses.

    Variables such as GIT_DIR, which a git hook sets, would name another repository.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def git_commit(root: Path = ROOT) -> str:
    """The commit of the running code; `unknown` where git cannot say it.

    A package that is installed inside another project's checkout is not part of that project's commit.
    """
    top, _, commit = (git(root, "rev-parse", "--show-toplevel", "HEAD") or "").partition("\n")
    return commit if commit and Path(top).resolve() == root.resolve() else UNKNOWN


def git_dirty(root: Path = ROOT) -> bool | None:
    """Whether tracked files of the checkout differ from its commit; None where git cannot say."""
    if git_commit(root) == UNKNOWN:
        return None
    changes = git(root, "status", "--porcelain", "--untracked-files=no")
    return None if changes is None else bool(changes)
