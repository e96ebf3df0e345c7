"""One part of `python -m benchmarks.gpu`, run in a process of its own: what it returns, and how it is started.

python -m benchmarks.gpu.part attention cuda     prints the part's rows as one line of JSON
"""

from __future__ import annotations

import json
import traceback
from dataclasses import dataclass
from typing import Any

import torch

NO_GPU = "no GPU"
RESULT = "part result: "  # begins the line with a part's rows


@dataclass(frozen=True)
class Row:
    """One figure or check of a part."""

    what: str
    measured: str
    wanted: str = ""  # what it is held to, if anything
    met: bool | None = None  # None: a figure that is held to nothing


class NoGpuError(Exception):
    """This part can only run on a GPU."""


def need_gpu(device: torch.device) -> None:
    """Raise NoGpuError on a CPU."""
    if device.type != "cuda":
        raise NoGpuError(NO_GPU)


def attempt(what: str, check: Any, *arguments: Any) -> list[Row]:
    """The rows of ``check(*arguments)``; an exception becomes a row, so that the part's other checks still run."""
    try:
        return list(check(*arguments))
    except NoGpuError:
        raise
    except Exception as error:
        traceback.print_exc()
        first, *_ = str(error).strip().splitlines() or [""]
        return [Row(what, f"{type(error).__name__}: {first}", "", False)]


def report(rows: list[Row] | str) -> None:
    """Print what the runner reads: rows, or the reason for having none."""
    print(RESULT + json.dumps(rows if isinstance(rows, str) else [vars(row) for row in rows]), flush=True)
