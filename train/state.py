"""The full state of a run: weights, moments, biases, controller and counters, by stored name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from longcat.documents import to_device
from longcat.model import LongCat
from longcat.moe import Router
from parallel.engine import Engine
from parallel.state_store import Store
from train.balance import BiasController
from train.health.state import HealthState


@dataclass
class Counters:
    """Progress of the training, counted from its first step."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    data_start: int = 0  # value of ``samples`` when the present data began; above 0 after data.from_start

    @property
    def position(self) -> int:
        """Samples that all ranks have read of the present data; the next sample's number unless some are left out."""
        return self.samples - self.data_start


@dataclass
class TrainState:
    """What a checkpoint stores and a resumed run continues from."""

    engine: Engine
    store: Store
    controller: BiasController
    counters: Counters
    # [L, N + Z] of all layers, on the host, the same on every rank; `set_biases` copies them to this rank's routers
    biases: Tensor
    health: HealthState = field(default_factory=HealthState)
    # checksum of each tensor since the last update (`train/sdc/at_rest.py`); None after a load, or without checks
    checksums: dict[tuple[str, tuple[int, ...]], int] | None = None

    @property
    def models(self) -> list[LongCat]:
        """The parts of the model on this rank."""
        return self.engine.parts

    def routers(self) -> Iterator[tuple[int, Router]]:
        """(layer number, router) of each router on this rank."""
        for model in self.models:
            yield from enumerate(model.routers(), start=model.part.first)

    def set_biases(self, biases: Tensor) -> None:
        """Set the selection biases [L, N+Z] on every rank: sharding does not manage buffers."""
        self.biases.copy_(biases)
        copied: Tensor | None = None  # all at once to the device
        for number, router in self.routers():
            bias = router.e_score_correction_bias
            copied = to_device(self.biases, bias.device) if copied is None else copied
            bias.copy_(copied[number])

    def replicated(self) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) of the state that every rank has in full: biases and the controller's state."""
        for number, bias in enumerate(self.biases):
            yield f"bias/layers.{number}.mlp.router.e_score_correction_bias", bias
        for name, tensor in self.controller.state().items():
            yield f"controller/{name}", tensor
