"""Errors of collectives: which of them mean that another rank was lost or is late."""

from __future__ import annotations

# What gloo, NCCL and the store say when a rank is lost or a collective takes too long
LOST_RANK_MESSAGES = (
    "closed by peer",
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


def causes(error: BaseException) -> list[BaseException]:
    """An error and those that it was raised from: torch's pipeline wraps what a collective raised."""
    found = [error]
    while (cause := found[-1].__cause__) is not None and cause not in found:
        found.append(cause)
    return found


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank did not answer."""
    text = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(message in text for message in LOST_RANK_MESSAGES)


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error of torch's, without the source file that it begins with."""
    return str(error).partition("\n")[0].rpartition("] ")[2].partition(". ")[0][:200]
