"""A process that ends with the one that started it. Linux tells it so; it asks for that itself, after its start.

The starter cannot ask for it between fork and exec: it has threads, whose locks may be held in the child for ever.
"""

from __future__ import annotations

import os
import signal
import sys

STARTED_BY = "LONGCAT_STARTED_BY"  # environment variable: the process id of the starter
PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """If this process's starter has set `STARTED_BY`: be killed when that ends, also where it has ended already."""
    parent = os.environ.pop(STARTED_BY, "")  # processes that this one starts are not meant
    if not parent or sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGKILL)
