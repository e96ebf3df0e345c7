"""A pool of gloo ranks for each world size, reused by many tests; a rank that fails or hangs is named."""

from __future__ import annotations

import gc
import io
import os
import traceback
from collections.abc import Callable
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist

from tests.support.distributed import inherit, rank_context, set_rank_environment
from tests.support.ports import free_port


def _serve(rank: int, world_size: int, port: int, tasks: Any, answers: Any, environment: dict[str, str]) -> None:
    inherit(environment)
    set_rank_environment(rank, world_size, port)
    dist.init_process_group("gloo")
    while (task := tasks.get()) is not None:
        function, arguments = task
        try:
            answer = io.BytesIO()  # bytes: tensors in a queue would share memory with a process that may end
            torch.save(function(*arguments), answer)
            answers.put((rank, answer.getvalue(), None))
        except BaseException:
            answers.put((rank, None, traceback.format_exc()))
        else:
            _leave_groups()


def _leave_groups() -> None:
    """Destroy the groups that a task has made: gloo's threads wake a hundred times a second even when idle."""
    gc.collect()
    dist.barrier()  # another rank may still use one
    world = dist.distributed_c10d._world
    for group in list(world.pg_map):
        if group is not dist.group.WORLD:
            name = world.pg_names[group]
            dist.destroy_process_group(group)
            world.pg_names[object()] = name  # type: ignore[index]  # reserves the name: the store still holds the group's addresses


class Pool:
    """``world_size`` ranks in one process group. A failure ends the pool: its ranks may be at different collectives."""

    def __init__(self, world_size: int) -> None:
        self.closed = False
        context, environment = rank_context(), dict(os.environ)
        port = free_port()
        self.answers = context.Queue()
        self.tasks = [context.Queue() for _ in range(world_size)]
        self.ranks = [
            context.Process(
                target=_serve,
                args=(rank, world_size, port, self.tasks[rank], self.answers, environment),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in self.ranks:
            process.start()

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 300) -> list[Any]:
        """Call ``function(*arguments)`` on every rank; returns their results in rank order."""
        for queue in self.tasks:
            queue.put((function, arguments))
        results: dict[int, Any] = {}
        failures = {}
        try:
            while len(results) + len(failures) < len(self.ranks):
                rank, result, failure = self.answers.get(timeout=10 if failures else timeout)
                if failure:
                    failures[rank] = failure
                    continue
                results[rank] = torch.load(io.BytesIO(result), weights_only=False)
        except Empty:
            if not failures:
                self.close()
                missing = sorted(set(range(len(self.ranks))) - results.keys())
                raise TimeoutError(f"ranks {missing} did not answer within {timeout} s") from None
        if failures:
            self.close()
            first = min(failures)
            raise AssertionError(f"ranks {sorted(failures)} failed; rank {first}:\n{failures[first]}")
        return [results[rank] for rank in range(len(self.ranks))]

    def close(self) -> None:
        self.closed = True
        for process in self.ranks:
            process.kill()


_pools: dict[int, Pool] = {}


def pool(world_size: int) -> Pool:
    """The pool of this world size; a new one if the last one has failed."""
    if world_size not in _pools or _pools[world_size].closed:
        _pools[world_size] = Pool(world_size)
    return _pools[world_size]


def close_pools() -> None:
    for one in _pools.values():
        one.close()
    _pools.clear()
