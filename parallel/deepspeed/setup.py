"""Prepares a model for DeepSpeed: refused options, configuration, expert groups, casting on use."""

from __future__ import annotations

import logging
import os
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from longcat.errors import ConfigError
from longcat.init import fill
from longcat.interfaces import UnshardedVocabulary
from longcat.model import LongCat
from longcat.moe import Experts
from longcat.roles import role
from parallel.config import Offload, ParallelConfig, Sharding
from parallel.mesh import Topology

STAGES = {Sharding.zero1: 1, Sharding.zero2: 2, Sharding.zero3: 3}
BUCKET_NUMEL = 1 << 26  # gradients reduced at once; each bucket is a buffer of as many float32
NVME_NUMEL = 100_000_000
PERSISTENT_NUMEL = 10_000  # under ZeRO-3 smaller tensors stay gathered: sharding them costs more than it saves


def quiet_import(device_type: str) -> Any:
    """Import DeepSpeed (2 s), which reads the environment on import, and silence it."""
    os.environ.setdefault("DS_ACCELERATOR", device_type)  # without a GPU its own choice prints a warning
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)  # from DeepSpeed
    if device_type == "cpu":
        # Else it compiles a shared-memory all-reduce before the first collective; gloo's is enough
        vars(deepspeed.ops)["__compatible_ops__"] = {}
    return deepspeed


def deepspeed_settings(config: ParallelConfig, num_weights: int, largest: int) -> dict[str, Any]:
    """DeepSpeed's configuration for ``num_weights`` elements, ``largest`` in one tensor. It only logs batch sizes."""
    stage = STAGES[config.sharding]
    bucket = min(BUCKET_NUMEL, num_weights)
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": torch.cuda.is_available(),
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": 2 * BUCKET_NUMEL,
    }
    if stage == 3:
        zero |= {
            "memory_efficient_linear": False,  # True replaces torch.nn.functional.linear in this process
            "stage3_prefetch_bucket_size": bucket,
            "stage3_param_persistence_threshold": PERSISTENT_NUMEL,
        }
    elif config.offload == Offload.none:
        zero["compute_grad_norm"] = False  # we compute it before the step; offload needs DeepSpeed's own
    if config.offload != Offload.none:
        target: dict[str, Any] = {"device": str(config.offload), "pin_memory": torch.cuda.is_available()}
        if config.offload == Offload.nvme:
            target["nvme_path"] = config.offload_path
            zero["sub_group_size"] = NVME_NUMEL  # weights updated at once: the size of a buffer
        zero["offload_optimizer"] = dict(target)
        if stage == 3:
            # A buffer must fit this rank's part of any weight
            zero["offload_param"] = (
                target | {"buffer_size": max(largest, 1)} if config.offload == Offload.nvme else target
            )
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # the caller clips; DeepSpeed's default is 1
        "gradient_allreduce_op": "sum" if stage < 3 else "mean",  # ZeRO-3 always averages: `ZeroEngine` multiplies
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW was faster, and needs no compiler
        "steps_per_print": 1 << 62,
    }


def keep_own_experts(model: LongCat, topology: Topology) -> None:
    """Keep only this rank's experts, [N / ep, ...], in each layer of a model on the meta device."""
    ep, total = topology.sizes.ep, model.config.num_experts
    if total % ep:
        raise ConfigError(f"parallel.ep={ep} does not divide model.num_experts={total}; use a divisor of it")
    for module in model.modules():
        if isinstance(module, Experts):
            for name, weight in list(module.named_parameters(recurse=False)):
                if weight.shape[0] == total and ep > 1:
                    setattr(module, name, nn.Parameter(weight.new_empty(total // ep, *weight.shape[1:])))


def expert_group_name(ep: int) -> str:
    """DeepSpeed's name for the groups of an expert-parallel size."""
    return f"ep_size_{ep}"


class UnderDeepSpeed(nn.Module):
    """The model that DeepSpeed wraps, with a marker that makes it recognise experts.

    DeepSpeed handles experts only if some module is an instance of its own MoE layer; then it reads only the attributes
    ``allreduce`` and ``group_name`` of each parameter. So the marker is an MoE layer without parameters that the
    forward does not use: the model's own modules stay unchanged.
    """

    def __init__(self, model: LongCat, ep: int) -> None:
        super().__init__()
        self.model = model
        if ep > 1:
            self.marker = experts_marker(ep, model.config.num_experts)
            for name, weight in model.named_parameters():
                if role(name) == "expert":
                    weight.allreduce = False  # type: ignore[attr-defined]
                    weight.group_name = expert_group_name(ep)  # type: ignore[attr-defined]

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.model(*arguments, **named)


def experts_marker(ep: int, num_experts: int) -> nn.Module:
    """An empty instance of DeepSpeed's MoE layer that makes its groups of ``ep`` neighbouring ranks."""
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    class Marker(MoE):  # type: ignore[misc]
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = num_experts

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            if expert_group_name(ep) not in groups._get_expert_parallel_group_dict():
                groups._create_expert_and_data_parallel(ep)

    return Marker()


def parameter_groups(model: LongCat, ep: int) -> list[dict[str, Any]]:
    """One group per role, MTP's separate: while MTP is off its moments and steps must not change."""
    members: dict[tuple[str, bool], list[nn.Parameter]] = defaultdict(list)
    for name, weight in model.named_parameters():
        members[role(name).value, name.startswith("mtp.")].append(weight)
    groups = []
    for (kind, mtp), weights in members.items():
        group = {"params": weights, "role": kind, "mtp": mtp, "name": f"{kind}{'-mtp' * mtp}"}
        if kind == "expert" and ep > 1:
            group |= {"moe": True, "name": expert_group_name(ep)}  # DeepSpeed looks the process group up by the name
        groups.append(group)
    return groups


class CastVocabulary(UnshardedVocabulary):
    """Casts embedding rows to the compute dtype; the weight stays float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def lookup(self, tokens: Tensor, weight: Tensor) -> Tensor:
        return super().lookup(tokens, weight).to(self.dtype)


def allocate(model: LongCat, topology: Topology, settings: dict[str, Any]) -> None:
    """Allocate a model on the meta device without values; ZeRO-3 does so module by module, sharding each at once."""
    stage = settings["zero_optimization"]["stage"]
    if stage < 3:
        model.to_empty(device=topology.device)
    else:
        import deepspeed

        swapper = None  # one for all weights: making another clears the files of the first
        for module in model.modules():
            own_parameters = list(module.parameters(recurse=False))
            if own_parameters or any(True for _ in module.buffers(recurse=False)):
                module.to_empty(device=topology.device, recurse=False)
                if own_parameters:  # without dtype=: on a CPU it takes any for bfloat16
                    cut = deepspeed.zero.Init(module=module, config_dict_or_path=settings, param_swapper=swapper)
                    swapper = cut.param_swapper
    for name, buffer in model.named_buffers():
        fill(buffer, name, tuple(buffer.shape), None, model.config, seed=0)  # zeros: buffers are not drawn


def first_expert(model: LongCat, topology: Topology) -> int:
    """The number of this rank's first expert."""
    rank = topology.experts["ep"].get_local_rank() if topology.sizes.ep > 1 else 0
    return int(rank) * (model.config.num_experts // topology.sizes.ep)


def leave_out_groups(zero: Any, is_left_out: Callable[[int], bool]) -> None:
    """Let DeepSpeed's optimizer update only groups, by their number, of which ``is_left_out`` is false.

    A group without gradients has zeros, by which AdamW would decay its weights and moments.
    """
    update = zero._optimizer_step

    def update_unless_left_out(number: int) -> None:
        if not is_left_out(number):
            update(number)

    zero._optimizer_step = update_unless_left_out


def keep_count_in_recomputation(model: nn.Module) -> None:
    """Let ZeRO-3 release a module's weights after its backward, also where that calls the module again.

    Each call resets DeepSpeed's count of the gradients that the module's backward has still to compute. A value that is
    recomputed calls its module between forward and backward; then the count never came to 0, and the gathered weights
    stayed until the whole backward ended. A call without gradients has no backward, so it leaves the count as it was.
    """
    counts: dict[nn.Module, int] = {}

    def keep(module: nn.Module, _: Any) -> None:
        if not torch.is_grad_enabled() and hasattr(module, "ds_grads_remaining"):
            counts[module] = module.ds_grads_remaining  # type: ignore[assignment]

    def restore(module: nn.Module, _: Any, __: Any) -> None:
        if module in counts:
            module.ds_grads_remaining = counts.pop(module)  # type: ignore[assignment]

    for module in model.modules():
        module.register_forward_pre_hook(keep, prepend=True)
        module.register_forward_hook(restore)


def keep_gradients_in_memory(swapper: Any) -> None:
    """Stop DeepSpeed from writing gradients to NVMe: with libaio they were read back wrong, without any error.

    The suspect is reading to unaligned addresses. This costs no memory: the buffer that they would be written from
    contains all of them anyway.
    """

    def swap_out_gradients(parameter: Tensor, gradient_offsets: list[int], gradient_tensors: list[Tensor]) -> None:
        information = swapper._get_param_swap_info(parameter)
        information.unswapped_gradients.update(zip(gradient_offsets, gradient_tensors, strict=True))

    swapper.swap_out_gradients = swap_out_gradients


def data_parallel_size(topology: Topology) -> int:
    """The number of ranks: DeepSpeed treats dp, fsdp and cp alike as data-parallel."""
    return topology.sizes.dp * topology.sizes.fsdp * topology.sizes.cp
