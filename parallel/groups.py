"""How a mesh makes its process groups: by their members alone, on GPUs with NCCL alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import device_mesh

from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import wait_span


@contextmanager
def mesh_groups_of_members(backend: str | None, timeout: timedelta | None = None) -> Iterator[None]:
    """Meshes made inside create a group by its members alone, with one backend of the default group's.

    A mesh has every rank call `new_group` for every group of every axis, 8,192 times for an axis of one rank, and gives
    each a gloo full mesh too where the default group has gloo. No public argument changes either. For the watchdog
    each group is a wait of its own. The default group must not be bound to a device (`device_id`): torch would then
    split its communicator, in which all ranks have to take part.

    Args:
        backend: such as `nccl`; None for the default group's.
        timeout: of making them and of their collectives; None for torch's, half an hour with gloo.
    """
    plain_new = device_mesh.new_group

    def new_group(ranks: list[int], **options: Any) -> Any:
        if dist.get_rank() not in ranks:
            return dist.GroupMember.NON_GROUP_MEMBER
        chosen = {**options, "backend": options.get("backend") or backend, "use_local_synchronization": True}
        chosen["timeout"] = options.get("timeout") or timeout
        with wait_span(Event(SpanKind.MESH_GROUPS)):
            return plain_new(ranks=ranks, **chosen)

    setattr(device_mesh, "new_group", new_group)  # noqa: B010 (no attributes for mypy)
    try:
        yield
    finally:
        setattr(device_mesh, "new_group", plain_new)  # noqa: B010
