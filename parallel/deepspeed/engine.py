"""The second sharding engine: DeepSpeed's ZeRO 1, 2 and 3, with CPU and NVMe offload.

Master weights are float32 and start from the same values as under FSDP2 (DeepSpeed's bf16 mode would round them).
Under bfloat16 each product casts its weight. Gradients are SUMS over all ranks; an expert's, over the ranks that have
it. The caller sets norm, clipping and rates; DeepSpeed reduces, updates and gathers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longcat.init import fill
from longcat.interfaces import install
from longcat.model import LongCat, Losses
from longcat.names import OTHER_PARTS, part_number
from longcat.roles import role
from parallel.config import Offload, ParallelConfig
from parallel.deepspeed.flat_partitions import FlatShard, Fragment, by_fragment, fragments
from parallel.deepspeed.options import check
from parallel.deepspeed.setup import (
    STAGES,
    CastVocabulary,
    UnderDeepSpeed,
    allocate,
    data_parallel_size,
    deepspeed_settings,
    first_expert,
    keep_count_in_recomputation,
    keep_gradients_in_memory,
    keep_own_experts,
    leave_out_groups,
    parameter_groups,
    quiet_import,
)
from parallel.engine import MicroBatch, Objective, detached
from parallel.layout import BatchShape
from parallel.memory import StateBytes
from parallel.mesh import Topology
from parallel.state_store import MOMENTS, LocalBox, MakeOptimizer
from parallel.torch_internals import foreach_scale_

NORM_CHUNK = 1 << 22  # elements cast to float64 at once: a flat partition may hold billions


class ZeroEngine:
    """A model, its gradients and its optimizer, sharded by DeepSpeed.

    ``model`` is on the meta device. ``make_optimizer`` gets parameter groups with "params" and "role" and returns
    AdamW over them, with rates and decay by role; its groups keep their keys, so rates are set in
    ``engine.optimizer.param_groups`` as with any optimizer.

    Raises:
        ConfigError: pipeline or tensor parallelism, experts under ZeRO-3, or an offload that cannot work.
    """

    def __init__(
        self,
        model: LongCat,
        topology: Topology,
        config: ParallelConfig,
        compute_dtype: torch.dtype,
        make_optimizer: MakeOptimizer,
    ) -> None:
        check(config, topology.sizes)
        deepspeed = quiet_import(topology.device.type)
        self.model, self.stage, self.parts = model, STAGES[config.sharding], [model]
        self.offloads, self.transient = config.offload != Offload.none, config.offload == Offload.nvme
        self.num_ranks, self.first_expert = data_parallel_size(topology), first_expert(model, topology)
        self.splits_experts = topology.sizes.ep > 1
        keep_own_experts(model, topology)
        numels = [weight.numel() for weight in model.parameters()]
        settings = deepspeed_settings(config, sum(numels), max(numels))
        allocate(model, topology, settings)
        if compute_dtype is not torch.float32:
            install(model, vocabulary=lambda _: CastVocabulary(compute_dtype))
        self.names = {weight: name for name, weight in model.named_parameters()}
        self.shapes = {name: self._stored_shape(name, weight) for weight, name in self.names.items()}
        self.optimizer = make_optimizer(parameter_groups(model, topology.sizes.ep))
        self.engine, self.zero, _, _ = deepspeed.initialize(
            model=UnderDeepSpeed(model, topology.sizes.ep),
            optimizer=self.optimizer,
            config=settings,
            dist_init_required=False,
        )
        if self.stage == 3:
            keep_count_in_recomputation(model)
            if model.lm_head is not None:  # its weight is fetched by the model's own forward
                deepspeed.zero.register_external_parameter(model, model.lm_head.weight)
        if self.transient:
            keep_gradients_in_memory(self.zero.optimizer_swapper)
        self.mtp_used, self.counts_here, self.has_replicas = False, True, False
        leave_out_groups(self.zero, self._is_idle)
        self._create_moments()

    def _stored_shape(self, name: str, weight: nn.Parameter) -> tuple[int, ...]:
        shape = tuple(getattr(weight, "ds_shape", weight.shape))
        return (self.model.config.num_experts, *shape[1:]) if role(name) == "expert" else shape

    def _create_moments(self) -> None:
        """Moments from the start, so that checkpoints and hashes include them before the first step."""
        for _, flat, _ in self._local_groups(write=True):
            flat.data.zero_()  # padding too, which nothing else writes
            state = self.optimizer.state[flat]
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            for kind in MOMENTS:
                state[kind] = torch.zeros_like(flat, requires_grad=False)

    def initialise(self, seed: int) -> None:
        """Give every weight its value from (seed, logical name): each rank draws its shards, and all gather them."""
        for shard in self.shards(write=True):
            if shard.kind == "weight":
                for box, values in shard.boxes():
                    fill(values, shard.name, shard.shape, box, self.model.config, seed)
        self.refresh()

    # One step

    def run(self, micro_batches: Sequence[MicroBatch], objective: Objective, mtp: bool) -> list[list[Losses]]:
        per_micro_batch = []
        for number, batch in enumerate(micro_batches, start=1):
            losses: Losses = self.forward(batch.tokens, batch.labels, batch.valid, batch.documents, mtp=mtp)
            self.backward(objective(losses), last=number == len(micro_batches), mtp=mtp)
            per_micro_batch.append(detached(losses))
        return [per_micro_batch]

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> list[list[Losses]]:
        return [[self.forward(one.tokens, one.labels, one.valid, one.documents, mtp=False) for one in micro_batches]]

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """The model's losses; ``mtp=False`` leaves MTP out, and its state does not change."""
        return self.engine(*arguments, **named)

    def backward(self, loss: Tensor, last: bool, mtp: bool = True) -> None:
        """Add the gradients of one micro-batch.

        After the ``last`` of a step they are summed over ranks. Until then ZeRO-1 accumulates them on this rank, in
        float32; ZeRO-2 and 3 reduce those of each micro-batch.
        """
        self.mtp_used |= mtp
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)
        if last and self.stage == 3:
            self.scale_gradients(float(self.num_ranks))  # it averages; the loss stays unscaled for its hooks

    def gradient_squares(self) -> Tensor:
        """This rank's share of ‖gradients‖₂², float64: of all, then of each part of the model.

        Every element counts on exactly one rank.
        """
        num_layers = self.model.config.num_layers
        squares = torch.zeros(1 + num_layers + len(OTHER_PARTS), dtype=torch.float64)
        for number, grads in self._gradient_lists(write=False):
            if self._is_idle(number):
                continue
            for weight, values in by_fragment(grads, fragments(self.zero, number, self.stage)):
                part = 1 + part_number(self.names[weight], num_layers)
                for chunk in values.split(NORM_CHUNK):
                    squares[part] += torch.linalg.vector_norm(chunk, dtype=torch.float64).square().cpu()
        squares[0] = squares.sum()
        return squares

    def measured_bytes(self) -> StateBytes:
        """Weights include the computed copies and the fp32 masters; gathered weights of ZeRO-3 count as shards."""
        computed = sum(getattr(weight, "ds_tensor", weight).nbytes for weight in self.model.parameters())
        flats = self._flat_weights()
        master_weights = sum(flat.nbytes for flat in flats)
        grads = sum(grad.nbytes for _, grads in self._gradient_lists(write=False) for grad in grads)
        moments = sum(self.optimizer.state[flat][kind].nbytes for flat in flats for kind in MOMENTS)
        return StateBytes(float(computed + master_weights), float(grads), float(moments))

    @torch.no_grad()
    def scale_gradients(self, factor: float) -> None:
        """Multiply every gradient by ``factor``, in place."""
        for _, grads in self._gradient_lists(write=True):
            foreach_scale_(grads, factor)

    def step(self) -> None:
        """Update this rank's parts by AdamW, send the new weights to all ranks, drop the gradients.

        While MTP is off, its weights, moments and step counts stay.
        """
        self.engine.step()
        self.mtp_used = False

    def drop_gradients(self) -> None:
        """Drop the gradients as DeepSpeed does where they overflow."""
        self.zero.zero_grad(set_to_none=True)
        if self.stage < 3:
            self.zero.micro_step_id = -1  # or the next backward would add to what is dropped
        if self.offloads:  # the buffers of gradients stay: each first micro-batch overwrites them
            self.zero.reset_cpu_buffers()
            if self.stage < 3:
                self.zero._offload_accumulated_param_ids = set()
        else:
            self.zero.averaged_gradients = {}
            for flat in self._flat_weights():
                flat.grad = None
        self.mtp_used = False

    # State

    def local_boxes(self, write: bool = False) -> Iterator[LocalBox]:
        yield from self._boxes(self.shards(write))

    def _boxes(self, shards: Iterator[FlatShard]) -> Iterator[LocalBox]:
        for shard in shards:
            for box, values in shard.boxes():
                yield LocalBox(shard.kind, shard.name, shard.shape, box, values)

    def gradients(self) -> Iterator[LocalBox]:
        """Read-only copies of the reduced gradients, by name."""
        yield from self._boxes(self._gradient_shards())

    def shards(self, write: bool = False) -> Iterator[FlatShard]:
        """This rank's parts of fp32 master weights and moments; with ``write`` changes to them are kept.

        After writing weights call `refresh`. Under NVMe offload a shard is in memory until the next is requested, and a
        group is written back when the iteration passes it.
        """
        for _, flat, pieces in self._local_groups(write):
            state = self.optimizer.state[flat]
            for piece in pieces:
                yield self._shard("weight", flat, piece)
                for kind in MOMENTS:
                    yield self._shard(kind, state[kind], piece)

    def _gradient_shards(self) -> Iterator[FlatShard]:
        for number, flat, pieces in self._local_groups():
            if self._is_idle(number):
                continue
            grad = flat.grad
            if not self.offloads:
                local_parts = self.zero.averaged_gradients.get(number)
                grad = None if local_parts is None else torch.cat([part.reshape(-1) for part in local_parts])
            if grad is not None:
                for piece in pieces:
                    yield self._shard("grad", grad, piece)

    def steps(self, write: bool = False) -> Iterator[tuple[str, Tensor]]:
        """(stored name, AdamW's step count, writable) of every weight; the weights of a group share a tensor."""
        for number, flat in enumerate(self._flat_weights()):
            for weight in self._members(number):
                yield self.names[weight], self.optimizer.state[flat]["step"]

    def refresh(self) -> None:
        """Copy the fp32 master weights to the weights of the forward; a collective."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        self.zero._partition_all_parameters()
        for number, _, _ in self._local_groups():
            self.zero._reassign_or_swap_out_partitioned_parameters(number)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def derived(self) -> Iterator[tuple[str, Tensor]]:
        """The weights of the forward; under ZeRO-3 this rank's shards of them are the masters."""
        if self.stage < 3:
            yield from ((f"weight/forward copy of {name}", weight.detach()) for weight, name in self.names.items())

    def replicas(self) -> Iterator[tuple[str, Tensor]]:
        if self.stage < 3:
            for weight, name in self.names.items():
                if role(name) != "expert" or not self.splits_experts:
                    yield f"weight/forward copy of {name}", weight.detach()

    def reshape(self, batch: BatchShape) -> None:
        pass  # each micro-batch brings its shape

    def close(self) -> None:
        """Release DeepSpeed's groups, so that another run can start in this process."""
        from deepspeed.comm import comm
        from deepspeed.utils import groups

        self.engine.destroy()
        groups._release_process_group_references()
        comm.cdb = None

    def _gradient_lists(self, write: bool) -> Iterator[tuple[int, list[Tensor]]]:
        """(number, this rank's unique parts of the reduced gradients, with padding) of each DeepSpeed group."""
        if self.offloads:
            yield from ((n, [flat.grad]) for n, flat, _ in self._local_groups(write) if flat.grad is not None)
            return
        for number in range(len(self._flat_weights())):
            if self.zero.averaged_gradients.get(number):
                yield number, self.zero.averaged_gradients[number]

    def _shard(self, kind: str, flat: Tensor, piece: Fragment) -> FlatShard:
        name = self.names[piece.weight]
        shape = self.shapes[name]
        start = piece.start
        if role(name) == "expert":
            start += self.first_expert * shape[1] * shape[2]
        values = flat.detach().view(-1).narrow(0, piece.offset, piece.numel)
        return FlatShard(kind, name, shape, start, values)

    def _flat_weights(self) -> list[Tensor]:
        """This rank's flat fp32 master weights, one tensor per DeepSpeed group."""
        name = "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        return getattr(self.zero, name)  # type: ignore[no-any-return]

    def _members(self, number: int) -> list[nn.Parameter]:
        groups = self.zero.fp16_groups if self.stage == 3 else self.zero.bit16_groups
        return groups[number]  # type: ignore[no-any-return]

    def _group(self, number: int) -> dict[str, Any]:
        return self.optimizer.param_groups[self.zero.sub_group_to_group_id[number] if self.stage == 3 else number]

    def _is_idle(self, number: int) -> bool:
        """Whether MTP is off and a group's are its weights; their gradients may be those of an earlier step."""
        return not self.mtp_used and bool(self._group(number)["mtp"])

    def _local_groups(self, write: bool = False) -> Iterator[tuple[int, Tensor, list[Fragment]]]:
        """(number, this rank's flat fp32 master weights, their fragments) of each DeepSpeed group.

        Groups on NVMe are read in turn, and written back if ``write``.
        """
        for number, flat in enumerate(self._flat_weights()):
            swapped = self.transient and self.zero._swappable_optimizer_subgroup(number)
            if swapped:
                self.zero._optimizer_states_and_gradient_swap_in(number)
            yield number, flat, fragments(self.zero, number, self.stage)
            if swapped and write:
                self.zero._writeback_swap_state(number, write_opt_state=True, write_gradients=True)
            elif swapped:
                self.zero._release_swap_buffers(number)
