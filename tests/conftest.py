"""Settings of every test: one thread, loopback, no network, fixed seeds, a reason for each skip."""

from __future__ import annotations

import os
import random
import signal

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

# Programs that tests start inherit this: under `nohup` they would ignore the signal that some tests send
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Derandomised, so that a failure is reproducible.
settings.register_profile("project", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("project")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU where there is none, with the reason."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start each test from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
