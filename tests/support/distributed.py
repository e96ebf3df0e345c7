"""Runs a function on several gloo ranks, and names the rank that fails or hangs."""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from queue import Empty
from typing import Any

import torch


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


def _rank_main(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    queue: Any,
    arguments: tuple[Any, ...],
) -> None:
    set_rank_environment(rank, world_size, port)
    try:
        answer = io.BytesIO()  # bytes: tensors in a queue would share memory with a process that has ended
        torch.save(function(*arguments), answer)
        queue.put((rank, answer.getvalue(), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 120) -> list[Any]:
    """Call ``function(*arguments)`` on each of ``world_size`` new processes; returns their results in rank order.

    The function must be importable and must make its own process group from the environment.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    port = free_port()
    ranks = [
        context.Process(target=_rank_main, args=(function, rank, world_size, port, queue, arguments))
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
