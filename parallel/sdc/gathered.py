"""Gathered weights compared with their owners' shards when a layer releases them.

Each rank of a shard group has gathered every owner's shard and used it. Before FSDP2 frees the memory, the rank
takes the checksum of each owner's part, and each owner that of its own shard, as it is gathered. So a fault on the
way, in the copy, or in the memory while the weight is in use is noticed in the same step. An owner's checksum is
computed once per update: its shard does not change in between. All parts of a parameter are read in one batch.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch.distributed.fsdp import FSDPModule

from longcat.faults import Place, is_active, passed
from longcat.model import LongCat
from parallel.checksum import Digest, digest, digests
from parallel.sdc.ledger import LEDGER
from parallel.torch_internals import gathered_parts, on_gather_and_release, owned_shards, parameter_groups_of

CHANNEL = "gathered weight"


class GatheredWeights:
    """Watches FSDP2's units of this rank's models."""

    def __init__(self) -> None:
        self.owned: dict[str, Digest] = {}  # by parameter, of this rank's shard as it is gathered
        self.watched: weakref.WeakSet[Any] = weakref.WeakSet()  # groups of parameters

    def watch(self, model: LongCat) -> None:
        """Compare what the units of a model gather from now on; nothing happens if the model has no units."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                for group in parameter_groups_of(module):
                    if group not in self.watched:
                        self.watched.add(group)
                        on_gather_and_release(group, self._strike, self._release)

    def begin_step(self) -> None:
        """Forget the owners' checksums: an update may have changed the weights."""
        self.owned.clear()

    def _strike(self, group: Any) -> None:
        if not is_active():
            return
        for name, parts in gathered_parts(group):
            for part in parts:
                passed(Place.gathered_weight, name, part)

    def _release(self, group: Any) -> None:
        if not LEDGER.recording:
            return
        ranks = LEDGER.peers(group.mesh_info.shard_process_group, with_self=True)
        for name, parts in gathered_parts(group):
            if name not in self.owned:
                self.owned |= {key: digest(shard) for key, shard in owned_shards(group).items()}
            channel = f"{CHANNEL} {name}"
            number = LEDGER.number(channel)
            LEDGER.put(name, channel, number, ranks, self.owned[name], is_sender=True)
            LEDGER.put(name, channel, number, ranks, digests(parts), is_sender=False)


GATHERED = GatheredWeights()
