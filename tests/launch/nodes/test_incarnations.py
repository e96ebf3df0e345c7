"""An agent's store outlives its ranks: what the ranks of one start have written there does not end the next ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from parallel.config import ParallelConfig
from parallel.mesh import connect
from parallel.torch_internals import default_store
from parallel.watchdog import watchdog
from tests.support.distributed import run_ranks
from tests.support.running import NARROW, ROOT, finish, lines, ranks_below, wait_for_step
from train.checkpoint.manifest import list_checkpoints


def start_after_a_diagnosis(folder: Path) -> tuple[int, list[str]]:
    """The ends that the watchdog of a second start announces where the first one's diagnosis is still in the store."""
    said: list[str] = []
    connect(ParallelConfig())
    watchdog.start(60.0, said.append, folder)
    current = watchdog._current
    assert current is not None
    key, own = current.store.diagnosis_key, current.store.keys
    watchdog.stop()
    dist.barrier()  # the first start of every rank is over: none reads the diagnosis that ended it
    if dist.get_rank() == 0:
        default_store().clone().set(key, "rank 1 has stopped")  # type: ignore[attr-defined]
    dist.barrier()
    watchdog.start(60.0, said.append, folder)
    current = watchdog._current
    assert current is not None
    assert current.store.publish(current.heartbeat()) is None, "the former diagnosis is read"
    assert not set(own) & set(current.store.keys)
    watchdog.stop()
    dist.barrier()  # the store is in rank 0
    dist.destroy_process_group()
    return len(own), said


def test_former_diagnosis_does_not_end_the_next_start(tmp_path: Path) -> None:
    assert run_ranks(start_after_a_diagnosis, 2, tmp_path) == [(2, []), (2, [])]


@pytest.mark.skipif(sys.platform != "linux", reason="finds ranks in /proc")
def test_torchrun_restarts_after_a_killed_rank(overrides: list[str], tmp_path: Path) -> None:
    """`torchrun --max-restarts`: one store, two starts of all ranks."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    words = [*overrides, *NARROW, "checkpoint.every=2", "train.steps=60", "logging.hash_every=0"]
    agent = subprocess.Popen(
        [*torchrun, "-m", "train", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_step(tmp_path / "run", 3, agent)
    while not list(list_checkpoints(tmp_path / "run" / "checkpoints")):  # it is written beside the steps
        assert agent.poll() is None
        time.sleep(0.02)
    os.kill(ranks_below(agent.pid)[1], signal.SIGKILL)
    code, errors = finish(agent, 300)
    assert code == 0, errors
    assert [row["step"] for row in lines(tmp_path / "run")] == list(range(1, 61))
    assert "resumed from" in (tmp_path / "run" / "run.log").read_text()
