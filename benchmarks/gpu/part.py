"""What a part of `python -m benchmarks.gpu` returns: rows, each the result of a check that may fail alone."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def settings_kept() -> Iterator[None]:
    """Leave what holds for the whole process as it was: a check that fails must not change what the next one shows."""
    environment, dtype, threads = dict(os.environ), torch.get_default_dtype(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    precisions = matmul.fp32_precision, convolution.fp32_precision
    gradients = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(gradients)
        matmul.fp32_precision, convolution.fp32_precision = precisions
        os.environ.clear()
        os.environ.update(environment)


def attempt(what: str, check: Any, *arguments: Any) -> list[Row]:
    """The rows of ``check(*arguments)``; an exception becomes a row, so that the part's other checks still run."""
    try:
        with settings_kept():
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
