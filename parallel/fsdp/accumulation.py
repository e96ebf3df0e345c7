"""FSDP2 under a pipeline: gradients accumulate over all micro-batches of a step and are reduced once at its end.

Torch's pipeline does this for a stage that is itself an FSDP module. Ours wraps one, and weight gradients are deferred,
so this file makes the same calls.
"""

from __future__ import annotations

from torch.distributed.fsdp import FSDPModule

from longcat.model import LongCat
from parallel.fsdp.collectives import parameter_groups, wait_for_reductions
from parallel.torch_internals import accumulate_unsharded_gradients, finish_backward


def begin_accumulation(model: LongCat) -> None:
    """Before a step: keep gathered weights and unreduced gradients until `reduce_accumulated`."""
    if isinstance(model, FSDPModule):
        _set(model, last=False)


def accumulate_deferred(model: LongCat) -> None:
    """Add deferred weight gradients to the float32 sums, so that two of them are never added in bfloat16."""
    for group in parameter_groups(model):
        accumulate_unsharded_gradients(group)


def reduce_accumulated(model: LongCat) -> None:
    """After a step: reduce the gradients over the ranks and release the gathered weights. A collective."""
    if not isinstance(model, FSDPModule):
        return
    _set(model, last=True)
    for group in parameter_groups(model):
        group.post_backward()
    finish_backward(model)
    wait_for_reductions(model)


def reshard_all(model: LongCat) -> None:
    """Release gathered weights after forwards without a backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _set(model: FSDPModule, last: bool) -> None:
    model.set_requires_gradient_sync(last)
    model.set_reshard_after_backward(last)
    model.set_is_last_backward(last)
