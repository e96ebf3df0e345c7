"""`parallel.compile`: torch.compile fuses what stands between the matrix products."""

from __future__ import annotations

import os
import shutil

import torch

from longcat.errors import ConfigError
from parallel.config import ParallelConfig


def check_compile(config: ParallelConfig) -> None:
    """Raise ConfigError where compiling cannot work, with the reason."""
    if config.compile and not torch.cuda.is_available() and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ConfigError("parallel.compile=true needs a C++ compiler on a CPU; install g++ or set it to false")
