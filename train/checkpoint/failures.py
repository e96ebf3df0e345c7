"""One-line descriptions of failures on one or several ranks."""

from __future__ import annotations

import errno


def describe(error: BaseException) -> str:
    """A short form of an error: the system's text of an OSError, else its type and first line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f' ({error.filename})' if error.filename else ''}"
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def first_failure(failed: dict[int, str]) -> str:
    """The first failing rank's reason, and how many more failed."""
    rank = min(failed)
    others = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
    return f"rank {rank}{others}: {failed[rank]}"


def is_disk_full(error: BaseException) -> bool:
    """Whether the file system, or the user's share of it, has no space left."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
