"""Records a routing problem: the router's scores of a trained checkpoint on real text, for tests/train/test_balance.py.

    python -m tests.train.record_routing RUN_FOLDER

writes recorded_routing.npz beside this file: `scores` [batches, T, N+Z] float16, the softmax scores of one
layer of the run's newest checkpoint on successive training batches. The file in the repository was recorded at step
400 of a `model=debug` run on the default corpus; the test starts from zero biases, so it has to find again what
the run's controller had learned.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from parallel.mesh import connect
from train.checkpoint.find import find_start
from train.checkpoint.load import load
from train.compose import compose
from train.keys.dotted import flatten
from train.run import build_data, build_state
from train.run_dir.folder import read_config

BATCHES, LAYER = 12, "1"
SKIPPED = ("environment", "derived", "run.num_processes", "data.stages")


def main(folder: Path) -> None:
    stored = flatten(read_config(folder))
    overrides = [
        f"{key}={'null' if value is None else value}"
        for key, value in stored.items()
        if not key.startswith(SKIPPED) and value != ""
    ]
    config = compose([word for word in overrides if not word.startswith(("run.", "schedule", "optim"))])
    topology = connect(config.parallel)
    state = build_state(config, topology)
    found, _ = find_start(folder / "checkpoints", "auto")
    assert found is not None, f"{folder} has no checkpoint"
    load(state, found, {**read_config(folder)})
    samples, _ = build_data(config, topology)
    scores: list[np.ndarray] = []
    router = state.models[0].layers[LAYER].mlp.router
    router.register_forward_hook(lambda module, inputs, outputs: scores.append(outputs[0].half().numpy()))
    with torch.no_grad():
        for number in range(BATCHES):
            window = torch.from_numpy(np.stack([samples[4 * number + row] for row in range(4)]))
            tokens, labels = window[:, :-1], window[:, 1:]
            state.models[0](tokens, labels, torch.ones_like(tokens, dtype=torch.bool), mtp=False)
    target = Path(__file__).with_name("recorded_routing.npz")
    np.savez_compressed(target, scores=np.stack(scores), step=state.counters.step)
    print(target, np.stack(scores).shape, target.stat().st_size)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
