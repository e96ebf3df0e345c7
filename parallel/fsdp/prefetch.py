"""Which units FSDP2 gathers ahead of their use, and how many gradients may be on their way to other ranks.

On its own, FSDP2 prefetches in the backward whatever ran before in the forward. A layer with experts or split heads has
several groups of parameters and a router as a unit of its own: only the router would be gathered ahead, and the dense
weights, the largest, at the last moment, behind the previous layer's reduce-scatter.
"""

from __future__ import annotations

from itertools import pairwise

from torch import nn
from torch.distributed.fsdp import FSDPModule

from longcat.model import LongCat
from parallel.torch_internals import parameter_groups_of


def prefetch_in_order(model: LongCat, mtp: bool) -> None:
    """Let each layer gather the next one's weights when it starts, in the forward and in the backward.

    ``mtp``: whether the MTP layers run. Weights that were gathered for a layer that does not run would stay.
    """
    if not isinstance(model, FSDPModule):
        return
    layers: list[nn.Module] = [*model.shortcut_layers()]
    if mtp and model.mtp is not None:
        layers += model.mtp.layers
    for order, backward in ((layers, False), (layers[::-1], True)):
        for module, following in pairwise([model, *order, None]):
            assert isinstance(module, FSDPModule)
            units = units_of(following)
            if backward:
                module.set_modules_to_backward_prefetch(units)
            else:
                module.set_modules_to_forward_prefetch(units)


def units_of(module: nn.Module | None) -> list[FSDPModule]:
    """What FSDP2 shards in a layer, in the order of use in the forward: the layer itself, then its router."""
    return [] if module is None else [inner for inner in module.modules() if isinstance(inner, FSDPModule)]


def keep_gradients_in_flight(model: LongCat) -> None:
    """Let a GPU go on computing while a whole layer's reduce-scatters are in progress.

    FSDP2 keeps the input of one, and makes the compute stream wait for it before the next unit's: a layer's router,
    in the middle of a backward, would wait for the dense weights of the layer above. The price is the float32 gradients
    of one more layer; `parallel.memory` counts them.
    """
    if isinstance(model, FSDPModule):
        model.set_reduce_scatter_max_input_buffers(reduce_scatters_of_a_layer(model))


def reduce_scatters_of_a_layer(model: LongCat) -> int:
    """The most that one layer's backward starts: one for each group of parameters."""
    layers = model.shortcut_layers()
    return max((sum(len(parameter_groups_of(unit)) for unit in units_of(layer)) for layer in layers), default=1)
