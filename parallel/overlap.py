"""Overlap of communication with computation, as the `overlap` section of the configuration says."""

from __future__ import annotations

from longcat.dispatch import LocalDispatcher
from longcat.interfaces import SequenceModule
from longcat.model import LongCat
from parallel.collectives.streams import StreamContext, stream_context
from parallel.config import ExpertsAfter, OverlapConfig
from parallel.expert.dispatchers import ExpertParallelDispatcher
from parallel.mesh import Topology
from parallel.sequence import ShardedSequence


def apply_overlap(model: LongCat, config: OverlapConfig, topology: Topology) -> None:
    """Let a model's collectives overlap with its computation as configured, in place, after it is parallelised."""
    blocking = StreamContext(blocking=True)
    for layer in model.shortcut_layers():
        moe = layer.mlp
        moe.after_attention = config.experts_after == ExpertsAfter.attention
        if isinstance(moe.dispatcher, ExpertParallelDispatcher):
            streams = stream_context(topology.device, config.experts_stream) if config.enabled else blocking
            moe.dispatcher.streams, moe.expert_stream, moe.num_chunks = streams, streams.experts, config.decided_chunks
        else:
            moe.dispatcher = LocalDispatcher(stream_context(topology.device, False).to_host)
    for module in model.modules():
        if isinstance(module, SequenceModule) and isinstance(module.sequence, ShardedSequence) and not config.enabled:
            module.sequence.streams = blocking


def set_num_chunks(models: list[LongCat], num_chunks: int) -> None:
    """Let the layers of models that exchange rows cut a micro-batch's tokens into ``num_chunks``."""
    for model in models:
        for layer in model.shortcut_layers():
            if isinstance(layer.mlp.dispatcher, ExpertParallelDispatcher):
                layer.mlp.num_chunks = num_chunks
