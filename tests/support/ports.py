"""Ports of this machine that nothing listens on."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

PORTS = (12000, 28000)  # below what systems give out by themselves


def free_port() -> int:
    """One of `free_ports`."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Ports for several rendezvous in turn: a store that has just been closed may still hold its port.

    Not from the range from which the system gives ports to other programs, which may take one before its use.
    """
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(*PORTS)
        with suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            ports.append(port)
    return ports
