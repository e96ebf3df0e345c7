"""Settings of every test: one thread, loopback, no network, fixed seeds, a reason for each skip."""

from __future__ import annotations

import fcntl
import os
import random
import signal
from collections.abc import Generator
from pathlib import Path

# Before torch is imported: ranks share the cores, and gloo must not look for another interface.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.path.exists("/sys/class/net/lo"):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import numpy as np
import pytest
import torch
from hypothesis import settings

from tests.support.gpus import hide_gpus

# Programs that tests start inherit this: under `nohup` they would ignore the signal that some tests send
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Derandomised, so that a failure is reproducible.
settings.register_profile("project", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("project")


def pytest_configure(config: pytest.Config) -> None:
    """Before the first question to CUDA."""
    hide_gpus(os.environ, config.option.markexpr)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU where there is none, with the reason."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch sees none, or -m gpu was not given")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """`make test` runs tests in two processes; one marked `alone` waits until the other process runs none.

    A test shares the lock on the second file, or has it alone. Who waits for that keeps the lock on the first, so that
    the other process cannot begin one test after the other in the meantime.
    """
    with Path(__file__).open() as gate, Path(__file__).with_name("__init__.py").open() as room:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if "alone" in item.keywords else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.flock(room, fcntl.LOCK_UN)  # closing would not do: a forked process may have the file open too


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start each test from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
