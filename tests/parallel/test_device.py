"""What a run sets, keeps and refuses of its environment: variables, open files, the GPU of a process."""

from __future__ import annotations

import re
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longcat.errors import ConfigError
from parallel import capacity, environment
from parallel.device import GPU_PEAKS, peak_memory_gib, peaks_of
from parallel.environment import (
    check_determinism,
    check_streams,
    describe_environment,
    files_of_a_rank,
    gpu_defaults,
    prepare_environment,
    raise_descriptor_limit,
)
from parallel.layout import BatchShape
from parallel.mesh import own_gpu, resolve_sizes
from parallel.sizes import MeshSizes
from tests.support.gpus import hide_gpus
from train.compose import compose


@pytest.mark.parametrize(
    ("variable", "value", "on_gpu", "compiled"),
    [
        ("CUBLAS_WORKSPACE_CONFIG", ":0:0", True, False),
        ("CUBLAS_WORKSPACE_CONFIG", "", True, False),
        ("NCCL_ALGO", "NVLS,Ring", True, False),
        ("NCCL_ALGO", "^Tree", True, False),
        ("NCCL_ALGO", "allreduce:tree;reducescatter:nvls", True, False),
        ("OMP_DYNAMIC", "TRUE", False, False),
        ("TORCHINDUCTOR_MAX_AUTOTUNE", "1", False, True),
        ("TORCHINDUCTOR_COORDINATE_DESCENT_TUNING", "1", True, True),
    ],
)
def test_variable_that_breaks_repeats_is_refused(variable: str, value: str, on_gpu: bool, compiled: bool) -> None:
    with pytest.raises(
        ConfigError, match=f"{re.escape(variable)}={re.escape(value)}: .*unset it.*train.deterministic=false"
    ):
        check_determinism({variable: value}, on_gpu, compiled)


@pytest.mark.parametrize(
    ("environment", "on_gpu", "compiled"),
    [
        ({}, True, True),
        ({"CUBLAS_WORKSPACE_CONFIG": ":16:8", "OMP_DYNAMIC": "false"}, True, True),
        *(({"NCCL_ALGO": value}, True, False) for value in ("Ring", "tree", "^NVLS", "allreduce:tree,ring")),
        ({"NCCL_ALGO": "NVLS", "NCCL_NVLS_ENABLE": "0"}, True, False),
        ({"NCCL_ALGO": "NVLS"}, False, False),  # no NCCL on a CPU
        ({"CUBLAS_WORKSPACE_CONFIG": ":0:0"}, False, True),  # no cuBLAS on a CPU
        ({"TORCHINDUCTOR_MAX_AUTOTUNE": "1"}, True, False),  # nothing is compiled
        ({"TORCHINDUCTOR_MAX_AUTOTUNE": "0"}, True, True),
    ],
)
def test_harmless_environment_is_accepted(environment: dict[str, str], on_gpu: bool, compiled: bool) -> None:
    check_determinism(environment, on_gpu, compiled)


def test_gpu_environment_is_set_before_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a driver only; the user's values are kept."""
    monkeypatch.setattr(environment, "DRIVERS", (str(tmp_path / "driver"),))
    without: dict[str, str] = {}
    prepare_environment(without, deterministic=True)
    assert without == {}
    (tmp_path / "driver").touch()
    yours = {"NCCL_ALGO": "Ring", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}
    found = dict(yours)
    prepare_environment(found, deterministic=True)
    assert found == yours | {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
        "TORCH_GLOO_LAZY_INIT": "1",
    }
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    prepare_environment(hidden, deterministic=True)
    assert hidden == {"CUDA_VISIBLE_DEVICES": ""}


def test_determinism_decides_two_variables() -> None:
    only = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "^NVLS,NVLSTree"}
    assert gpu_defaults({}, True).items() - gpu_defaults({}, False).items() == only.items()
    assert gpu_defaults({}, False)["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    check_determinism(gpu_defaults({}, True), on_gpu=True, compiled=False)


def test_header_marks_what_the_user_has_set() -> None:
    said = describe_environment({"NCCL_ALGO": "Ring", "HOME": "/root", "CUDA_DEVICE_MAX_CONNECTIONS": "32"})
    assert said == "CUDA_DEVICE_MAX_CONNECTIONS=32, NCCL_ALGO=Ring (yours)"


def test_one_queue_is_refused_where_streams_were_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"CUDA_DEVICE_MAX_CONNECTIONS=1: .*experts_stream=true has no effect; unset"):
        check_streams({"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, on_gpu=True, experts_stream=True)
    for queues, on_gpu, stream in (("1", True, False), ("8", True, True), ("1", False, True)):
        check_streams({"CUDA_DEVICE_MAX_CONNECTIONS": queues}, on_gpu, stream)


@pytest.mark.parametrize(("local_rank", "visible", "expected"), [(0, 8, 0), (7, 8, 7), (3, 1, 0), (0, 1, 0)])
def test_gpu_of_a_process(local_rank: int, visible: int, expected: int) -> None:
    """Its own of all, or the one that it sees."""
    assert own_gpu(local_rank, visible) == torch.device("cuda", expected)


def test_process_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="local rank 4 has no GPU of its own: this process sees 4"):
        own_gpu(4, 4)


def test_memory_is_that_of_the_ranks_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two different GPUs, the smaller one, does not hold what the first would."""
    config = compose(["model=debug"])
    sizes, batch = resolve_sizes(config.parallel, 1), BatchShape(1, 1, 64)
    memory = {torch.device("cuda", 0): 1 << 40, torch.device("cuda", 1): 1 << 10}
    monkeypatch.setattr(capacity, "count_gpus", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory[torch.device(device)])
    )
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert capacity.check_memory(config.model, config.parallel, sizes, batch, 2)[1] == 1 << 40
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ConfigError, match="its GPU has"):
        capacity.check_memory(config.model, config.parallel, sizes, batch, 2)


def test_gpus_that_torch_cannot_use_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a driver too old for torch, NVML still counts the GPUs."""
    config = compose(["model=debug"])
    sizes = resolve_sizes(config.parallel, 1)
    monkeypatch.setattr(capacity, "count_gpus", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"too old for torch .*CUDA_VISIBLE_DEVICES=''"):
        capacity.check_memory(config.model, config.parallel, sizes, BatchShape(1, 1, 64), 2)


def limits(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int) -> list[tuple[int, int]]:
    """Set limits of open files, for `raise_descriptor_limit`; returns what it sets."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, found: asked.append(found))
    return asked


def test_open_files_are_enough_for_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eagerly connected, two groups of 512 ranks pass a limit of 1,024; connected on demand they never do."""
    world = MeshSizes(pp=1, dp=1, fsdp=512, cp=1, tp=1, ep=8)
    needed = files_of_a_rank(world, 512, on_gpu=True, lazy=False)
    assert needed > 2 * 512
    asked = limits(monkeypatch, 1024, 4096)
    raise_descriptor_limit(world, 512, True, {})
    assert asked == [(needed, 4096)]
    limits(monkeypatch, 1024, 1024)
    with pytest.raises(ConfigError, match=rf"512 needs about {needed} open files, and the limit here is 1024; raise"):
        raise_descriptor_limit(world, 512, True, {})
    large = MeshSizes(pp=1, dp=1, fsdp=8192, cp=1, tp=1, ep=8)
    asked = limits(monkeypatch, 1024, 1024)
    raise_descriptor_limit(large, 8192, True, {"TORCH_GLOO_LAZY_INIT": "1"})
    assert asked == []


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA B300 SXM6 AC", "B300"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100"),
        ("NVIDIA A800-SXM4-80GB", "A800"),
    ],
)
def test_device_names_have_their_own_peaks(name: str, model: str) -> None:
    assert peaks_of(name) == (model, GPU_PEAKS[model])


def test_unknown_devices_are_measured() -> None:
    assert peaks_of("NVIDIA RTX 4000") is None


def test_memory_is_of_the_time_since_the_last_call(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = [3 << 30]
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: peaks[-1])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: peaks.append(1 << 30))
    assert [peak_memory_gib(torch.device("cuda", 0)) for _ in range(2)] == [3.0, 1.0]


@pytest.mark.parametrize(
    ("marks", "hidden"),
    [("", True), ("not long", True), ("not gpu", True), ("gpu", False), ("gpu and not long", False)],
)
def test_gpus_are_hidden_from_tests_of_cpus(marks: str, hidden: bool) -> None:
    environment: dict[str, str] = {}
    hide_gpus(environment, marks)
    assert environment == ({"CUDA_VISIBLE_DEVICES": ""} if hidden else {})
