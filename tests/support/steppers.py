"""A stepper on random samples, made on a rank whose process group exists already."""

from __future__ import annotations

import torch
import torch.distributed as dist

from parallel.mesh import make_topology
from parallel.sizes import resolve_sizes
from tests.support.running import RandomSamples
from train.batches import BatchReader
from train.compose import compose
from train.run import build_state
from train.step import Stepper


def make_stepper(overrides: list[str]) -> Stepper:
    """The state and stepper of a configuration with sequences of 16 positions. A collective."""
    config = compose(overrides)
    sizes = resolve_sizes(config.parallel, dist.get_world_size())
    topology = make_topology(sizes, dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    state = build_state(config, topology)
    return Stepper(state, BatchReader(RandomSamples(16), config, topology), config, topology)  # type: ignore[arg-type]
