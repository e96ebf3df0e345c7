"""Every private name of torch that parallel/ and train/ use, each behind a typed function or alias.

Tried on torch 2.13.0; short runs on 2.14.1. When another release moves one of these names, this is the only file to
mend; the twin for the model is `longcat/ops/torch_internals.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import distributed_c10d
from torch.distributed._shard._utils import narrow_tensor_by_index as narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.utils import _create_file_view
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather as DefaultAllGather
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter as DefaultReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo as FSDPMeshInfo
from torch.distributed.fsdp._fully_shard._fsdp_common import HSDPMeshInfo as HSDPMeshInfo
from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult as ShardPlacementResult
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor._utils import (
    compute_local_shape_and_global_offset as compute_local_shape_and_global_offset,
)

FSDP_HOOKS: dict[type, tuple[str, ...]] = {
    FSDPState: ("_pre_forward", "_post_forward", "_pre_backward", "_root_post_backward_final_callback"),
    FSDPParamGroup: ("pre_backward", "post_backward"),
}
OPTIMIZER_METHODS = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")

# --- aliases: imported above under their own names ----------------------------------------------------------------
#
# DefaultAllGather, DefaultReduceScatter: FSDP2's collectives, to subclass; only the interface that they have is public.
# FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult: the answer of `shard_placement_fn` that names another mesh.
# compute_local_shape_and_global_offset: a DTensor's local box; the public API gives its size without its offset.
# narrow_tensor_by_index: the part of a stored tensor that a checkpoint's read request names, as torch's reader cuts it.


# --- device mesh --------------------------------------------------------------------------------------------------


def flatten_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """One dimension of all ranks of a mesh, under a name; no public function folds dimensions."""
    return mesh._flatten(name)


def unflatten_mesh(mesh: DeviceMesh, dim: int, sizes: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """A dimension cut into several, the last one innermost; no public function does."""
    return mesh._unflatten(dim, sizes, names)


def concatenate_meshes(meshes: list[DeviceMesh]) -> DeviceMesh:
    """The dimensions of several meshes in one, which FSDP2 wants for HSDP; public slicing knows one root mesh only."""
    return DeviceMesh._concatenate(meshes)


# --- FSDP2 --------------------------------------------------------------------------------------------------------


def parameter_groups_of(module: FSDPModule) -> list[Any]:
    """FSDP2's groups of parameters of one module, one for each mesh; the public setters know a single group."""
    return list(module._get_fsdp_state()._fsdp_param_groups)


def all_parameter_groups(root: FSDPModule) -> Iterator[Any]:
    """FSDP2's groups of parameters of a root module and all modules in it; the public API does not list them."""
    for state in fully_shard.state(root)._state_ctx.all_states:  # type: ignore[attr-defined]
        yield from state._fsdp_param_groups


def set_all_gather(group: Any, collective: DefaultAllGather) -> None:
    """Let a group of parameters gather through ``collective``; the public setter refuses a module of several groups."""
    group._all_gather_comm = collective


def set_reduce_scatter(group: Any, collective: DefaultReduceScatter) -> None:
    """Let a group of parameters reduce through ``collective``; see `set_all_gather`."""
    group._reduce_scatter_comm = collective


def set_reduced_gradient_hook(group: Any, hook: Callable[[Tensor], None]) -> None:
    """Call ``hook`` on a group's reduced gradients, all in one tensor; see `set_all_gather`."""
    group._all_reduce_hook = hook


def reduce_scatter_of(group: Any) -> Any:
    """What `set_reduce_scatter` set; there is no public getter."""
    return group._reduce_scatter_comm


def keeps_reduced_gradients_as_views(group: Any, output: Tensor) -> bool:
    """Whether FSDP2 only views the output of a group's reduce-scatter as gradients: no cast, no hook on the sums."""
    return (
        group._all_reduce_hook is None
        and all(one.orig_dtype is output.dtype for one in group.fsdp_params)
        and all(not one.sharded_param._post_accumulate_grad_hooks for one in group.fsdp_params)
    )


def accumulate_unsharded_gradients(group: Any) -> None:
    """Add the new gradients of a group's gathered parameters to those kept in float32, as FSDP2's backward does."""
    for parameter in group.fsdp_params:
        if hasattr(parameter, "_unsharded_param"):
            parameter.accumulate_unsharded_grad_if_needed()
            parameter.to_accumulated_grad_if_needed()


def on_gather_and_release(group: Any, gathered: Callable[[Any], None], released: Callable[[Any], None]) -> None:
    """Call ``gathered(group)`` after a group's weights were gathered, ``released(group)`` before they are freed.

    FSDP2 has hooks for gradients only; these two methods are where every gather ends and every release begins.
    """
    wait, release = group.wait_for_unshard, group._to_sharded

    def wait_for_unshard() -> None:
        pending = group._all_gather_result is not None
        wait()
        if pending:
            gathered(group)

    def to_sharded() -> None:
        if group.is_unsharded:
            released(group)
        release()

    group.wait_for_unshard, group._to_sharded = wait_for_unshard, to_sharded


def on_gradients(group: Any, wanted: Callable[[], bool], complete: Callable[[str, Tensor], None]) -> None:
    """Call ``complete(parameter's name, gradient)`` with a group's whole local gradients, before ranks are summed.

    Only while ``wanted()``.
    """
    post_backward = group.post_backward

    def with_gradients(*unused: Any) -> None:
        for one in group.fsdp_params if group.reduce_grads and wanted() else ():
            if hasattr(one, "_unsharded_param"):
                one.accumulate_unsharded_grad_if_needed()
                if one.unsharded_accumulated_grad is not None:
                    complete(one._param_fqn, one.unsharded_accumulated_grad_data)
                elif one.unsharded_param.grad is not None:
                    complete(one._param_fqn, one.unsharded_grad_data)
        post_backward(*unused)

    group.post_backward = with_gradients


def gathered_parts(group: Any) -> Iterator[tuple[str, Tensor]]:
    """(parameter's name, each owner's padded part of it [owners, …], by shard ranks) of a group that is gathered."""
    ranks = group.mesh_info.shard_mesh_size
    for parameter in group.fsdp_params:
        (gathered,) = parameter.all_gather_outputs
        dim, shape = parameter.fsdp_placement.dim, list(parameter.padded_sharded_param_size)
        shape.insert(dim, ranks)
        yield parameter._param_fqn, gathered.view(shape).movedim(dim, 0)


def local_shard(tensor: DTensor) -> Tensor:
    """This rank's shard. `to_local` gives autograd a node, which takes longer than the checksum of a small shard."""
    return tensor._local_tensor


def owned_shards(group: Any) -> dict[str, Tensor]:
    """Each parameter's padded shard of this rank, flat, in the dtype in which it is gathered."""
    return {
        one._param_fqn: one._sharded_param_data.to(one.param_dtype or one._sharded_param_data.dtype)
        for one in group.fsdp_params
    }


def finish_backward(root: FSDPModule) -> None:
    """Run what FSDP2 runs at the end of a root's backward; under a pipeline no backward of the root ends a step."""
    fully_shard.state(root)._root_post_backward_final_callback()  # type: ignore[attr-defined]


def initialize_root(root: FSDPModule) -> None:
    """Make a module the root before its first forward, or a unit that is gathered first takes itself for the root."""
    fully_shard.state(root)._lazy_init()  # type: ignore[attr-defined]


# --- pipeline -----------------------------------------------------------------------------------------------------

BatchP2P = Callable[..., list[dist.Work]]


def wrap_batch_p2p(wrapper: Callable[[BatchP2P], BatchP2P]) -> None:
    """Wrap the one function through which every pipeline schedule sends and receives; schedules have no hook for it."""
    from torch.distributed.pipelining import schedules

    schedules._batch_p2p = wrapper(schedules._batch_p2p)


@contextmanager
def without_connection_check() -> Iterator[None]:
    """Let schedules take for granted that every rank was given its stages' shapes.

    Otherwise ranks send each other a number before the first step and read it; a tensor without memory has no value.
    """
    from torch.distributed.pipelining import schedules

    base: Any = schedules._PipelineSchedule
    plain = base._warmup_p2p

    def static(self: Any, stages: list[Any], *unused: Any) -> None:
        for stage in stages:
            stage._inference_mode = schedules.InferenceMode.STATIC

    base._warmup_p2p = static
    try:
        yield
    finally:
        base._warmup_p2p = plain


# --- process groups -----------------------------------------------------------------------------------------------


def default_store() -> dist.Store:
    """The store of the default process group; a second public store would need a port of its own."""
    return distributed_c10d._get_default_store()


def process_groups() -> list[dist.ProcessGroup]:
    """All process groups of this rank; meshes and libraries make some that no public function lists."""
    return list(distributed_c10d._world.pg_map)


def set_group_timeout(group: dist.ProcessGroup, seconds: float) -> None:
    """The time-out of a process group that exists; the public API sets it at creation only."""
    distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def can_dump_nccl_trace() -> bool:
    """Whether this torch has NCCL's flight recorder; one built for CPUs has not."""
    return hasattr(torch._C._distributed_c10d, "_dump_nccl_trace")


def dump_nccl_trace() -> bytes:
    """NCCL's flight record of this rank; by public means torch writes it only after a time-out."""
    return cast(bytes, torch._C._distributed_c10d._dump_nccl_trace())  # type: ignore[attr-defined]


def start_fake_world(rank: int, world_size: int) -> None:
    """A process group of ranks that do not exist: collectives end at once. Its store is in torch's tests alone."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)


@contextmanager
def around_shape_propagation(begin: Callable[[], None], end: Callable[[], None]) -> Iterator[None]:
    """Call ``begin`` and ``end`` around each operator that DTensor runs only to learn the shape of a result."""
    names = ("_propagate_tensor_meta_non_cached", "_propagate_tensor_meta")
    plain = {name: getattr(ShardingPropagator, name) for name in names if hasattr(ShardingPropagator, name)}

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            begin()
            try:
                return function(*args, **kwargs)
            finally:
                end()

        return wrapped

    for name, function in plain.items():
        setattr(ShardingPropagator, name, wrap(function))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(ShardingPropagator, name, function)


# --- tensors ------------------------------------------------------------------------------------------------------


def foreach_norms(tensors: list[Tensor]) -> list[Tensor]:
    """‖t‖₂ of each tensor in one kernel; the public `clip_grad` helpers give their total norm only."""
    return torch._foreach_norm(tensors)  # type: ignore[return-value]


def foreach_add_(tensors: list[Tensor], others: list[Tensor]) -> None:
    """Add to each tensor another one, in place, in one kernel; no public function does."""
    torch._foreach_add_(tensors, others)


def foreach_scale_(tensors: list[Tensor], factor: float) -> None:
    """Multiply each tensor in place, in one kernel; no public function does."""
    torch._foreach_mul_(tensors, factor)


def make_wrapper_subclass(cls: type[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """A tensor of a subclass with a shape and without memory; torch's own subclasses are made so."""
    return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)  # type: ignore[attr-defined]


def has_compiled_forward(module: nn.Module) -> bool:
    """Whether `module.compile()` was called; torch says so nowhere else."""
    return getattr(module, "_compiled_call_impl", None) is not None


# --- torch's compiler ---------------------------------------------------------------------------------------------


def set_deterministic_algorithms(enabled: bool) -> None:
    """`torch.use_deterministic_algorithms` without importing torch's compiler, two seconds; `fuse` tells it later."""
    if "torch._inductor.config" in sys.modules:
        torch.use_deterministic_algorithms(enabled)
    else:
        torch._C._set_deterministic_algorithms(enabled, warn_only=False)


def optimize_without_compiler() -> None:
    """Let AdamW run as it is. torch imports its compiler to hide the methods from it, or to tell it of them."""
    never_compiled(*(getattr(torch.optim.Optimizer, name) for name in OPTIMIZER_METHODS))
    step: Any = torch.optim.AdamW.step
    if step.__code__.co_qualname == "_use_grad_for_differentiable.<locals>._use_grad":
        setattr(torch.optim.AdamW, "step", torch.no_grad()(step.__wrapped__))  # noqa: B010 (no method for mypy)


def shard_without_compiler() -> None:
    """The same for DTensors and for what FSDP2 runs before and after each unit: those hide themselves at every call."""
    _import_compiler_settings()
    never_compiled(DTensor.__init__, FakeTensorMode.__torch_dispatch__)
    for kind, names in FSDP_HOOKS.items():
        for name in names:
            hook = getattr(kind, name, None)
            if hook is not None and hook.__code__.co_qualname == "_dynamo_disable.<locals>.wrapper":
                setattr(kind, name, hook.__wrapped__)


def _import_compiler_settings() -> None:
    """Import the settings of torch's compiler, which DTensor reads, without the rest of its package.

    `torch._dynamo` then has this one name, and imports the package when another is asked for. It stays out of
    `sys.modules`, so an import of the package finds it not yet imported. Where it cannot be done, nothing is changed.
    """
    name = "torch._dynamo"
    if name in sys.modules or "_dynamo" in vars(torch):
        return
    package = ModuleType(name)
    package.__path__ = [str(Path(torch.__file__).parent / "_dynamo")]
    sys.modules[name] = package
    try:
        import_module(f"{name}.config")
    except Exception:
        sys.modules.pop(f"{name}.config", None)
        return
    finally:
        del sys.modules[name]
    vars(package)["__getattr__"] = lambda attribute: getattr(import_module(name), attribute)
    setattr(torch, "_dynamo", package)  # noqa: B010 (as an import would)


def never_compiled(*functions: Any) -> None:
    """Mark functions as hidden from the compiler. Nothing here compiles them or what calls them (`Fusible`)."""
    for function in functions:
        plain = getattr(function, "__wrapped__", None)
        if plain is not None and not hasattr(plain, "__dynamo_disable"):
            plain.__dynamo_disable = plain


# --- checkpoint files ---------------------------------------------------------------------------------------------

record_place: Any = _StorageInfo  # (file, offset, length): where a record lies, as torch's index lists it


def file_view(file: Any, offset: int, length: int) -> Any:
    """A range of an open file as a file, as torch's checkpoint reader opens one record of a shard."""
    return _create_file_view(file, offset, length)


def write_checkpoint_files(writer: Any, planner: Any, files: Any) -> Any:
    """Let a checkpoint writer's threads write a queue of files; a subclass chooses the files in its `write_data`."""
    return writer._write_data(planner, files)


def offset_in_archive(tensor: Tensor) -> int:
    """Where in its archive the values of a tensor loaded to the meta device lie, for reading them without a copy."""
    storage: Any = tensor.untyped_storage()
    return int(storage._checkpoint_offset)
