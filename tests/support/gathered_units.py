"""A unit of FSDP2 whose weights are gathered, without its other ranks: what the check of gathered weights reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist


def gathered_unit(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> Any:
    """The unit's group of parameters of these whole shapes, by name, on the ranks of the present world."""
    owners = dist.get_world_size()
    parameters = []
    for name, (rows, *shape) in shapes.items():
        whole = torch.randn(rows, *shape, dtype=dtype)
        parameters.append(
            SimpleNamespace(
                all_gather_outputs=[whole.view(-1)],
                fsdp_placement=SimpleNamespace(dim=0),
                padded_sharded_param_size=torch.Size((rows // owners, *shape)),
                param_dtype=None,
                _sharded_param_data=whole[: rows // owners].reshape(-1),
                _param_fqn=name,
            )
        )
    mesh = SimpleNamespace(shard_process_group=dist.group.WORLD, shard_mesh_size=owners)
    return SimpleNamespace(fsdp_params=parameters, mesh_info=mesh)
