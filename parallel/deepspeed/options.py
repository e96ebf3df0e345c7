"""What DeepSpeed cannot do with this model, refused before torch is imported."""

from __future__ import annotations

import os
from pathlib import Path

from longcat.errors import ConfigError
from parallel.config import Offload, ParallelConfig, Recompute, Sharding
from parallel.environment import count_gpus
from parallel.sizes import MeshSizes


def check(config: ParallelConfig, sizes: MeshSizes) -> None:
    """Refuse what DeepSpeed cannot do with this model.

    Raises:
        ConfigError: an option that does not work.
    """
    chosen = f"parallel.sharding={config.sharding}"
    for name in ("pp", "tp"):
        if getattr(sizes, name) > 1:
            raise ConfigError(
                f"{chosen} cannot be used with parallel.{name}={getattr(sizes, name)}; set parallel.{name}=1, or "
                f"parallel.sharding=fsdp"
            )
    if config.sharding == Sharding.zero3 and sizes.ep > 1:
        raise ConfigError(
            f"{chosen} cannot be used with parallel.ep={sizes.ep}: DeepSpeed's ZeRO-3 has no expert parallelism; use "
            f"parallel.sharding=zero2, or parallel.ep=1"
        )
    if config.sharding == Sharding.zero3 and config.recompute == Recompute.full:
        raise ConfigError(
            f"{chosen} cannot be used with parallel.recompute=full: ZeRO-3 has released weights that the recomputed "
            f"layers' backward needs; use parallel.recompute=selective, or parallel.sharding=fsdp or zero2"
        )
    if config.offload == Offload.nvme:
        check_nvme(config)


def check_nvme(config: ParallelConfig) -> None:
    """Refuse NVMe offload where it cannot work. Raises ConfigError."""
    if config.sharding != Sharding.zero3:
        raise ConfigError(
            f"parallel.offload=nvme needs parallel.sharding=zero3, not {config.sharding}; use that, or "
            f"parallel.offload=cpu"
        )
    folder = Path(config.offload_path)
    if not config.offload_path or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(
            f"parallel.offload_path={config.offload_path!r} is no folder that can be written; name one on a fast disk "
            f"for parallel.offload=nvme"
        )
    from parallel.deepspeed.setup import quiet_import

    quiet_import("cuda" if count_gpus() else "cpu")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        raise ConfigError(
            "parallel.offload=nvme needs libaio's headers and a C++ compiler: install Debian's libaio-dev and g++, or "
            "use parallel.offload=cpu"
        )
