"""A checkpoint goes from the GPU to the CPU and back: the state's hash stays, and training goes on."""

from __future__ import annotations

import torch

from benchmarks.gpu.part import Row, attempt
from benchmarks.gpu.session import scratch_corpus, train_steps
from benchmarks.gpu.training import STEP


def there(source: str, target: str, overrides: list[str], folder: str) -> list[Row]:
    """Train and save on one device, load on the other."""
    words = [*overrides, *STEP, "model=debug", "train.dtype=float32"]
    name = f"{source}-{target}"
    saved = train_steps(source, [*words, f"run.name={name}"], 2, save=f"{folder}/{name}")
    loaded = train_steps(target, [*words, f"run.name={name}-loaded"], 0, resume=saved["checkpoint"])
    further = train_steps(target, [*words, f"run.name={name}-further"], 1, resume=saved["checkpoint"])
    same = saved["state_hash"] == loaded["state_hash"]
    went_on = further["loss"][0] < 1.5 * saved["loss"][-1]
    return [
        Row(f"saved on {source}, loaded on {target}: state hash", "equal" if same else "differs", "equal", same),
        Row(f"saved on {source}, trained on {target}: loss", f"{further['loss'][0]:.4f}", "as before", went_on),
    ]


def run(device: torch.device) -> list[Row]:
    """Both ways."""
    rows = []
    with scratch_corpus() as (folder, overrides):
        for source, target in {(device.type, "cpu"), ("cpu", device.type)}:
            rows += attempt(f"{source} to {target}", there, source, target, overrides, str(folder))
    return rows
