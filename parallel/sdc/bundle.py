"""A bundle: one operator call with its operands and both results in a file, to be repeated elsewhere.

The file is read with torch's weights-only unpickler, so a bundle of another person runs no code.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import longcat.ops.attention
import longcat.ops.cross_entropy
import longcat.ops.elementwise
import longcat.ops.embedding
import longcat.ops.grouped
import longcat.ops.matmul  # noqa: F401 (each names its operators)
from longcat.errors import ConfigError
from longcat.ops.calls import FUNCTIONS
from longcat.ops.permute import Permutation
from parallel.sdc.recompute import Difference, compared, ignore, repetition

FORMAT = "longcat-sdc-bundle-1"
PERMUTATION, FUNCTION = "__permutation__", "__function__"


def write_bundle(path: Path, difference: Difference, about: dict[str, Any]) -> None:
    """Write a call that differs; ``about`` says where and when, in plain values."""
    call = difference.call
    content = {
        "format": FORMAT,
        "about": {**about, "operator": difference.operator, "module": difference.module},
        "function": call.function,
        "has_context": call.context is not None,
        "args": _encoded(call.args),
        "context": _encoded(call.context),
        "first": _encoded(call.first),
        "permuted": _encoded(call.permuted),
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
        args, context = _decoded(content["args"]), _decoded(content["context"])
        first, permuted = _decoded(content["first"]), _decoded(content["permuted"])
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


def _encoded(value: Any) -> Any:
    """Plain values and tensors on the CPU for whatever a call holds."""
    if isinstance(value, Permutation):
        return {PERMUTATION: [_encoded(part) for part in astuple(value)]}
    if isinstance(value, Tensor):
        if 0 in value.stride():  # an expanded tensor
            return value.detach().cpu().clone()
        copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)  # kernels differ by strides
        return copy.copy_(value.detach())
    if isinstance(value, dict):
        return {key: _encoded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_encoded(part) for part in value)
    if callable(value):
        return FUNCTION  # a store of weight gradients
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {PERMUTATION}:
            return Permutation(*value[PERMUTATION])
        return {key: _decoded(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_decoded(part) for part in value)
    return ignore if value == FUNCTION and isinstance(value, str) else value
