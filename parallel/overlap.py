"""Overlap of communication with computation: the `overlap` section of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from longcat.config_choices import check_choice
from longcat.dispatch import LocalDispatcher
from longcat.errors import ConfigError
from longcat.interfaces import SequenceModule
from longcat.model import LongCat
from parallel.collectives.streams import StreamContext, stream_context
from parallel.expert.dispatchers import ExpertParallelDispatcher
from parallel.mesh import Topology
from parallel.sequence import ShardedSequence


class ExpertsAfter(StrEnum):
    """Where a layer computes its experts."""

    ffn = "ffn"
    attention = "attention"


@dataclass
class OverlapConfig:
    """How expert-parallel and context-parallel communication overlaps with compute."""

    enabled: bool = True  # false makes every collective blocking, for comparison; results are bitwise identical
    # chunks of a micro-batch's tokens; one is sent while experts compute another. Always 1 with parallel.ep=1
    num_chunks: int = 1
    # where a layer computes its experts: after its first ffn, or after its second attention
    experts_after: ExpertsAfter = ExpertsAfter.ffn
    # on a GPU, run the experts on a stream of their own; needs parallel.transport=all_to_all
    experts_stream: bool = False

    def validate(self) -> None:
        if self.num_chunks < 1:
            raise ConfigError(f"overlap.num_chunks={self.num_chunks} must be at least 1")
        check_choice("overlap.experts_after", self.experts_after, ExpertsAfter)
        if self.experts_stream and not self.enabled:
            raise ConfigError(
                "overlap.experts_stream=true has nothing to overlap with under overlap.enabled=false; drop one"
            )


def apply_overlap(model: LongCat, config: OverlapConfig, topology: Topology) -> None:
    """Let a model's collectives overlap with its computation as configured, in place, after it is parallelised."""
    blocking = StreamContext(blocking=True)
    for layer in model.shortcut_layers():
        moe = layer.mlp
        moe.after_attention = config.experts_after == ExpertsAfter.attention
        if isinstance(moe.dispatcher, ExpertParallelDispatcher):
            streams = stream_context(topology.device, config.experts_stream) if config.enabled else blocking
            moe.dispatcher.streams, moe.expert_stream, moe.num_chunks = streams, streams.experts, config.num_chunks
        else:
            moe.dispatcher = LocalDispatcher(stream_context(topology.device, False).to_host)
    for module in model.modules():
        if isinstance(module, SequenceModule) and isinstance(module.sequence, ShardedSequence) and not config.enabled:
            module.sequence.streams = blocking
