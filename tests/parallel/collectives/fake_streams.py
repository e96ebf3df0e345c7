"""Fakes of streams, events and collectives that record their order, and complain of unordered accesses.

Each operator on tensors belongs to the stream that is current; a vector clock for each stream says what it is ordered
after. Complaints, with memory as torch's allocator has it:

- a read that is not ordered after the last write of the same storage, or a write not after all earlier uses;
- a storage freed while a use on another stream than its own is neither ordered before what its own stream does next,
  nor before the next work of a stream that `record_stream` named: the allocator could reuse the memory at once;
- the host reading a copy before the event behind it.

Autograd is modelled: a node runs backward on the stream that was current when it was made, and its consumers' streams
wait for it when it has been queued. So are collectives: they run on a stream of their own, after the stream that was
current when they were called; `wait` orders the current stream behind them. That the host has waited for an event
orders nothing here, though it would on a GPU.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel.collectives.streams import Cuda
from parallel.watchdog.events import RankState
from parallel.watchdog.spans import SPANS

Site = tuple[str, ...]
Clock = Counter[str]
PARALLEL = str(Path(__file__).resolve().parents[3] / "parallel")
HOST_READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero")


def site(kind: str) -> Site:
    """The kind of call, and its callers in `parallel/` up to an autograd node, innermost first."""
    frame, names = sys._getframe(1), []
    while frame is not None:
        if frame.f_code.co_filename.startswith(PARALLEL) and "recompute" not in frame.f_code.co_filename:
            names.append(frame.f_code.co_qualname)
            if names[-1].endswith((".forward", ".backward")):
                break
        frame = frame.f_back  # type: ignore[assignment]
    return kind, *names


class Block:
    """A storage: the stream that owns its memory, and the last uses by each stream."""

    def __init__(self, storage: torch.UntypedStorage, owner: str, made_by: str) -> None:
        self.weak, self.owner, self.made_by = storage._weak_ref(), owner, made_by
        self.written: tuple[str, int] | None = None
        self.used: dict[str, int] = {}
        self.recorded: set[str] = set()


class Stream:
    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder, self.name = recorder, name

    def wait_event(self, event: Event) -> None:
        waits_for_others = SPANS.innermost is not None and SPANS.innermost.state is RankState.WAITING
        if self.name == "main" and event.stream == "side" and not waits_for_others:
            self.recorder.uncounted.append(site("wait"))
        if self.recorder.happens("wait"):
            self.recorder.clocks[self.name] |= event.clock


class Event:
    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self.clock = recorder, Counter[str]()  # an event that was never recorded blocks no stream
        self.stream = ""

    def record(self, stream: Stream) -> None:
        self.stream = stream.name
        if self.recorder.happens("record"):
            self.clock = self.recorder.clocks[stream.name].copy()

    def synchronize(self) -> None:
        self.recorder.host_waits += 1
        if self.recorder.happens("synchronize"):
            self.recorder.clocks["host"] |= self.clock


class Work:
    def __init__(self, recorder: Recorder, stream: str) -> None:
        self.recorder, self.clock = recorder, recorder.clocks[stream].copy()

    def wait(self) -> None:
        if self.recorder.happens("work.wait"):
            self.recorder.clocks[self.recorder.current] |= self.clock


class Pinned(Tensor):
    """Host memory; reading it is an operation of the host."""

    recorder: Recorder

    def tolist(self) -> Any:
        self.recorder.operate("host", [self], [], "tolist")
        with self.recorder.mute():
            return self.as_subclass(Tensor).tolist()


class Recorder(TorchDispatchMode):
    """Records everything inside its context. ``without`` names a site whose calls do nothing."""

    def __init__(self, without: Site | None = None) -> None:
        super().__init__()
        self.without = without
        self.sites: set[Site] = set()
        self.complaints: list[str] = []
        self.host_waits, self.forward_waits = 0, 0
        self.host_reads: list[str] = []
        self.uncounted: list[Site] = []  # main waits for the side stream outside a span, so no clock counts it
        self.num_operators: Counter[str] = Counter()
        self.current = "main"
        self.clocks: dict[str, Clock] = {name: Counter() for name in ("main", "host")}
        self.blocks: dict[int, Block] = {}
        self.muted = False
        self.switches: list[tuple[int, str]] = [(0, "main")]  # autograd's next node number, and the stream from it on

    def happens(self, kind: str) -> bool:
        self.check_freed()
        here = site(kind)
        self.sites.add(here)
        return here != self.without

    @contextmanager
    def mute(self) -> Iterator[None]:
        """Operators inside do not run on the device."""
        self.muted = True
        yield
        self.muted = False

    # memory and order

    def block(self, tensor: Tensor, made_by: str = "given") -> Block | None:
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            return None
        if storage._cdata not in self.blocks:
            owner = "host" if isinstance(tensor, Pinned) else self.current if made_by != "given" else "main"
            self.blocks[storage._cdata] = Block(storage, owner, made_by)
        return self.blocks[storage._cdata]

    def operate(self, stream: str, reads: list[Tensor], writes: list[Tensor], what: str) -> None:
        """An operator that is queued on ``stream``."""
        self.check_freed()
        clock = self.clocks[stream]
        clock[stream] += 1
        self.num_operators[stream] += 1
        for tensor in reads:
            block = self.block(tensor)
            if block is not None:
                if block.written is not None and clock[block.written[0]] < block.written[1]:
                    self.complain(f"{what} on {stream} reads what {block.made_by} writes on {block.written[0]}")
                block.used[stream] = clock[stream]
        for tensor in writes:
            block = self.block(tensor, what)
            if block is not None:
                late = [user for user, tick in block.used.items() if clock[user] < tick]
                if late:
                    self.complain(f"{what} on {stream} writes what {late} still use, made by {block.made_by}")
                block.used[stream] = clock[stream]
                block.written = stream, clock[stream]

    def check_freed(self) -> None:
        for key, block in list(self.blocks.items()):
            if torch.UntypedStorage._expired(block.weak):
                torch.UntypedStorage._free_weak_ref(block.weak)
                del self.blocks[key]
                if block.owner != "host":  # the pinned-memory allocator tracks copies itself
                    self._freed(block)

    def _freed(self, block: Block) -> None:
        minded = [self.clocks[name] for name in (block.owner, *block.recorded)]
        for user, tick in block.used.items():
            if all(clock[user] < tick for clock in minded):
                self.complain(f"{block.made_by}'s result is {block.owner}'s and freed while {user} uses it")

    def complain(self, sentence: str) -> None:
        self.complaints.append(sentence)

    # operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.muted:
            return out
        name = func._schema.name
        if name in HOST_READS or (name == "aten::repeat_interleave" and not (kwargs or {}).get("output_size")):
            self.host_reads.append(name)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        aliases = {leaf.untyped_storage()._cdata for leaf in given}
        mutated = [
            leaf
            for argument, value in [*zip(func._schema.arguments, args, strict=False), *_named(func, kwargs)]
            if argument.alias_info is not None and argument.alias_info.is_write
            for leaf in tree_leaves(value)
            if isinstance(leaf, Tensor)
        ]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        fresh = [leaf for leaf in made if leaf.untyped_storage()._cdata not in aliases]
        if "empty" in name:
            for leaf in fresh:
                self.block(leaf, name)
        elif fresh or mutated or not made:
            self.operate(self.current, given, [*mutated, *fresh], name)
        return out

    # collectives

    def collective(self, name: str, call: Callable[..., Any], in_place: bool) -> Callable[..., Any]:
        def stand_in(out: Tensor, *arguments: Any, **named: Any) -> Work | None:
            overlapped = named.pop("async_op", False)
            assert overlapped, f"{name} would block"
            with self.mute():
                call(out, *arguments, **named)
            group = named.get("group") or next(one for one in arguments if isinstance(one, dist.ProcessGroup))
            stream = f"exchange of {group.group_name}"
            self.clocks.setdefault(stream, Counter())
            self.clocks[stream] |= self.clocks[self.current]
            self.operate(stream, [out if in_place else arguments[0]], [out], name)
            return Work(self, stream)

        return stand_in

    def __enter__(self) -> Recorder:
        self.patches = [
            mock.patch.object(dist, name, self.collective(name, getattr(dist, name), name == "all_reduce"))
            for name in ("all_to_all_single", "all_gather_single", "reduce_scatter_single", "all_reduce")
        ]
        tolist = Tensor.tolist

        def watched(tensor: Tensor) -> Any:
            on_cpu_only = sys._getframe(1).f_globals["__name__"] == "longcat.ops.grouped"  # a GPU kernel reads the ends
            if not isinstance(tensor, Pinned) and not self.muted and not on_cpu_only:
                self.host_reads.append("tolist")
            return tolist(tensor)

        self.patches.append(mock.patch.object(Tensor, "tolist", watched))
        for patch in self.patches:
            patch.start()
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for patch in self.patches:
            patch.stop()

    # autograd

    def backward(self, loss: Tensor) -> None:
        """loss.backward() as autograd runs it on a GPU."""
        assert loss.grad_fn is not None
        seen, waiting = set(), [loss.grad_fn]
        hooks = []
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                hooks += [node.register_prehook(self._before(node)), node.register_hook(self._behind(node))]
                waiting += [following for following, _ in node.next_functions if following is not None]
        del node, seen, waiting
        loss.backward()
        for stream in {name for _, name in self.switches}:
            self.clocks["main"] |= self.clocks[stream]
        self.current = "main"
        for hook in hooks:
            hook.remove()

    def stream_of(self, node: Any) -> str:
        number = node._sequence_nr()
        if number > self.switches[-1][0] + 10**9:  # a leaf's node
            return "main"
        return next(name for start, name in reversed(self.switches) if start <= number)

    def _before(self, node: Any) -> Callable[[Any], None]:
        stream = self.stream_of(node)

        def hook(_: Any) -> None:
            self.current = stream

        return hook

    def _behind(self, node: Any) -> Callable[[Any, Any], None]:
        stream = self.stream_of(node)
        consumers = [following and self.stream_of(following) for following, _ in node.next_functions]

        def hook(grads: Any, _: Any) -> None:
            for consumer, grad in zip(consumers, grads, strict=True):
                if consumer is not None and grad is not None and consumer != stream:
                    self.clocks[consumer] |= self.clocks[stream]
                    if (block := self.block(grad)) is not None:
                        block.recorded.add(consumer)
            consumers_here = [consumer for consumer in consumers if consumer is not None]
            self.current = consumers_here[0] if consumers_here else "main"

        return hook


def _named(func: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    for argument in func._schema.arguments:
        if argument.name in (kwargs or {}):
            yield argument, kwargs[argument.name]


class RecordedCuda(Cuda):
    """The calls of torch.cuda, recorded."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def stream(self, device: torch.device, priority: int) -> Stream:
        name = "side" if priority < 0 else "experts"
        self.recorder.clocks[name] = Counter()
        return Stream(self.recorder, name)

    def current(self) -> Stream:
        return Stream(self.recorder, self.recorder.current)

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before = self.recorder.current
        self._switch(stream.name)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, name: str) -> None:
        self.recorder.current = name
        self.recorder.switches.append((torch._C._autograd._get_sequence_nr(), name))

    def event(self) -> Event:
        return Event(self.recorder)

    def used_on(self, tensor: Tensor, stream: Any) -> None:
        block = self.recorder.block(tensor)
        if self.recorder.happens("record_stream") and block is not None:
            block.recorded.add(stream.name)

    def pinned_like(self, values: Tensor) -> Tensor:
        with self.recorder.mute():
            pinned = torch.empty_like(values).as_subclass(Pinned)
            pinned.recorder = self.recorder
        return pinned
