"""The whole state of a run: weights, moments, biases, controller and counters, by stored name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longcat.model import LongCat
from longcat.moe import Router
from parallel.engine import Engine
from parallel.stages import is_replica
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

    engine: Engine
    optimizer: torch.optim.AdamW
    controller: BiasController
    counters: Counters
    biases: Tensor  # [L, N + Z] of all layers, the same on every rank; `set_biases` gives them to the routers here

    def __post_init__(self) -> None:
        # The sharded parameters: while a module is gathered, FSDP2 shows whole ones under the same names
        self.parameters = [pair for model in self.models for pair in model.named_parameters()]
        # without the second embedding, which MTP has beside a pipeline's head
        self.unique = [
            (name, parameter)
            for model in self.models
            for name, parameter in model.named_parameters()
            if not is_replica(model.part, name)
        ]

    @property
    def models(self) -> list[LongCat]:
        """The parts of the model that are on this rank."""
        return self.engine.parts

    def routers(self) -> Iterator[tuple[int, Router]]:
        """The routers on this rank with the numbers of their layers."""
        for model in self.models:
            yield from enumerate(model.routers(), start=model.part.first)

    def set_biases(self, biases: Tensor) -> None:
        """Write the selection biases [L, N+Z]; the same on every rank, since sharding does not manage buffers."""
        self.biases.copy_(biases)
        for number, router in self.routers():
            router.e_score_correction_bias.copy_(self.biases[number])

    def sharded(self) -> Iterator[tuple[str, Tensor]]:
        """Weights and moments, one entry a stored tensor; the keys of the moments carry their kind."""
        for name, parameter in self.unique:
            moments = self.optimizer.state[parameter]
            yield f"weight/{name}", parameter
            yield f"exp_avg/{name}", moments["exp_avg"]
            yield f"exp_avg_sq/{name}", moments["exp_avg_sq"]

    def steps(self) -> Iterator[tuple[str, Tensor]]:
        """The optimizer's step counts of the tensors on this rank."""
        for name, parameter in self.unique:
            yield f"optimizer_step/{name}", self.optimizer.state[parameter]["step"]

    def replicated(self) -> Iterator[tuple[str, Tensor]]:
        """What every rank holds whole: biases and the controller's state."""
        for number, bias in enumerate(self.biases):
            yield f"bias/layers.{number}.mlp.router.e_score_correction_bias", bias
        for name, tensor in self.controller.state().items():
            yield f"controller/{name}", tensor

    def tensors(self) -> dict[str, Tensor]:
        """All of it, as a checkpoint stores it; loading writes into these tensors in place."""
        return dict([*self.sharded(), *self.steps(), *self.replicated()])
