"""Some steps of training in a process of its own, on the GPU or with it hidden.

    python -m benchmarks.gpu.session '{"overrides": ["model=debug", ...], "steps": 3}'

`train_steps` starts such processes and gives what they print.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
RESULT = "session result: "
VOCABULARY = 512


@contextmanager
def scratch_corpus() -> Iterator[tuple[Path, list[str]]]:
    """A folder that is deleted in the end, and overrides of runs in it on a small corpus: this project's docs."""
    from train.api import build_corpus, compose

    with tempfile.TemporaryDirectory(prefix="longcat-gpu-") as name:
        folder = Path(name)
        text = folder / "text"
        text.mkdir()
        for number, page in enumerate(sorted((ROOT / "docs").rglob("*.md"))):
            (text / f"{number:03}.txt").write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
        overrides = [
            f"data.source={text}",
            f"data.out={folder / 'corpus'}",
            f"model.vocab_size={VOCABULARY}",
            f"run.dir={folder / 'runs'}",
            "logging.wandb=disabled",
            "schedule.warmup_steps=0",
        ]
        build_corpus(compose(*overrides))
        yield folder, overrides


def train_steps(device: str, overrides: list[str], steps: int, ranks: int = 1, **options: Any) -> dict[str, Any]:
    """Train ``steps`` steps on ``device`` and return what the first rank printed.

    Options: ``resume`` (path of a checkpoint), ``save`` (folder for one), ``profile`` (name the longest operators).

    Raises:
        RuntimeError: a rank failed; the message is the end of its output.
    """
    job = json.dumps({"overrides": overrides, "steps": steps, "shared": ranks > 1, **options})
    environment = environment_of(device, ranks)
    start = partial(subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    command = [sys.executable, "-m", "benchmarks.gpu.session", job]
    processes = [
        start(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else environment)
        for rank in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        if process.returncode:
            print(output)
            raise RuntimeError(output.strip().splitlines()[-1] if output.strip() else f"exit code {process.returncode}")
    lines = [line for line in outputs[0].splitlines() if line.startswith(RESULT)]
    return dict(json.loads(lines[-1].removeprefix(RESULT)))


def environment_of(device: str, ranks: int) -> dict[str, str]:
    """The variables of such processes but for ``RANK``; ranks all see one GPU, the first that this process may use."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif ranks > 1:
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if ranks > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(ranks)}
    return environment


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def gloo_alone() -> Iterator[None]:
    """Let ranks that share a GPU meet: NCCL refuses two ranks on one device."""
    import torch.distributed as dist

    import parallel.mesh

    groups, start = parallel.mesh.mesh_groups_of_members, dist.init_process_group
    with (
        patch.object(parallel.mesh, "mesh_groups_of_members", lambda _, timeout: groups("gloo", timeout)),
        patch.object(parallel.mesh, "_separate_group", lambda mesh, *_: mesh.get_group()),
        patch.object(dist, "init_process_group", lambda _, **options: start("gloo", **options)),
    ):
        yield


def run(overrides: list[str], steps: int, shared: bool, resume: str = "", save: str = "", profile: bool = False) -> Any:
    """Train in this process; returns losses and gradient norms, hash of the state, peak bytes."""
    import torch

    from train.api import build_session, compose

    cuda = torch.cuda.is_available()
    with gloo_alone() if shared and cuda else patch.dict(os.environ), build_session(compose(*overrides)) as session:
        if resume:
            session.resume(Path(resume))
        metrics = [session.step() for _ in range(steps)]
        found: dict[str, Any] = {
            "loss": [one["loss"] for one in metrics],
            "grad_norm": [one["grad_norm"] for one in metrics],
            "state_hash": session.state_hash(),
            "peak": torch.cuda.max_memory_allocated() if cuda else 0,
            "device": session.topology.device.type,
        }
        if profile:
            found["operators"] = longest_operators(session)
        if save:
            found["checkpoint"] = str(session.save(Path(save)))
    return found


def longest_operators(session: Any, count: int = 12) -> list[tuple[str, float, int]]:
    """(name, share of the step's time on the device, calls) of the operators that take longest in a step."""
    import torch
    from torch.profiler import ProfilerActivity

    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities) as profiled:
        session.step()
        if cuda:
            torch.cuda.synchronize()
    name = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(profiled.key_averages(), key=lambda one: -float(getattr(one, name)))
    total = sum(float(getattr(one, name)) for one in events) or 1.0
    return [(one.key, float(getattr(one, name)) / total, int(one.count)) for one in events[:count]]


if __name__ == "__main__":
    print(RESULT + json.dumps(run(**json.loads(sys.argv[1]))), flush=True)
