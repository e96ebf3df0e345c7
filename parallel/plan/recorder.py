"""Records what a step would allocate, compute and send under FakeTensorMode: no value exists, no message leaves."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longcat.ops.torch_internals import TorchDispatchMode, operator_name, product_flops, storage_key, tree_leaves
from parallel.fsdp.collectives import ROOT_UNIT
from parallel.plan.rates import NO_TIME, Rates
from parallel.torch_internals import never_compiled
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import SPANS, Span

PHASES = (SpanKind.FORWARD, SpanKind.BACKWARD, SpanKind.INPUT_GRADIENTS, SpanKind.WEIGHT_GRADIENTS)
FREE = {
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "alias",
    "resize_",
}
ASKS_DEVICE = torch.ops.prim.device.default


class Phase(NamedTuple):
    """A part of a step: a forward, a backward or half of one, of some layers and a micro-batch (from 1)."""

    kind: str
    layers: tuple[int, int] | None = None
    micro_batch: int | None = None


OUTSIDE = Phase("")
FIRST, INNER, LAST, REST = "first layer", "layers between", "last layer", "outside layers"


@dataclass
class Work:
    """What one phase does on this rank."""

    flops: float = 0.0  # of matrix products
    seconds: float = 0.0  # of computing alone
    before: int = 0  # bytes that live when it begins
    after: int = 0  # bytes that live when it ends
    peaks: dict[str, int] = field(default_factory=dict)  # most bytes that live in it, by `AllocationRecorder.position`

    @property
    def peak(self) -> int:
        return max(self.peaks.values(), default=self.before)


@dataclass
class Traffic:
    """What this rank sends to others in collectives or messages of one kind."""

    count: int = 0
    num_bytes: int = 0
    root_count: int = 0  # of them, of what FSDP2 shards outside layers
    root_bytes: int = 0


class AllocationRecorder(TorchDispatchMode):
    """Records the work of every operator, and the bytes of every storage that one returns until it is freed.

    Sizes are those that tensors ask for. An allocator that rounds up, or caches what was freed, takes more. FSDP2
    frees gathered weights by resizing their storage to zero, which no operator shows: see `watch_resizing`.
    """

    def __init__(self, rates: Rates = NO_TIME) -> None:
        super().__init__()
        self.rates = rates
        self.kind = "state"  # of what is allocated from now on
        self._ignoring = 0
        self.now, self.peak = 0, 0
        self.end = 0  # most bytes since the last phase began or ended: when a step has ended, of its end
        self.by_kind: Counter[str] = Counter()
        self.at_peak: dict[str, int] = {}
        self.phases: dict[Phase, Work] = {}
        self.traffic: dict[tuple[SpanKind, Phase], Traffic] = defaultdict(Traffic)
        self._current = self.phases[OUTSIDE] = Work()
        self._phase = OUTSIDE
        self.position = REST
        self._live: dict[int, tuple[int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ASKS_DEVICE:  # half of all calls
            return args[0].device
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it calls the operator on its shard, which comes here again
        self._enter_phase()
        out = func(*args, **(kwargs or {}))
        if self._ignoring:
            return out
        leaves = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor)]
        for leaf in leaves:
            self._see(leaf)
        if leaves and not func.is_view and operator_name(func) not in FREE:
            self._count(func, args, kwargs or {}, out, leaves)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, leaves: list[Tensor]) -> None:
        flops = product_flops(func, args, kwargs, out)
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # A product of bfloat16 may return or add to float32: what it multiplies decides its rate
        dtype = min(operands, key=Tensor.element_size).dtype if flops else leaves[0].dtype
        self.count(flops, sum(one.numel() * one.element_size() for one in (*operands, *leaves)), dtype)

    def count(self, flops: float, num_bytes: float, dtype: torch.dtype) -> None:
        """Count the work of an operator that reads and writes ``num_bytes``."""
        self._current.flops += flops
        self._current.seconds += self.rates.seconds(flops, num_bytes, dtype)

    def _enter_phase(self) -> None:
        """Follow this rank's spans, which say what it does."""
        span = SPANS.innermost
        while span is not None and span.event.kind not in PHASES:
            span = span.outer
        event = None if span is None else span.event
        phase = OUTSIDE if event is None else Phase(event.kind.value, event.layers, event.micro_batch)
        if phase != self._phase:
            self._current.after = self.now
            self._phase, self.end = phase, self.now
            if phase not in self.phases:
                self.phases[phase] = Work(before=self.now)
            self._current = self.phases[phase]
            self.enter(REST)

    def enter(self, position: str) -> None:
        """The model is now in this layer, or in none."""
        self._enter_phase()
        self.position = position
        self._current.peaks[position] = max(self._current.peaks.get(position, 0), self.now)

    def follow(self, layers: list[nn.Module]) -> None:
        """Enter each of a model's layers with its forward and with its backward."""
        for number, layer in enumerate(layers):
            where = FIRST if number == 0 else LAST if number == len(layers) - 1 else INNER
            layer.register_forward_pre_hook(partial(self._enters, where))
            layer.register_forward_hook(partial(self._left, where))

    def _enters(self, where: str, *unused: Any) -> None:
        self.enter(where)

    def _left(self, where: str, layer: nn.Module, inputs: Any, outputs: tuple[Tensor, Any]) -> None:
        if outputs[0].requires_grad:
            outputs[0].register_hook(partial(self._enters, where))
        if where == LAST:
            self.enter(REST)

    # What `SPANS.recorder` is told

    def launched(self, event: Event, num_bytes: int, work: Any) -> None:
        self._add_traffic(event, num_bytes)

    def sent(self, event: Event, num_bytes: int, peer: int) -> None:
        self._add_traffic(event, num_bytes)

    def span_ended(self, span: Span, now: float) -> None:
        """Phases end when the next one begins."""

    def _add_traffic(self, event: Event, num_bytes: int) -> None:
        found = self.traffic[event.kind, self._phase]
        found.count += 1
        found.num_bytes += num_bytes
        if event.module == ROOT_UNIT:
            found.root_count += 1
            found.root_bytes += num_bytes

    # Memory

    def _see(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta" or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key, size = storage_key(storage), storage.nbytes()
        if key in self._live:
            self.resized(storage)
            return
        self._live[key] = size, self.kind
        self._change(size, self.kind)
        weakref.finalize(storage, self._freed, key)

    def ignore(self) -> None:
        """Count nothing new until `count_again`; may be nested."""
        self._ignoring += 1

    def count_again(self) -> None:
        self._ignoring -= 1

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Count a storage's size anew, if it is one of those that are counted."""
        if storage_key(storage) in self._live:
            old, kind = self._live[storage_key(storage)]
            self._live[storage_key(storage)] = storage.nbytes(), kind
            self._change(storage.nbytes() - old, kind)

    def _freed(self, key: int) -> None:
        size, kind = self._live.pop(key)
        self._change(-size, kind)

    def _change(self, size: int, kind: str) -> None:
        self.now += size
        self.by_kind[kind] += size
        self.end = max(self.end, self.now)
        peaks = self._current.peaks
        peaks[self.position] = max(peaks.get(self.position, 0), self.now)
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, dict(self.by_kind)


never_compiled(AllocationRecorder.__torch_dispatch__)


@contextmanager
def recording(recorder: AllocationRecorder) -> Iterator[None]:
    """Tell the recorder of every message, and of every `UntypedStorage.resize_`."""
    plain, before = torch.UntypedStorage.resize_, SPANS.recorder

    def resize(self: torch.UntypedStorage, size: int) -> Any:
        out = plain(self, size)
        recorder.resized(self)
        return out

    torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
    SPANS.recorder = recorder
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = plain  # type: ignore[method-assign]
        SPANS.recorder = before
