"""One rank's whole training step on fake CUDA tensors, in a process that has loaded the stand-in for CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor

from launch.plan.trace import fake_topology, stages_without_values, state_without_values
from longcat.ops.torch_internals import fake_tensor_mode
from parallel.device import make_deterministic
from parallel.mesh import resolve_sizes
from parallel.plan.shapes import RoutingAssumption, shapes_of_routing
from parallel.torch_internals import set_deterministic_algorithms, shard_without_compiler
from tests.rehearsal.device import calls_of_cuda
from tests.rehearsal.recorder import Found, Recorder
from tests.support.running import RandomSamples
from train.batches import BatchReader
from train.compose import compose
from train.run import build_state
from train.step import Stepper


@dataclass
class Rehearsal:
    """What to rehearse."""

    overrides: list[str]
    world_size: int = 1
    ranks: list[int] = field(default_factory=lambda: [0])
    length: int = 16  # positions of a sequence


def rehearse(what: Rehearsal, rank: int) -> dict[str, Any]:
    """What a rank does in its first step, as fields of `Found`."""
    config = compose([*what.overrides, f"train.sequence_length={what.length}"])
    sizes = resolve_sizes(config.parallel, what.world_size)
    device = torch.device("cuda:0")
    mode, recorder = fake_tensor_mode(), Recorder()
    shard_without_compiler()
    set_deterministic_algorithms(False)
    if config.train.deterministic:
        make_deterministic()
    with ExitStack() as stack:
        for context in (
            calls_of_cuda(recorder.synchronized),
            patch.object(dist, "all_gather_object", recorder.all_gather_object),
            patch.object(dist, "ProcessGroupNCCL", SimpleNamespace(Options=lambda **_: None), create=True),
        ):
            stack.enter_context(context)
        topology = stack.enter_context(fake_topology(sizes, rank, what.world_size, device))
        stack.enter_context(state_without_values())
        stack.enter_context(shapes_of_routing(RoutingAssumption(config.model.expected_ffn_experts)))
        stack.enter_context(lists_of_the_device())
        if sizes.pp > 1:
            stack.enter_context(stages_without_values(None))
        with mode, recorder:
            state = build_state(config, topology)
            reader = BatchReader(RandomSamples(what.length), config, topology)  # type: ignore[arg-type]
            stepper = Stepper(state, reader, config, topology)
            recorder.found = Found()  # what building the state did is not asked
            result = stepper.step()
    assert result.healthy
    return vars(recorder.found)


@contextmanager
def lists_of_the_device() -> Iterator[None]:
    """Let `tolist` of a tensor on the device copy it to the host at once, where a fake tensor reads each element."""
    plain = FakeTensor.tolist

    def tolist(self: FakeTensor) -> Any:
        return self.cpu().tolist() if self.is_cuda else plain(self)

    with patch.object(FakeTensor, "tolist", tolist):
        yield
