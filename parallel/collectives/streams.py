"""Streams around collectives: which stream does which work, and which waits for which.

On a CPU, statements run in order, on one stream. On a GPU the host only queues work. There, permutations and the waits
for collectives are queued on a side stream of high priority, so that the stream of the dense path waits only for what
it uses:

    main    router ─┬─ ffn 0 ──────────┬─ experts ─┬─ attention 1, ffn 1 ──┬─ sum
                    │ fork             │ join      │ fork                  │ join
    side            └ sizes, permute   └ reorder   └ reorder               └ combine
                          │    └─────────┐ ▲            └───────────────┐    ▲
    NCCL                  sizes          dispatch                       combine

A **fork** lets the side stream wait for what main has queued so far; a **join** lets main wait for the side. A tensor
that one stream has allocated and another uses is told to the allocator (`record_stream`), because memory that is freed
goes back to the allocating stream at once. Nothing waits for the whole device.

Experts can have their own stream (`overlap.experts_stream`). Their autograd nodes are made on it, so
autograd lets main wait for them where their backward hands over to main's nodes: experts then run beside what was
queued on main before: the backward of all that follows them in the layer.

These calls go through `Cuda`, so that tests/parallel/collectives/test_streams.py can put a recorder in its place. It
has never run on a GPU here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor


class StreamContext:
    """One stream: all work is done in the order of statements.

    Args:
        blocking: wait for every collective where it starts, so that nothing overlaps; for comparison.
    """

    is_async_host = False  # whether the host queues work and continues

    def __init__(self, blocking: bool = False) -> None:
        self.blocking = blocking

    def fork(self, *tensors: Tensor) -> None:
        """Let the side stream wait for what has been queued here; it reads ``tensors``."""

    def record_use_on_side(self, *tensors: Tensor) -> None:
        """Let the side stream read ``tensors``, made here before the last fork."""

    def on_side_stream(self) -> AbstractContextManager[Any]:
        """A context whose work is queued on the side stream."""
        return nullcontext()

    def join(self, *tensors: Tensor) -> None:
        """Wait here for what has been queued on the side stream, and use ``tensors`` from there."""

    def record_use_here(self, *tensors: Tensor) -> None:
        """Use ``tensors``, made on the side stream before the last join, here."""

    def experts(self) -> AbstractContextManager[Any]:
        """A context whose work is queued where experts belong, after the next join."""
        return nullcontext()

    def bind_to_stream(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """``compute``, to be called later, on the stream of this moment, for whichever stream calls it."""
        return compute

    def to_host(self, values: Tensor) -> Callable[[], list[Any]]:
        """Start copying integers to the host → what waits for them. Called on the side stream."""
        return values.tolist


class Cuda:
    """The calls of torch.cuda that stream contexts are made of."""

    def stream(self, device: torch.device, priority: int) -> Any:
        """A new stream; -1 goes before 0."""
        return torch.cuda.Stream(device, priority=priority)

    def current(self) -> Any:
        return torch.cuda.current_stream()

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def event(self) -> Any:
        return torch.cuda.Event()

    def used_on(self, tensor: Tensor, stream: Any) -> None:
        """Keep the tensor's memory from its own stream until ``stream`` is through with what it has queued by then."""
        tensor.record_stream(stream)

    def pinned_like(self, values: Tensor) -> Tensor:
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True)


class SideStreamContext(StreamContext):
    """The caller's stream, a side stream, and perhaps a stream for experts."""

    is_async_host = True

    def __init__(self, device: torch.device, cuda: Cuda, experts_stream: bool = False) -> None:
        super().__init__()
        self.cuda, self.side = cuda, cuda.stream(device, -1)
        self.expert_stream = cuda.stream(device, 0) if experts_stream else None

    def fork(self, *tensors: Tensor) -> None:
        self._wait(self.side, self.cuda.current())
        self.record_use_on_side(*tensors)

    def record_use_on_side(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self.cuda.used_on(tensor, self.side)

    def on_side_stream(self) -> AbstractContextManager[Any]:
        return self.cuda.on(self.side)

    def join(self, *tensors: Tensor) -> None:
        self._wait(self.cuda.current(), self.side)
        self.record_use_here(*tensors)

    def record_use_here(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self.cuda.used_on(tensor, self.cuda.current())

    def experts(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.expert_stream is None else self.cuda.on(self.expert_stream)

    def bind_to_stream(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if self.expert_stream is None:
            return compute
        stream = self.cuda.current()

        def later() -> Tensor:
            with self.cuda.on(stream):
                result = compute()
            self._wait(self.cuda.current(), stream)
            self.cuda.used_on(result, self.cuda.current())
            return result

        return later

    def to_host(self, values: Tensor) -> Callable[[], list[Any]]:
        there = self.cuda.pinned_like(values)
        there.copy_(values, non_blocking=True)
        arrived = self.cuda.event()
        arrived.record(self.cuda.current())

        def wait() -> list[Any]:
            arrived.synchronize()
            return there.tolist()

        return wait

    def _wait(self, later: Any, earlier: Any) -> None:
        event = self.cuda.event()
        event.record(earlier)
        later.wait_event(event)


CURRENT_STREAM = StreamContext()


@cache
def stream_context(device: torch.device, experts_stream: bool) -> StreamContext:
    """The streams of a device: the same for all layers on a GPU, one on a CPU."""
    return SideStreamContext(device, Cuda(), experts_stream) if device.type == "cuda" else CURRENT_STREAM
