"""What the machine and its environment variables allow, found out without torch where it can be."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from longcat.errors import ConfigError

DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/nvhost-gpu")  # NVIDIA's, AMD's, WSL's, Jetson's
HIDDEN = ("", "-1")  # values of CUDA_VISIBLE_DEVICES with which torch sees no GPU


def count_gpus() -> int:
    """GPUs that torch can use. torch is imported only where a driver is there and the environment hides no device."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in HIDDEN or not any(Path(driver).exists() for driver in DRIVERS):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


CUBLAS_WORKSPACE, CUBLAS_WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")  # with which cuBLAS repeats
AUTOTUNING = (  # torch.compile then chooses kernels, and so the order of their sums, by timing them
    "TORCHINDUCTOR_MAX_AUTOTUNE",
    "TORCHINDUCTOR_MAX_AUTOTUNE_GEMM",
    "TORCHINDUCTOR_MAX_AUTOTUNE_POINTWISE",
    "TORCHINDUCTOR_COORDINATE_DESCENT_TUNING",
)


def check_determinism(environment: Mapping[str, str], on_gpu: bool, compiled: bool) -> None:
    """Refuse environment variables with which a run does not repeat bit by bit. None is changed silently.

    Raises:
        ConfigError: with the variable, its value and the cure.
    """

    def refuse(name: str, why: str, cure: str) -> ConfigError:
        return ConfigError(f"{name}={environment[name]}: {why}; {cure}, or set train.deterministic=false")

    if on_gpu and environment.get(CUBLAS_WORKSPACE, CUBLAS_WORKSPACES[0]) not in CUBLAS_WORKSPACES:
        choices = " or ".join(CUBLAS_WORKSPACES)
        raise refuse(CUBLAS_WORKSPACE, "cuBLAS does not repeat bit by bit with it", f"unset it or use {choices}")
    if environment.get("OMP_DYNAMIC", "").lower() in ("true", "1"):
        raise refuse("OMP_DYNAMIC", "the number of threads, and so the order of sums, may change", "unset it")
    for name in AUTOTUNING:
        if compiled and environment.get(name, "0") not in ("", "0"):
            raise refuse(
                name, "with parallel.compile kernels are chosen by timing, differently in each run", "unset it"
            )
