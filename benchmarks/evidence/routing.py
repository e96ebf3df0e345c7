"""How a finished run's routers spread held-out text over experts: by micro-batch, and from token to token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longcat.errors import ConfigError
from longcat.json_text import dumps
from train.config import Config

if TYPE_CHECKING:
    from longcat.model import LongCat

FILE = "routing.json"  # in the run's folder
MICRO_BATCHES = 32  # of the validation split, the first ones


def measure(config: Config) -> None:
    """Write `FILE` from the last checkpoint of a run that has ended, in the process that trained it.

    ``micro_batch_violation``: the busiest FFN expert's load over the mean, minus 1, in one micro-batch of validation
    text; largest over layers, mean over micro-batches. ``token_spread``: the standard deviation of the number of FFN
    experts between the tokens of a layer, mean over layers. Validation text is that of the first stage.

    Raises:
        ConfigError: the validation split is shorter than a micro-batch.
    """
    import torch

    from train.checkpoint.offline_reader import Checkpoint, load_model
    from train.samples import open_samples

    checkpoint = Checkpoint(config.run.folder)
    model = load_model(checkpoint.model, checkpoint, torch.float32, torch.device("cpu"))
    samples, size = open_samples(config, "validation"), config.train.micro_batch_size
    count = min(MICRO_BATCHES, samples.num_samples // size)
    if not count:
        raise ConfigError(f"the validation split has {samples.num_samples} samples, fewer than a micro-batch of {size}")
    violations, used = [], []
    for first in range(0, count * size, size):
        chosen = chosen_experts(model, np.stack([samples[index][:-1] for index in range(first, first + size)]))
        violations.append(max(violation(layer, config.model.num_experts) for layer in chosen))
        used.append((chosen < config.model.num_experts).sum(-1))
    found = {
        "micro_batch_violation": round(float(np.mean(violations)), 5),
        "token_spread": round(float(np.concatenate(used, axis=1).std(axis=1).mean()), 5),
    }
    (config.run.folder / FILE).write_text(dumps(found) + "\n", encoding="utf-8")


def measured(folder: Path) -> dict[str, float]:
    """What `measure` wrote into a run's folder; empty for a run that did not end well."""
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def violation(chosen: np.ndarray, num_experts: int) -> float:
    """Load of the busiest FFN expert over the mean load, minus 1, of one layer's choices, [tokens, K]."""
    loads = np.bincount(chosen.ravel(), minlength=num_experts)[:num_experts]
    return float(loads.max() / loads.mean() - 1)


def chosen_experts(model: LongCat, ids: np.ndarray) -> np.ndarray:
    """Experts that each token of texts [B, S] chose, int64 [layers, B·S, K]; those from N on are identity experts."""
    import torch

    chosen: list[np.ndarray] = []

    def note(_module: Any, _inputs: Any, output: Any) -> None:
        chosen.append(output[1].numpy())

    hooks = [router.register_forward_hook(note) for router in model.routers()]
    with torch.inference_mode():
        model.logits(torch.from_numpy(ids))
    for hook in hooks:
        hook.remove()
    return np.stack(chosen)
