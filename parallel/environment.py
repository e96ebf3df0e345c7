"""What the machine and its environment variables allow, found out without torch where it can be."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path

from longcat.errors import ConfigError
from longcat.garbage import import_without_collections
from parallel.sizes import MeshSizes

DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/nvhost-gpu")  # NVIDIA's, AMD's, WSL's, Jetson's
HIDDEN = ("", "-1")  # values of CUDA_VISIBLE_DEVICES with which torch sees no GPU


def has_driver(environment: Mapping[str, str]) -> bool:
    """Whether a driver of GPUs is there and the environment does not hide all devices."""
    return environment.get("CUDA_VISIBLE_DEVICES") not in HIDDEN and any(Path(driver).exists() for driver in DRIVERS)


def count_gpus() -> int:
    """The number of GPUs that torch can use, by the driver's management library.

    CUDA does not start, because it reads its environment variables only once. torch is imported only where a driver
    is there and the environment does not hide all devices.
    """
    if not has_driver(os.environ):
        return 0
    with import_without_collections("torch"):
        import torch

    return torch.cuda.device_count()


CUBLAS_WORKSPACE, CUBLAS_WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")  # with which cuBLAS repeats
AUTOTUNING = (  # torch.compile then chooses kernels, and so the order of their sums, by timing them
    "TORCHINDUCTOR_MAX_AUTOTUNE",
    "TORCHINDUCTOR_MAX_AUTOTUNE_GEMM",
    "TORCHINDUCTOR_MAX_AUTOTUNE_POINTWISE",
    "TORCHINDUCTOR_COORDINATE_DESCENT_TUNING",
)


ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # and its name of before
NCCL_ALGO, CONNECTIONS = "NCCL_ALGO", "CUDA_DEVICE_MAX_CONNECTIONS"
GPU_DEFAULTS = {  # set before CUDA starts, which reads them once
    CONNECTIONS: "32",  # hardware queues: with CUDA's 8, kernels of unrelated streams wait for each other
    ALLOCATOR[0]: "expandable_segments:True",  # memory does not fragment where every step has other numbers of rows
    "TORCH_GLOO_LAZY_INIT": "1",  # gloo is for what no step waits for: connect only the pairs of ranks that talk
}
DETERMINISTIC_DEFAULTS = {
    CUBLAS_WORKSPACE: CUBLAS_WORKSPACES[0],
    NCCL_ALGO: "^NVLS,NVLSTree",  # sums inside the switch have no fixed order; trees and rings have one
}


def gpu_defaults(environment: Mapping[str, str], deterministic: bool) -> dict[str, str]:
    """Variables that a run on GPUs sets: those that the user has not."""
    wanted = GPU_DEFAULTS | (DETERMINISTIC_DEFAULTS if deterministic else {})
    if any(name in environment for name in ALLOCATOR):
        del wanted[ALLOCATOR[0]]
    return {name: value for name, value in wanted.items() if name not in environment}


def prepare_environment(environment: MutableMapping[str, str], deterministic: bool) -> None:
    """Set `gpu_defaults` where a driver is there. Ranks that are started later inherit them."""
    if has_driver(environment):
        environment.update(gpu_defaults(environment, deterministic))


def describe_environment(environment: Mapping[str, str]) -> str:
    """The variables of `gpu_defaults` and their values, for people; a value that the user has chosen is marked."""
    ours = GPU_DEFAULTS | DETERMINISTIC_DEFAULTS
    names = dict.fromkeys((*ours, *ALLOCATOR))
    return ", ".join(
        f"{name}={environment[name]}" + ("" if environment[name] == ours.get(name) else " (yours)")
        for name in names
        if name in environment
    )


def uses_switch_sums(environment: Mapping[str, str]) -> bool:
    """Whether NCCL may add inside an NVLink switch (NVLS), by its variables: `ring,tree`, `^nvls`, `allreduce:ring`."""
    if environment.get("NCCL_NVLS_ENABLE") == "0":
        return False
    functions = environment.get(NCCL_ALGO, DETERMINISTIC_DEFAULTS[NCCL_ALGO]).lower().split(";")
    for chosen in functions:
        algorithms = chosen.rpartition(":")[2].strip()
        names = {name.strip() for name in algorithms.removeprefix("^").split(",")}
        if not algorithms or ("nvls" in names) != algorithms.startswith("^"):
            return True
    return False


def check_streams(environment: Mapping[str, str], on_gpu: bool, experts_stream: bool) -> None:
    """Refuse one hardware queue where streams were asked for.

    Raises:
        ConfigError: with the variable and the cure.
    """
    if on_gpu and experts_stream and environment.get(CONNECTIONS) == "1":
        raise ConfigError(
            f"{CONNECTIONS}=1: kernels of two streams then run one after the other, so overlap.experts_stream=true has "
            f"no effect; unset either"
        )


GLOO_FILES, OTHER_FILES = 3, 512  # of a gloo group beside its connections; of a process: data, logs, libraries, NCCL


def files_of_a_rank(sizes: MeshSizes, world_size: int, on_gpu: bool, lazy: bool) -> int:
    """File descriptors that a rank needs at most: gloo connects each pair of ranks of a group, one group an axis.

    On GPUs gloo has the groups of all ranks and of background threads alone. A group whose pairs connect when they talk
    has as many connections as its collectives use, twice the logarithm of its ranks and two in a ring.
    """
    worlds = [world_size] * 2
    shared = sizes.cp * sizes.tp
    dense = sizes.fsdp * sizes.cp
    axes = (*(getattr(sizes, axis) for axis in ("pp", "dp", "fsdp", "cp", "tp", "ep")), sizes.efsdp, sizes.ep)
    groups = worlds if on_gpu else [*worlds, *axes, dense, dense * sizes.tp, shared, shared]
    connections = (min(size, 2 * size.bit_length() + 2) if lazy else size for size in groups)
    return OTHER_FILES + sum(GLOO_FILES + count for count in connections)


def raise_descriptor_limit(sizes: MeshSizes, world_size: int, on_gpu: bool, environment: Mapping[str, str]) -> None:
    """Raise this process's limit of open files as far as the run needs and the system allows.

    Raises:
        ConfigError: the system allows less.
    """
    needed = files_of_a_rank(sizes, world_size, on_gpu, environment.get("TORCH_GLOO_LAZY_INIT") == "1")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"a rank of {world_size} needs about {needed} open files, and the limit here is {hard}; raise it "
            f"(ulimit -n {needed}), or set TORCH_GLOO_LAZY_INIT=1, with which ranks connect when they talk"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def lift_descriptor_limit() -> None:
    """Allow this process as many open files as the system lets it have: a store has connections of every rank."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):  # macOS names a limit that it does not grant
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


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
    if on_gpu and uses_switch_sums(environment):
        raise refuse(
            NCCL_ALGO,
            "NCCL may then add inside an NVLink switch, which does not repeat bit by bit",
            f"unset it, use {DETERMINISTIC_DEFAULTS[NCCL_ALGO]} or Ring",
        )
    if environment.get("OMP_DYNAMIC", "").lower() in ("true", "1"):
        raise refuse("OMP_DYNAMIC", "the number of threads, and so the order of sums, may change", "unset it")
    for name in AUTOTUNING:
        if compiled and environment.get(name, "0") not in ("", "0"):
            raise refuse(
                name, "with parallel.compile kernels are chosen by timing, differently in each run", "unset it"
            )
