"""Errors of collectives: which of them mean that another rank was lost or is late."""

from __future__ import annotations

import torch
import torch.distributed as dist

from parallel.watchdog.spans import SPANS, WAITING

# What gloo, NCCL and the store say when a rank is lost or a collective takes too long
LOST_RANK_MESSAGES = (
    "closed by peer",
    "connection was likely closed",
    "reset by peer",
    "broken pipe",
    "timed out",
    "timeout",
    "connection refused",
    "remote process exited",
    "nccl communicator was aborted",
    "unhandled system error",
    "application timeout caused pair closure",
)
GLOO_SOURCE = "/gloo/"  # in the source file that gloo's errors begin with


def causes(error: BaseException) -> list[BaseException]:
    """An error and those that it was raised from: torch's pipeline wraps what a collective raised."""
    found = [error]
    while (cause := found[-1].__cause__) is not None and cause not in found:
        found.append(cause)
    return found


def is_lost_rank(error: BaseException, in_wait: bool = False) -> bool:
    """Whether a collective failed because another rank did not answer.

    A file system and a kernel time out too: the error must be torch.distributed's, gloo's, or have left a wait.

    Args:
        in_wait: whether the innermost span that the error left was a wait for other ranks.
    """
    text = str(error).lower()
    of_device = isinstance(error, torch.AcceleratorError) or text.startswith("cuda error")
    of_file = isinstance(error, OSError) and error.filename is not None
    if of_device or of_file or not any(message in text for message in LOST_RANK_MESSAGES):
        return False
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError | OSError) and (in_wait or GLOO_SOURCE in text)
    )


def find_lost_rank(error: BaseException) -> BaseException | None:
    """The first of `causes` by which a rank is lost; None for any other error."""
    found, failed = causes(error), SPANS.failed
    in_wait = failed is not None and failed[0] in found and failed[1].state is WAITING
    return next((cause for cause in found if is_lost_rank(cause, in_wait)), None)


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error of torch's, without the source file that it begins with."""
    return str(error).partition("\n")[0].rpartition("] ")[2].partition(". ")[0][:200]
