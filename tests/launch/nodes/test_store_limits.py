"""The ranks' store takes more connections than a shell's usual limit of open files."""

from __future__ import annotations

import resource
from datetime import timedelta

import torch.distributed as dist

from launch.nodes.store import RanksStore

SOFT, RANKS = 64, 96  # of open files where the store starts; connections


def test_store_has_more_connections_than_the_soft_limit() -> None:
    """A shell's limit is often 1,024: with three connections a rank the 341st would have waited in vain."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT, before[1]))
    try:
        store = RanksStore("127.0.0.1")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    with store:
        first = dist.TCPStore("127.0.0.1", store.port)  # it imports torch first
        first.set_timeout(timedelta(seconds=20))
        connected = [first.clone() for _ in range(RANKS)]  # type: ignore[attr-defined]
        for number, one in enumerate(connected):
            one.set(str(number), "here")
        assert connected[0].get(str(RANKS - 1)) == b"here"
