"""What to type where the remedy is another value of a key that may not change on a resume: a new run has it."""

from __future__ import annotations

import shlex
from pathlib import Path

from train.compose import PLAIN, quoted


def new_run(change: str, *keys: str, checkpoint: Path | str | None = "PATH") -> str:
    """The end of a message: `start a new run with a lower optim.lr: run.name=NEW checkpoint.resume=… optim.lr=…`.

    Args:
        change: what the new run does otherwise, such as `a lower optim.lr`.
        keys: the keys to give; a run that starts from another's checkpoint may change them.
        checkpoint: where it starts; None = from nothing.
    """
    return f"start a new run with {change}: {' '.join(words(*keys, checkpoint=checkpoint))}"


def words(*keys: str, checkpoint: Path | str | None) -> list[str]:
    """The overrides of such a run; a person fills in name and values."""
    source = [] if checkpoint is None else [typed("checkpoint.resume", str(checkpoint))]
    return ["run.name=NEW", *source, *(f"{key}=…" for key in keys)]


def typed(key: str, text: str) -> str:
    """An override as it is typed in a shell, whatever characters of the shell or of Hydra the value has."""
    return shlex.quote(f"{key}={text if PLAIN.fullmatch(text) else quoted(text)}")
