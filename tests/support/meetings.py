"""Fixtures of tests in which nodes meet: a first node's place, a run folder's claims, a process that has ended."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.nodes.claims import Claims
from launch.nodes.meeting import Meeting
from launch.nodes.rendezvous import RendezvousParameters
from tests.support.ports import free_ports

IDENTITY = {"run folder": "/run"}


@pytest.fixture
def place() -> RendezvousParameters:
    return RendezvousParameters(2, "a", "127.0.0.1", free_ports(1)[0], None)


@pytest.fixture
def claims(tmp_path: Path) -> Claims:
    return Claims(tmp_path / "run")


def begun(place: RendezvousParameters, claims: Claims | None, timeout: float = 5.0) -> Meeting:
    meeting = Meeting(place, IDENTITY, claims, timeout, lambda: False)
    meeting.begin(time.monotonic() + 120)
    return meeting


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid
