"""The whole state of a run: weights, moments, biases, controller and counters, by stored name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longcat.model import LongCat
from train.balance import BiasController


@dataclass
class Counters:
    """Where the run stands. ``samples`` is the position in the data: one global counter."""

    step: int = 0
    samples: int = 0
    tokens: int = 0


@dataclass
class TrainState:
    """What a checkpoint holds and a resumed run continues from."""

    model: LongCat
    optimizer: torch.optim.AdamW
    controller: BiasController
    counters: Counters

    def __post_init__(self) -> None:
        # The sharded parameters: while a module is gathered, FSDP2 shows whole ones under the same names
        self.parameters = list(self.model.named_parameters())

    def sharded(self) -> Iterator[tuple[str, Tensor]]:
        """Weights and moments, one entry a stored tensor; the keys of the moments carry their kind."""
        for name, parameter in self.parameters:
            moments = self.optimizer.state[parameter]
            yield f"weight/{name}", parameter
            yield f"exp_avg/{name}", moments["exp_avg"]
            yield f"exp_avg_sq/{name}", moments["exp_avg_sq"]

    def replicated(self) -> Iterator[tuple[str, Tensor]]:
        """What every rank holds whole: biases, the controller's state and the optimizer's step counts."""
        for name, buffer in self.model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                yield f"bias/{name}", buffer
        for name, tensor in self.controller.state().items():
            yield f"controller/{name}", tensor
        for name, parameter in self.parameters:
            yield f"optimizer_step/{name}", self.optimizer.state[parameter]["step"]

    def tensors(self) -> dict[str, Tensor]:
        """All of it, as a checkpoint stores it; loading writes into these tensors in place."""
        return dict([*self.sharded(), *self.replicated()])


def set_biases(model: LongCat, biases: Tensor) -> None:
    """Write the selection biases [L, N+Z]; the same on every rank, since sharding does not manage buffers."""
    for router, bias in zip(model.routers(), biases, strict=True):
        router.e_score_correction_bias.copy_(bias)


def biases(model: LongCat) -> Tensor:
    """The selection biases of all layers [L, N+Z]."""
    return torch.stack([router.e_score_correction_bias for router in model.routers()])
