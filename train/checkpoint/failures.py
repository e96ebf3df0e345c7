"""What went wrong on some of all ranks, in one line."""

from __future__ import annotations


def describe(error: BaseException) -> str:
    """An error in a few words: what the system says of it, or its kind and text."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f' ({error.filename})' if error.filename else ''}"
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def first_failure(failed: dict[int, str]) -> str:
    """The first failing rank's reason, and who else failed."""
    rank = min(failed)
    others = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
    return f"rank {rank}{others}: {failed[rank]}"
