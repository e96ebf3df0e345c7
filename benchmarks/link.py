"""Two network namespaces joined by a link of a chosen speed, for two ranks on one machine (root only)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from longcat.errors import ConfigError

NAMES = ("longcat-0", "longcat-1")
DEVICES = ("lc0", "lc1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"`{' '.join(words)}` failed: {done.stderr.strip()}; a shaped link needs root and iproute2")


@contextmanager
def shaped_link(mbit: float = 1000.0) -> Iterator[None]:
    """Make the namespaces and a link of ``mbit`` Mbit/s between them, and remove them at the end.

    `set_speed` changes its speed.

    Raises:
        ConfigError: this user is not root, or a program is missing.
    """
    if shutil.which("ip") is None or shutil.which("tc") is None or os.geteuid() != 0:
        raise ConfigError("a shaped link needs root and the programs ip and tc: install iproute2 and run as root")
    _remove()
    try:
        for name in NAMES:
            _run("ip", "netns", "add", name)
        ends = ["netns", NAMES[0], "type", "veth", "peer", "name", DEVICES[1], "netns", NAMES[1]]
        _run("ip", "link", "add", DEVICES[0], *ends)
        for name, device, address in zip(NAMES, DEVICES, ADDRESSES, strict=True):
            inside = ("ip", "-n", name)
            _run(*inside, "address", "add", f"{address}/24", "dev", device)
            _run(*inside, "link", "set", device, "up")
            _run(*inside, "link", "set", "lo", "up")
            _run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", device, "root", *_bucket(mbit))
        yield
    finally:
        _remove()


def set_speed(rank: int, mbit: float) -> None:
    """Limit what ``rank`` sends, from inside its namespace. Mbit/s."""
    _run("tc", "qdisc", "change", "dev", DEVICES[rank], "root", *_bucket(mbit))


def inside(rank: int, command: list[str]) -> list[str]:
    """``command``, run in the namespace of a rank."""
    return ["ip", "netns", "exec", NAMES[rank], *command]


def _bucket(mbit: float) -> list[str]:
    """A token bucket of 4 ms: little more than the rate passes at once after idle time."""
    size = max(64e3, mbit * 1e6 / 8 * 0.004)
    return ["tbf", "rate", f"{mbit * 1e6:.0f}bit", "burst", f"{size:.0f}b", "latency", "200ms"]


def _remove() -> None:
    for name in NAMES:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)
