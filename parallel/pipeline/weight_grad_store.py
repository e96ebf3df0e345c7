"""The queue of weight gradients that a zero-bubble pipeline computes later than the input gradients.

Torch's own split of a backward reruns a recomputed layer for each group of weights. Here the layers' matrix products
put the weight's part of their backward into this queue. So a layer runs forward once, or twice if it is recomputed,
under every schedule.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longcat.interfaces import install
from longcat.moe import MoE
from parallel.collectives.streams import StreamContext
from parallel.expert.dispatchers import ExpertParallelDispatcher

Entry = tuple[nn.Module, str, Callable[[], Tensor]]


class WeightGradQueue:
    """A `longcat.interfaces.WeightGradStore`: collects the weight gradients that one backward defers."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, module: nn.Module, name: str, compute: Callable[[], Tensor]) -> None:
        """Add the computation of the gradient of ``module``'s parameter ``name``."""
        self._entries.append((module, name, compute))

    def take(self) -> Callable[[], None]:
        """One function that computes everything since the last call and adds it to the gradients; it acts once."""
        entries, self._entries = self._entries, []

        @torch.no_grad()
        def run() -> None:
            while entries:
                module, name, compute = entries.pop()  # last in, first out: still in the cache
                add_gradient(getattr(module, name), compute())

        return run


class _ExpertQueue:
    """The experts' queue: their deferred gradients too are computed on the experts' stream."""

    def __init__(self, queue: WeightGradQueue, streams: StreamContext) -> None:
        self.queue, self.streams = queue, streams

    def put(self, module: nn.Module, name: str, compute: Callable[[], Tensor]) -> None:
        self.queue.put(module, name, self.streams.bind_to_stream(compute))


def defer_weight_gradients(model: nn.Module, queue: WeightGradQueue) -> None:
    """Make every matrix product of the model put its weight gradients into ``queue``."""
    install(model, weight_grad_store=lambda _: queue)
    for module in model.modules():
        if isinstance(module, MoE) and isinstance(module.dispatcher, ExpertParallelDispatcher):
            module.experts.weight_grad_store = _ExpertQueue(queue, module.dispatcher.streams)


def add_gradient(parameter: nn.Parameter, grad: Tensor) -> None:
    """Add the gradient of this rank's part of a parameter, in the parameter's dtype and layout."""
    grad = grad.to(parameter.dtype)
    if isinstance(parameter, DTensor):
        grad = DTensor.from_local(grad, parameter.device_mesh, parameter.placements, run_check=False)
    if parameter.grad is None:
        parameter.grad = grad
    else:
        parameter.grad += grad
