"""What the device can do: its rate of matrix products, and the memory a process has used."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import time
from pathlib import Path

import torch

from longcat.ops.matmul import cpu_has_amx, cpu_multiplies_bfloat16, product
from parallel.environment import prepare_environment
from parallel.torch_internals import set_deterministic_algorithms

# The makers' data sheets, FLOP/s: dense bfloat16 by tensor cores, and float32 (torch's default is not TF32)
GPU_PEAKS = {
    "GB300": (2.5e15, 80e12),
    "GB200": (2.5e15, 80e12),
    "B300": (2.25e15, 75e12),
    "B200": (2.25e15, 75e12),
    "GH200": (989e12, 67e12),
    "H200 NVL": (835e12, 60e12),
    "H200": (989e12, 67e12),
    "H100 NVL": (835e12, 60e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "H800 PCIe": (756e12, 51e12),
    "H800": (989e12, 67e12),
    "H20": (148e12, 44e12),
    "A100": (312e12, 19.5e12),
    "A800": (312e12, 19.5e12),
}


def peaks_of(name: str) -> tuple[str, tuple[float, float]] | None:
    """The GPU of `GPU_PEAKS` that a device's name, such as `NVIDIA H100 80GB HBM3`, means; the longest that fits."""
    words = name.replace("-", " ").split()
    for model in sorted(GPU_PEAKS, key=len, reverse=True):
        if all(word in words for word in model.split()):
            return model, GPU_PEAKS[model]
    return None


def fastest_dtype() -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32."""
    native = torch.cuda.is_available() or cpu_multiplies_bfloat16()
    return torch.bfloat16 if native else torch.float32


def peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.15) -> tuple[float, str]:
    """FLOP/s of one rank for MFU, and where the figure comes from: a data sheet, or a measured GEMM."""
    if (found := data_sheet_flops(device, dtype)) is not None:
        return found
    size = 8192 if device.type == "cuda" else 1024
    return measured_gemm_rate(device, dtype, seconds, size), f"measured {size}³ GEMM"


def data_sheet_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str] | None:
    """As `peak_flops`, for a device of `GPU_PEAKS`; None for others, which would have to be measured."""
    found = peaks_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if found is None:
        return None
    model, (bfloat16, float32) = found
    return (bfloat16 if dtype is torch.bfloat16 else float32), f"{model} data sheet"


def measured_gemm_rate(device: torch.device, dtype: torch.dtype, seconds: float, size: int) -> float:
    """FLOP/s of the best of some size³ products within about ``seconds``."""
    a = torch.randn(size, size, dtype=dtype, device=device)
    b = torch.randn(size, size, dtype=dtype, device=device)
    best, end = float("inf"), time.perf_counter() + seconds
    product(a, b)
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        product(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process: resident set on a CPU; on a GPU what torch reserved since the last call.

    Reserved memory is what other programs cannot have, and what runs out.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def device_name(device: torch.device) -> str:
    """The device's name for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({os.cpu_count()} cores)"


def arithmetic_of(device: torch.device) -> str:
    """What decides this process's bits: devices of another kind, or more threads, may round otherwise."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    amx = ", AMX" if cpu_has_amx() else ""
    bfloat16 = ", bfloat16 products" if cpu_multiplies_bfloat16() else ""
    code = f"{torch.backends.cpu.get_cpu_capability()}{bfloat16}{amx}, {torch.get_num_threads()} threads"
    return f"{processor_name()}, {code}, torch {torch.__version__}"


def processor_name(path: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model (Linux), or its architecture."""
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's numbers, malloc.h


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next tensors: fresh pages take up to a fifth of a step on a CPU.

    By default glibc maps every tensor of 32 MiB and more anew, and the system zeroes each page first. With this, a
    process keeps its peak memory until it ends. Does nothing where the library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def make_deterministic() -> None:
    """Ask torch for deterministic kernels, without the NaN fill of new tensors that comes with it.

    On a GPU attention's backward then does not split keys among programs that add by atomics, torch never uses cuDNN's
    attention, and it requires a cuBLAS workspace setting, which must be set before the first product.
    """
    prepare_environment(os.environ, deterministic=True)
    set_deterministic_algorithms(True)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 (a property of the module)
