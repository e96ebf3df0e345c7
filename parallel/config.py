"""The sections `parallel` and `overlap` of the configuration: mesh axes, kinds of parallelism, their overlap."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from longcat.config_choices import check_choice
from longcat.config_limits import check_at_most
from longcat.errors import ConfigError
from longcat.recompute_values import Value

MAX_TIMEOUT = 100_000_000.0  # seconds; gloo counts a multiple of it in nanoseconds
MAX_CHUNKS = 1024
AUTO = "auto"  # of overlap.num_chunks

# 1f1b is no identifier, hence the functional form
Schedule = StrEnum("Schedule", {"zbv": "zbv", "1f1b": "1f1b", "interleaved": "interleaved", "dualpipev": "dualpipev"})


class Sharding(StrEnum):
    """Which engine shards the training state: FSDP2, or DeepSpeed's ZeRO stages."""

    fsdp = "fsdp"
    zero1 = "zero1"
    zero2 = "zero2"
    zero3 = "zero3"


class Offload(StrEnum):
    """Where DeepSpeed keeps fp32 master weights and moments, if not on the device."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class Accumulate(StrEnum):
    """How gradients of a step's micro-batches are added: whole, and reduced once, or each reduced into shards."""

    unsharded = "unsharded"
    sharded = "sharded"


class Recompute(StrEnum):
    """What the backward recomputes: nothing, a list of values, or whole layers; each keeps less than the one before."""

    none = "none"
    light = "light"
    selective = "selective"
    full = "full"


VALUES: dict[Recompute, tuple[Value, ...]] = {
    Recompute.none: (),
    Recompute.light: (Value.norms, Value.expert_input),
    Recompute.selective: (Value.norms, Value.expansion, Value.expert_input, Value.ffn_up),
    Recompute.full: (),  # whole layers instead
}  # what each preset computes again


class DispatcherKind(StrEnum):
    """How tokens reach their experts; the key is `parallel.transport`."""

    all_to_all = "all_to_all"
    all_gather = "all_gather"


class ExpertsAfter(StrEnum):
    """Where a layer computes its experts."""

    ffn = "ffn"
    attention = "attention"


@dataclass
class ParallelConfig:
    """Sizes of the mesh axes, and what runs on them.

    The axes multiply to the number of ranks; one of them may be -1, the ranks left over.
    """

    pp: int = 1  # pipeline ranks; each has one stage of layers, or two, by the schedule
    dp: int = 1  # replicas of the sharded model; above 1: hybrid sharding (HSDP)
    fsdp: int = -1  # ranks that read different samples and shard the weights, gradients and moments of one replica
    cp: int = 1  # context parallelism: ranks that share the positions of each sequence
    tp: int = 1  # tensor parallelism: ranks that share heads, FFN columns, vocabulary, and the positions in between
    ep: int = 1  # expert parallelism: ranks that share the experts, taken from fsdp × cp × tp; -1 = all of those
    schedule: Schedule = Schedule.zbv  # of the pipeline: zbv (zero-bubble V), 1f1b, interleaved or dualpipev
    sharding: Sharding = Sharding.fsdp  # fsdp = FSDP2; zero1, zero2, zero3 = DeepSpeed
    # DeepSpeed only: cpu keeps fp32 master weights and moments in host memory (weights too under zero3), nvme in files
    # (zero3 only)
    offload: Offload = Offload.none
    offload_path: str = ""  # folder on a fast disk for offload=nvme
    # what the backward computes again: none; light = norms and the experts' input; selective = also queries, keys and
    # values from their latents, and the dense FFNs' up projections; full = whole layers
    recompute: Recompute = Recompute.none
    # recompute=selective only: the values to compute again, in place of its own: norms, expansion, attention, ffn_gate,
    # ffn_up, expert_input, expert_hidden; the experts' input only with ep=1
    recompute_list: list[Value] = field(default_factory=list)
    compile: bool = False  # fuse norms, SwiGLU, softmax and cross-entropy with torch.compile
    # dispatcher of tokens to experts: all_to_all, or all_gather (with reduce-scatter back)
    transport: DispatcherKind = DispatcherKind.all_to_all
    # false keeps gathered weights until the backward: faster, more memory. A pipeline always keeps them
    reshard_after_forward: bool = True
    # unsharded = add the micro-batches' gradients in float32, then sum them over the ranks once a step; sharded = sum
    # those of each micro-batch into shards: less memory, more communication. FSDP2 without pipeline only
    accumulate: Accumulate = Accumulate.unsharded
    timeout_seconds: float = 600.0  # a rank that blocks the others for longer ends the run

    def validate(self) -> None:
        sizes = {name: getattr(self, name) for name in ("pp", "dp", "fsdp", "cp", "tp", "ep")}
        for name, size in sizes.items():
            if size != -1 and size < 1:
                raise ConfigError(f"parallel.{name}={size} must be at least 1, or -1 for the ranks left over")
        free = [f"parallel.{name}" for name, size in sizes.items() if size == -1 and name != "ep"]
        if len(free) > 1:
            raise ConfigError(f"{' and '.join(free)} are both -1; only one axis can take the ranks left over")
        check_choice("parallel.schedule", self.schedule, Schedule)
        check_choice("parallel.sharding", self.sharding, Sharding)
        check_choice("parallel.offload", self.offload, Offload)
        check_choice("parallel.recompute", self.recompute, Recompute)
        self._validate_values()
        check_choice("parallel.transport", self.transport, DispatcherKind)
        check_choice("parallel.accumulate", self.accumulate, Accumulate)
        if self.accumulate == Accumulate.sharded and self.sharding != Sharding.fsdp:
            raise ConfigError(
                f"parallel.accumulate=sharded needs parallel.sharding=fsdp, not {self.sharding}; change either"
            )
        if self.offload != Offload.none and self.sharding == Sharding.fsdp:
            raise ConfigError(
                f"parallel.offload={self.offload} needs parallel.sharding=zero1, zero2 or zero3; set one of them"
            )
        if not self.timeout_seconds >= 1:
            raise ConfigError(f"parallel.timeout_seconds={self.timeout_seconds} must be at least 1 second")
        check_at_most("parallel.timeout_seconds", self.timeout_seconds, MAX_TIMEOUT, "that is 3 years")

    def _validate_values(self) -> None:
        for value in self.recompute_list:
            check_choice("parallel.recompute_list", value, Value)
        if self.recompute_list and self.recompute != Recompute.selective:
            raise ConfigError(
                f"parallel.recompute_list needs parallel.recompute=selective, not {self.recompute}; set that, or drop "
                f"the list"
            )

    @property
    def recomputed_values(self) -> tuple[Value, ...]:
        """The values that the backward computes again; none under full, which repeats whole layers."""
        return tuple(self.recompute_list) or VALUES[self.recompute]


@dataclass
class OverlapConfig:
    """How expert-parallel and context-parallel communication overlaps with compute."""

    enabled: bool = True  # false makes every collective blocking, for comparison; results are bitwise identical
    # chunks of a micro-batch's tokens; one is sent while experts compute another. auto = 1, 2, 4 or 8 by the rates of
    # links and experts, measured at the start; a deterministic run keeps its checkpoint's number. 1 with parallel.ep=1
    num_chunks: int | str = 1
    # where a layer computes its experts: after its first ffn, or after its second attention
    experts_after: ExpertsAfter = ExpertsAfter.ffn
    # on a GPU, run the experts on a stream of their own; needs parallel.transport=all_to_all
    experts_stream: bool = False

    def validate(self) -> None:
        if self.num_chunks != AUTO:
            if not isinstance(self.num_chunks, int) or isinstance(self.num_chunks, bool):
                raise ConfigError(f"overlap.num_chunks={self.num_chunks} must be a number of chunks, or auto")
            if self.num_chunks < 1:
                raise ConfigError(f"overlap.num_chunks={self.num_chunks} must be at least 1, or auto")
            check_at_most("overlap.num_chunks", self.num_chunks, MAX_CHUNKS)
        check_choice("overlap.experts_after", self.experts_after, ExpertsAfter)
        if self.experts_stream and not self.enabled:
            raise ConfigError(
                "overlap.experts_stream=true has nothing to overlap with under overlap.enabled=false; drop one"
            )

    @property
    def decided_chunks(self) -> int:
        """The number of chunks; 1 for `auto` until the run has decided."""
        return self.num_chunks if isinstance(self.num_chunks, int) else 1
