"""What a rank does or waits for, as data: an event's kind and fields, and the one place that renders them as text."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple, Self


class RankState(StrEnum):
    """What a rank is doing: waiting for other ranks, working, or ending because a collective raised an error."""

    WAITING = "waiting"
    WORKING = "working"
    FAILED = "failed"


class Track(StrEnum):
    """Rows of a profile: compute, and the communication of each part of the model."""

    COMPUTE = "compute"
    DISPATCH = "dispatch"
    COMBINE = "combine"
    GRADIENTS = "gradients"  # FSDP2's collectives, and those over all ranks
    PIPELINE = "pipeline"
    SEQUENCE = "sequence"  # context, sequence and tensor parallelism


class SpanKind(StrEnum):
    """Kinds of events, each with the track and the mesh axis that it belongs to and the phrase for it in messages.

    The values are written to files; ``phrase`` is what a message says, by default the value.
    """

    track: Track
    axis: str  # of the ranks that communicate, "" for all ranks and for work of one rank
    phrase: str

    def __new__(cls, value: str, track: Track = Track.COMPUTE, axis: str = "", phrase: str = "") -> Self:
        kind = str.__new__(cls, value)
        kind._value_, kind.track, kind.axis = value, track, axis
        kind.phrase = phrase or value.replace("_", " ")
        return kind

    @property
    def label(self) -> str:
        """A short phrase for a narrow place, on the kind's own track."""
        return self.phrase.removeprefix("expert ")

    # Collectives of the experts
    EXPERT_COUNTS = "expert_counts", Track.DISPATCH, "ep"
    EXPERT_ROUTING = "expert_routing", Track.DISPATCH, "ep"
    EXPERT_GATES = "expert_gates", Track.DISPATCH, "ep", "expert gates' gradients"
    EXPERT_DISPATCH = "expert_dispatch", Track.DISPATCH, "ep"
    EXPERT_COMBINE = "expert_combine", Track.COMBINE, "ep"
    # of a sequence and a vocabulary that are sharded
    ATTENTION_LATENTS = "attention_latents", Track.SEQUENCE, "cp, tp"
    SEQUENCE_ALL_GATHER = "sequence_all_gather", Track.SEQUENCE, "tp", "sequence all-gather"
    SEQUENCE_REDUCE_SCATTER = "sequence_reduce_scatter", Track.SEQUENCE, "tp", "sequence reduce-scatter"
    BALANCE_COUNTS = "balance_counts", Track.SEQUENCE, "cp, tp", "sum of the balance loss's expert counts"
    VOCABULARY_MAX = "vocabulary_max", Track.SEQUENCE, "tp", "maximum over the vocabulary"
    VOCABULARY_SUM = "vocabulary_sum", Track.SEQUENCE, "tp", "sum over the vocabulary"
    # of FSDP2
    WEIGHT_ALL_GATHER = "weight_all_gather", Track.GRADIENTS, "fsdp", "weight all-gather"
    GRADIENT_REDUCE_SCATTER = "gradient_reduce_scatter", Track.GRADIENTS, "fsdp", "gradient reduce-scatter"
    # of all ranks
    SUM = "sum", Track.GRADIENTS, "", "sum over all ranks"
    MINIMUM = "minimum", Track.GRADIENTS, "", "minimum over all ranks"
    MAXIMUM = "maximum", Track.GRADIENTS, "", "maximum over all ranks"
    BROADCAST = "broadcast", Track.GRADIENTS, "", "broadcast from rank 0"
    ALL_GATHER_OBJECT = "all_gather_object", Track.GRADIENTS, "", "all-gather of objects"
    OUTCOME = "outcome", Track.GRADIENTS  # whether what is named in `of` succeeded on every rank
    DEVICE = "device", Track.COMPUTE, "", "what is queued on the device"
    END_OF_RUN = "end_of_run", Track.GRADIENTS, "", "end of the run"
    MESH_GROUPS = "mesh_groups", Track.GRADIENTS, "", "process groups of the mesh"
    NEW_GROUP = "new_group", Track.GRADIENTS, "", "new process group for checkpoints"
    CHECKPOINT_GATHER = "checkpoint_gather", Track.GRADIENTS, "", "parts of the checkpoint's index"
    CHECKPOINT_READ_ALL = "checkpoint_read_all", Track.GRADIENTS, "", "read of the checkpoint by all ranks"
    UNTRACED = "untraced", Track.GRADIENTS, "", "a collective outside any span"
    # Transfers between pipeline stages
    RECEIVE_HIDDEN_STATES = "receive_hidden_states", Track.PIPELINE, "pp", "hidden states"
    SEND_HIDDEN_STATES = "send_hidden_states", Track.PIPELINE, "pp", "hidden states"
    RECEIVE_GRADIENTS = "receive_gradients", Track.PIPELINE, "pp", "gradients"
    SEND_GRADIENTS = "send_gradients", Track.PIPELINE, "pp", "gradients"
    EMBEDDING_GRADIENTS = "embedding_gradients", Track.PIPELINE, "pp", "gradients of the embedding's other copy"
    STAGE_TRANSFER = "stage_transfer", Track.PIPELINE, "pp", "transfer between stages"

    # Phases of a step
    FORWARD = "forward"
    BACKWARD = "backward"
    INPUT_GRADIENTS = "input_gradients"
    WEIGHT_GRADIENTS = "weight_gradients"
    PIPELINE = "pipeline"
    GRADIENT_NORM = "gradient_norm", Track.COMPUTE, "", "gradient norm and metrics"
    OPTIMIZER = "optimizer"
    CHECKSUMS = "checksums", Track.COMPUTE, "", "checksums of the state"
    # Parts of the model
    EMBEDDING = "embedding"
    ATTENTION = "attention"
    DENSE_FFN = "dense_ffn", Track.COMPUTE, "", "dense FFN"
    NORM = "norm"
    ROUTER = "router"
    EXPERTS = "experts"
    MTP = "mtp", Track.COMPUTE, "", "MTP"
    HEAD = "head", Track.COMPUTE, "", "head and loss"
    SHARDING = "sharding"
    OTHER = "other"
    # Work of a run outside its steps
    VALIDATION = "validation"
    PROFILE = "profile", Track.COMPUTE, "", "writing the profile"
    REPORT = "report", Track.COMPUTE, "", "logs and report"
    CORPUS_INDEX = "corpus_index", Track.COMPUTE, "", "indexing the corpora"
    NGRAM = "ngram", Track.COMPUTE, "", "n-gram baselines"
    CHECKPOINT_SAVE = "checkpoint_save", Track.COMPUTE, "", "saving the checkpoint"
    CHECKPOINT_COPY = "checkpoint_copy", Track.COMPUTE, "", "copying the state for the checkpoint"
    CHECKPOINT_PENDING = "checkpoint_pending", Track.COMPUTE, "", "waiting until the checkpoint is written"
    CHECKPOINT_FINITE = "checkpoint_finite", Track.COMPUTE, "", "checking that the state is finite"
    CHECKPOINT_SPACE = "checkpoint_space", Track.COMPUTE, "", "checking the free disk space"
    CHECKPOINT_MAKE_SPACE = "checkpoint_make_space", Track.COMPUTE, "", "freeing disk space"
    CHECKPOINT_FOLDER = "checkpoint_folder", Track.COMPUTE, "", "creating the checkpoint's folder"
    CHECKPOINT_WRITE = "checkpoint_write", Track.COMPUTE, "", "writing the checkpoint"
    CHECKPOINT_INDEX = "checkpoint_index", Track.COMPUTE, "", "writing the checkpoint's index"
    CHECKPOINT_HASH = "checkpoint_hash", Track.COMPUTE, "", "hashing the checkpoint"
    CHECKPOINT_COMMIT = "checkpoint_commit", Track.COMPUTE, "", "committing the checkpoint"
    CHECKPOINT_PRUNE = "checkpoint_prune", Track.COMPUTE, "", "pruning checkpoints"
    CHECKPOINT_CLEANUP = "checkpoint_cleanup", Track.COMPUTE, "", "removing unfinished checkpoints"
    CHECKPOINT_FIND = "checkpoint_find", Track.COMPUTE, "", "looking for a checkpoint"
    CHECKPOINT_VERIFY = "checkpoint_verify", Track.COMPUTE, "", "verifying a checkpoint"
    CHECKPOINT_READ = "checkpoint_read", Track.COMPUTE, "", "reading the checkpoint"


# How a stage's layers follow the phrase; "in" for all other kinds
_PREPOSITIONS = {
    SpanKind.RECEIVE_HIDDEN_STATES: "into",
    SpanKind.RECEIVE_GRADIENTS: "into",
    SpanKind.SEND_HIDDEN_STATES: "out of",
    SpanKind.SEND_GRADIENTS: "out of",
}
ACTIONS = {  # as schedules of pipelines are written
    SpanKind.FORWARD: "F",
    SpanKind.BACKWARD: "B",
    SpanKind.INPUT_GRADIENTS: "B",
    SpanKind.WEIGHT_GRADIENTS: "W",
}


class Event(NamedTuple):
    """What a span is about. Equal events of two ranks are parts of one collective, if their surroundings are equal."""

    kind: SpanKind
    layer: int | None = None
    sublayer: int | None = None  # which of a shortcut layer's two sub-layers
    micro_batch: int | None = None  # from 1
    layers: tuple[int, int] | None = None  # first and last of a pipeline stage
    module: str | None = None  # `layers.3.self_attn.0`
    of: SpanKind | None = None  # what an OUTCOME is of
    others: tuple[Event, ...] = ()  # further transfers that NCCL made one work of

    @property
    def text(self) -> str:
        """`expert dispatch, layer 3`: what messages, traces and the report say."""
        words = self.kind.phrase
        if self.of is not None:
            words = f"{words} of {self.of.phrase}"
        if self.sublayer is not None:
            words += f" {self.sublayer}"
        if self.micro_batch is not None:
            words += f" of micro-batch {self.micro_batch}"
        if self.layers is not None:
            words += f" {_PREPOSITIONS.get(self.kind, 'in')} {layers_text(self.layers)}"
        if self.layer is not None:
            words += f", {layer_text(self.layer)}"
        if self.module is not None:
            words += f", {self.module}"
        return " and ".join([words, *(other.text for other in self.others)])

    @property
    def action(self) -> str | None:
        """`F2, layers 0 to 1` for a pipeline stage's work on a micro-batch; None for any other event."""
        if self.kind not in ACTIONS or self.micro_batch is None or self.layers is None:
            return None
        return f"{ACTIONS[self.kind]}{self.micro_batch}, {layers_text(self.layers)}"

    def fields(self) -> dict[str, Any]:
        """For JSON: the fields that are set."""
        found = {name: value for name, value in self._asdict().items() if value is not None}
        found["others"] = [other.fields() for other in self.others]
        if not self.others:
            del found["others"]
        return found

    @staticmethod
    def parse(fields: Mapping[str, Any]) -> Event:
        """The event that `fields` wrote; other keys are ignored.

        Raises:
            KeyError, ValueError: it has no kind, or one that is not known here.
        """
        layers, of = fields.get("layers"), fields.get("of")
        return Event(
            SpanKind(fields["kind"]),
            fields.get("layer"),
            fields.get("sublayer"),
            fields.get("micro_batch"),
            None if layers is None else (int(layers[0]), int(layers[1])),
            fields.get("module"),
            None if of is None else SpanKind(of),
            tuple(Event.parse(other) for other in fields.get("others", ())),
        )


def layer_text(layer: int) -> str:
    return f"layer {layer}"


def layers_text(layers: tuple[int, int]) -> str:
    """`layers 0 to 3`, or `layer 4`."""
    first, last = layers
    return layer_text(first) if first == last else f"layers {first} to {last}"
