"""Runs a function on several gloo ranks, and names the rank that fails or hangs."""

from __future__ import annotations

import io
import multiprocessing
import os
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from tests.support.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
# What most ranks need; DeepSpeed and torch's compiler are imported by those that use them
PRELOADED = ["tests.support.measure", "tests.support.running", "train.data.megatron_index"]


@cache
def rank_context() -> ForkServerContext:
    """Starts ranks as forks of a process that has imported torch and this project, and run nothing.

    A rank is ready in a tenth of a second, where a new process takes three seconds of imports.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = os.environ.get("PYTHONPATH")
    paths = [str(ROOT), *([before] if before else [])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # Python 3.11 gives the server no other search path
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def set_rank_environment(rank: int, world_size: int, port: int) -> None:
    """Set the environment of a rank, as torchrun does, with one thread and the loopback device."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        GLOO_SOCKET_IFNAME="lo",
    )
    torch.set_num_threads(1)


def inherit(environment: dict[str, str]) -> None:
    """Take over the test's environment: a fork of the server has the one that the server started with."""
    os.environ.clear()
    os.environ.update(environment)


def _rank_main(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    queue: Any,
    arguments: tuple[Any, ...],
    environment: dict[str, str],
) -> None:
    inherit(environment)
    set_rank_environment(rank, world_size, port)
    try:
        answer = io.BytesIO()  # bytes: tensors in a queue would share memory with a process that has ended
        torch.save(function(*arguments), answer)
        queue.put((rank, answer.getvalue(), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 120) -> list[Any]:
    """Call ``function(*arguments)`` on each of ``world_size`` processes of its own → their results in rank order.

    The function must be importable and must make its own process group from the environment.
    """
    context, environment = rank_context(), dict(os.environ)
    queue = context.Queue()
    port = free_port()
    ranks = [
        context.Process(target=_rank_main, args=(function, rank, world_size, port, queue, arguments, environment))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    results: dict[int, Any] = {}
    try:
        while len(results) < world_size:
            try:
                rank, result, failure = queue.get(timeout=timeout)
            except Empty:
                missing = sorted(set(range(world_size)) - results.keys())
                raise TimeoutError(f"ranks {missing} did not answer within {timeout} s") from None
            if failure:
                raise AssertionError(f"rank {rank} failed:\n{failure}")
            results[rank] = torch.load(io.BytesIO(result), weights_only=False)
    finally:
        for process in ranks:
            process.join(timeout=5 if len(results) == world_size else 0)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(world_size)]
