"""What a rehearsed step asks of its device: operators, copies to the host, waits, and collectives in their order.

The device's tensors are fake: they have shapes and no values. The host's are real. A copy from the device to the host
is counted, and gives zeros.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel.kernels.shapes import SHAPES
from parallel.torch_internals import never_compiled

aten, longcat = torch.ops.aten, torch.ops.longcat
PACKAGES = ("longcat", "parallel", "train")
# Operators whose result on a GPU has a size or a value that only the device knows: the host waits for it
WAITING = ("nonzero", "masked_select", "is_nonzero", "_unique2", "unique_consecutive")
# CUDA kernels that torch refuses under deterministic algorithms, by the documentation of that setting
REFUSED = ("histc", "put_", "kthvalue", "median", "scatter_reduce", "_ctc_loss", "renorm", "grid_sampler_2d_backward")
# Parts of names of operators that sort, or write by index, which deterministic kernels do by sorting
SORTING = ("sort", "unique", "index_put", "scatter", "index_add", "index_copy", "bincount")


def caller() -> str:
    """file:function of the innermost frame of this project's packages."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        parts = frame.f_code.co_filename.split("/")
        if "tests" not in parts and any(package in parts for package in PACKAGES) and "torch" not in parts:
            return f"{parts[-1]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


@dataclass
class Found:
    """What a rank's step did."""

    operators: Counter[str] = field(default_factory=Counter)  # on the device, by name and overload
    copies: Counter[str] = field(default_factory=Counter)  # from the device to the host, by where they are started
    waits: Counter[str] = field(default_factory=Counter)  # of the host for the device: events, streams, operators
    pageable: Counter[str] = field(default_factory=Counter)  # copies to the device that the host waits for
    refused: Counter[str] = field(default_factory=Counter)  # operators without a deterministic kernel
    sorting: Counter[str] = field(default_factory=Counter)  # operators that sort, or write by index
    no_kernel: Counter[str] = field(default_factory=Counter)  # operators outside aten without one for CUDA
    misplaced: Counter[str] = field(default_factory=Counter)  # tensors that are not on the device
    collectives: dict[str, list[str]] = field(default_factory=dict)  # by group, in order
    messages: dict[str, list[str]] = field(default_factory=dict)  # by "sender>receiver", in order


class Recorder(TorchDispatchMode):
    """Sees every operator of a step before the fake mode does."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Found()

    def synchronized(self, what: str) -> None:
        self.found.waits[f"{what} in {caller()}"] += 1

    def all_gather_object(self, out: list[Any], value: Any, group: dist.ProcessGroup | None = None) -> None:
        """`dist.all_gather_object`, whose bytes a rank alone cannot have: all ranks give the same."""
        self._note(group or dist.group.WORLD, "all_gather_object")
        out[:] = [value] * len(out)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it calls the operator on its shard, which comes here again
        if func is torch.ops.prim.device.default:
            return func(*args)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func.namespace == "c10d":
            return self._exchange(func, args, kwargs, tensors)
        target = kwargs.get("device")
        to_device = target is not None and torch.device(target).type == "cuda"
        if not to_device and not any(isinstance(one, FakeTensor) for one in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is aten.record_stream.default:
            return None
        if (read := self._read(func, args, kwargs)) is not None:
            return read[0]
        return self._run(func, args, kwargs, tensors)

    def _run(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        name = func.name()
        self.found.operators[name] += 1
        if func._opname in WAITING or _indexes_by_mask(func, args):
            self.found.waits[f"{func._opname} in {caller()}"] += 1
        if func._opname in REFUSED or (func._opname.startswith("cumsum") and args[0].is_floating_point()):
            self.found.refused[f"{name} in {caller()}"] += 1
        if any(word in func._opname for word in SORTING):
            self.found.sorting[f"{func._opname} in {caller()}"] += 1
        if func.namespace != "aten" and not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
            self.found.no_kernel[name] += 1
        if func is aten._efficient_attention_backward.default:  # its meta function takes other arguments than it
            return (*map(torch.empty_like, args[1:4]), args[1].new_empty(0))
        if func.namespace == "longcat":
            if any(not one.is_cuda for one in tensors):
                self.found.misplaced[f"{name} in {caller()}"] += 1
            return SHAPES[func._opname](*args, **kwargs)
        if (source := _copied_to_device(func, args)) is not None and _waits(source, func, args, kwargs):
            self.found.pageable[caller()] += 1
        return func(*args, **kwargs)

    def _read(self, func: Any, args: Any, kwargs: Any) -> tuple[Any] | None:
        """The answer to an operator that brings values to the host, or None."""
        if func is aten._local_scalar_dense.default:
            self.found.copies[f"item in {caller()}"] += 1
            self.found.waits[f"item in {caller()}"] += 1
            return (0.0,) if args[0].is_floating_point() else (0,)
        if func is aten.equal.default:
            self.found.copies[f"equal in {caller()}"] += 1
            self.found.waits[f"equal in {caller()}"] += 1
            return (True,)
        if func is aten._to_copy.default and str(kwargs.get("device")) == "cpu" and args[0].is_cuda:
            self.found.copies[f"to in {caller()}"] += 1
            with unset_fake_temporarily():
                return (torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype),)
        if func is aten.copy_.default and not args[0].is_cuda and args[1].is_cuda:
            self.found.copies[f"copy in {caller()}"] += 1
            with unset_fake_temporarily():
                return (args[0].zero_(),)
        return None

    def _exchange(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        boxed = next(leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, torch.ScriptObject))
        group = dist.ProcessGroup.unbox(boxed)
        ranks = dist.get_process_group_ranks(group)
        described = "+".join(f"{str(one.dtype).removeprefix('torch.')}[{one.numel()}]" for one in tensors)
        # Only the default group and those of gloo have a CPU side
        if group.group_desc not in ("default_pg", "background") and any(not one.is_cuda for one in tensors):
            self.found.misplaced[f"{func._opname} in {group.group_desc} in {caller()}"] += 1
        if func._opname in ("send", "recv_", "recv_any_source_"):
            me, peer = dist.get_rank(), ranks[args[2]]
            pair = f"{me}>{peer}" if func._opname == "send" else f"{peer}>{me}"
            self.found.messages.setdefault(pair, []).append(described)
        else:
            self._note(group, f"{func._opname} {described} {_side(tensors)}")
        return func(*args, **kwargs)

    def _note(self, group: Any, what: str) -> None:
        ranks = dist.get_process_group_ranks(group)
        key = f"{_ordinal(group, ranks)} of {','.join(map(str, ranks))}"
        self.found.collectives.setdefault(key, []).append(what)


never_compiled(Recorder.__torch_dispatch__)


def _ordinal(group: dist.ProcessGroup, ranks: list[int]) -> int:
    """Which of the groups of the same ranks it is, in the order of their making: names differ between ranks."""
    alike = [one for one in dist.distributed_c10d._world.pg_map if dist.get_process_group_ranks(one) == ranks]
    return alike.index(group)


def _side(tensors: list[Tensor]) -> str:
    return "+".join(sorted({one.device.type for one in tensors}))


def _copied_to_device(func: Any, args: Any) -> Tensor | None:
    """The host's tensor that an operator copies to the device, if it does."""
    if func is aten._to_copy.default and not args[0].is_cuda:
        return args[0]
    return args[1] if func is aten.copy_.default and args[0].is_cuda and not args[1].is_cuda else None


def _waits(source: Tensor, func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the host waits for this copy: CUDA waits for one from pageable memory even if it is `non_blocking`."""
    third = func is aten.copy_.default and len(args) > 2 and args[2]
    with unset_fake_temporarily():
        return not kwargs.get("non_blocking", third) or not source.is_pinned()


def _indexes_by_mask(func: Any, args: Any) -> bool:
    indices = args[1] if func._opname in ("index", "index_put", "index_put_") else ()
    return any(isinstance(one, Tensor) and one.dtype is torch.bool for one in indices)
