"""A bundle: one operator call with its operands and both results in a file, to be repeated elsewhere.

The file is read with torch's weights-only unpickler, so a bundle of another person runs no code.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import longcat.ops.attention
import longcat.ops.cross_entropy
import longcat.ops.elementwise
import longcat.ops.embedding
import longcat.ops.fp32_linear
import longcat.ops.grouped
import longcat.ops.matmul
import longcat.ops.permute
import longcat.ops.rotation
import longcat.ops.selections  # noqa: F401 (each names its operators)
from longcat.errors import ConfigError
from longcat.ops.calls import FUNCTIONS
from parallel.sdc.recompute import Difference, compared, repetition
from parallel.sdc.values import decoded

FORMAT = "longcat-sdc-bundle-1"


def write_bundle(path: Path, difference: Difference, about: dict[str, Any]) -> None:
    """Write a call that differs; ``about`` says where and when, in plain values."""
    call = difference.call
    content = {
        "format": FORMAT,
        "about": {**about, "operator": difference.operator, "module": difference.module},
        "function": call.function,
        "has_context": call.context is not None,
        "args": call.args,
        "context": call.context,
        "first": call.first,
        "permuted": call.permuted,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


@dataclass(frozen=True)
class Replay:
    """What repeating a bundle's call on this machine shows. Each is elements that differ, and by how much at most."""

    about: dict[str, Any]
    here: tuple[int, float] | None  # this machine's plain result against its own permuted one
    first: tuple[int, float] | None  # the recorded result against this machine's
    permuted: tuple[int, float] | None  # the recorded permuted result against this machine's

    @property
    def shows(self) -> bool:
        """Whether anything differs."""
        return any(one is not None for one in (self.here, self.first, self.permuted))


def replay(path: Path) -> Replay:
    """Repeat a bundle's call, plainly and permuted.

    Raises:
        ConfigError: the file is no bundle, or of a version with other operators.
    """
    try:
        content = torch.load(path, weights_only=True)
        if content["format"] != FORMAT:
            raise KeyError("format")
        about, name = content["about"], content["function"]
        args, context = decoded(content["args"]), decoded(content["context"])
        first, permuted = decoded(content["first"]), decoded(content["permuted"])
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); name a file of a run's folder sdc") from error
    except Exception as error:
        raise ConfigError(f"{path} is no bundle, or damaged: {type(error).__name__}; copy it again") from error
    if name not in FUNCTIONS:
        raise ConfigError(f"{path} has a call of {name!r}, which this version does not know; use the run's version")
    repeat = repetition(FUNCTIONS[name], args, context if content["has_context"] else None)
    plain, rolled = repeat(permuted=False), repeat(permuted=True)
    return Replay(about, compared(plain, rolled), compared(first, plain), compared(permuted, rolled))


def describe(found: Replay) -> list[str]:
    """The lines that `longcat replay` prints."""
    about = found.about
    where = f" in {about['module']}" if about.get("module") else ""
    run = ", ".join(f"{key} {about[key]}" for key in ("step", "rank", "host", "device") if key in about)
    rows = (
        ("here", "plain and permuted results of this machine", found.here),
        ("recorded", "the run's result and this machine's", found.first),
        ("repeated", "the run's permuted result and this machine's", found.permuted),
    )
    lines = [f"call         {about['operator']}{where} ({run})"]
    for name, what, one in rows:
        verdict = "the same bits" if one is None else f"{one[0]} elements differ, by up to {one[1]:.3g}"
        lines.append(f"{name:12} {what}: {verdict}")
    if found.here is not None:
        lines.append("verdict      this machine shows it too: it is defective, or its kernels depend on positions")
    elif found.first is not None:
        lines.append("verdict      the run computed something else than this machine does")
    elif found.permuted is not None:
        lines.append("verdict      the run's result is right; its repetition was wrong")
    else:
        lines.append("verdict      nothing differs here")
    return lines
