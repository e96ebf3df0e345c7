"""`torch.compile` for the dense parts: norms and dense FFNs, whose elementwise work is fused."""

from __future__ import annotations

import os
import shutil

import torch

from longcat.errors import ConfigError
from longcat.layers import FeedForward, RMSNorm
from longcat.model import LongCat
from parallel.mesh import ParallelConfig, Sizes
from parallel.stages import SPLIT_BACKWARD


def check_compile(config: ParallelConfig, sizes: Sizes) -> None:
    """Raise ConfigError where compiling cannot work, with the reason."""
    if not config.compile:
        return
    if sizes.tp > 1:
        raise ConfigError(
            "parallel.compile=true does not go with parallel.tp above 1: ranks exchange positions inside each dense "
            "FFN, and a traced graph cannot hold that; leave one of them"
        )
    if sizes.pp > 1 and config.schedule in SPLIT_BACKWARD:
        raise ConfigError(
            f"parallel.compile=true does not go with parallel.schedule={config.schedule}: it puts weight gradients off "
            f"into a queue, which a traced graph cannot fill; use parallel.schedule=1f1b or interleaved"
        )
    if not torch.cuda.is_available() and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ConfigError("parallel.compile=true needs a C++ compiler on a CPU; install g++ or set it to false")


def compile_dense(model: LongCat) -> None:
    """Compile the norms and dense FFNs of a model, in place. The first steps take tens of seconds longer."""
    for module in model.modules():
        if isinstance(module, RMSNorm | FeedForward):
            module.compile(fullgraph=True)
