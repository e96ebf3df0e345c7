"""Does an average of checkpoints stand in for a decay of the learning rate?

For each seed: a run at a constant rate that keeps its checkpoints, the decay from one of them to zero, and averages of
the last ones, all with the same training tokens. Prints validation losses. Stopped, it continues where it was.

    python -m benchmarks.merging [FOLDER]        FOLDER holds the runs (default runs/merging)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.common import print_json, print_table
from train.api import build_session
from train.api import compose as configuration
from train.checkpoint.merge import MergeConfig, merge
from train.process.rank import main as train

SEEDS = (1, 2, 3)
STEPS, EVERY, DECAY = 400, 25, 100  # of a run, between checkpoints, of the decay
WINDOWS = (3, 5, 9)  # checkpoints in an average: the last 50, 100 (the decay's length) and 200 steps
SETTINGS = [
    "experiment=evidence", f"train.steps={STEPS}", "train.sequence_length=128", "train.global_batch_size=8",
    "validation.batches=32", "validation.every=0", "checkpoint.keep=0", "schedule.decay_start=null",
    "schedule.decay_steps=0",
]  # fmt: skip
COLUMNS = ["seed", "constant rate", *(f"average of {count}" for count in WINDOWS), "decay"]


def words(folder: Path, seed: int, kind: str) -> list[str]:
    return [*SETTINGS, f"train.seed={seed}", f"run.dir={folder}", f"run.name={kind}-{seed}"]


def checkpoint(folder: Path, seed: int, kind: str, step: int) -> Path:
    return folder / f"{kind}-{seed}" / "checkpoints" / f"step-{step:08d}"


def run(folder: Path, seed: int, kind: str, overrides: list[str]) -> None:
    """Train, or continue, one run, unless it is complete."""
    if not checkpoint(folder, seed, kind, STEPS).is_dir():
        code = train(configuration(*words(folder, seed, kind), *overrides))
        if code:
            raise SystemExit(code)


def validation_loss(folder: Path, seed: int, path: Path) -> float:
    """Nats per token of a checkpoint on the validation split."""
    with build_session(configuration(*words(folder, seed, "measure"))) as session:
        session.resume(path)
        return session.validate().loss


def measure(folder: Path, seed: int) -> list[float]:
    """Train and average with one seed; the validation losses of `COLUMNS`, from the second on."""
    run(folder, seed, "constant", [f"checkpoint.every={EVERY}"])
    decay = [f"schedule.decay_start={STEPS - DECAY}", f"schedule.decay_steps={DECAY}", "checkpoint.every=0"]
    start = checkpoint(folder, seed, "constant", STEPS - DECAY)
    run(folder, seed, "decay", [*decay, f"checkpoint.resume={start}"])
    paths = [checkpoint(folder, seed, "constant", STEPS)]
    for count in WINDOWS:
        target = folder / f"average-{seed}-of-{count}"
        if not target.is_dir():
            merge(MergeConfig(str(folder / f"constant-{seed}"), str(target), last=count))
        paths.append(target)
    paths.append(checkpoint(folder, seed, "decay", STEPS))
    return [validation_loss(folder, seed, path) for path in paths]


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/merging")
    rows = []
    for seed in SEEDS:
        stored = folder / f"losses-{seed}.json"
        if not stored.is_file():
            losses = measure(folder, seed)
            stored.write_text(json.dumps(losses))
        rows.append([seed, *json.loads(stored.read_text())])
    means = [sum(row[column] for row in rows) / len(rows) for column in range(1, len(COLUMNS))]
    table = [[str(row[0]), *(f"{loss:.4f}" for loss in row[1:])] for row in [*rows, ["mean", *means]]]
    print_table("Validation loss, nats per token", COLUMNS, table)
    print_json("merging", {"columns": COLUMNS, "rows": rows})


if __name__ == "__main__":
    main()
