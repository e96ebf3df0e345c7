"""Context extension in small: `python -m benchmarks.context_extension` prints a table and draws a picture.

A model trains on sequences of 256 tokens of data/python_source (`longcat data build` makes it). Then a stage of
`data.stages` of 1,024 tokens begins, with one of: the same rotary positions, a higher RoPE base, YaRN. The loss at
each position of held-out windows of 1,024 tokens is measured before that, right after it (other positions, same
weights), and when the model has trained under it. The arms share the first stage. Every finished arm is kept in
``--runs``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from benchmarks.common import print_table, run_main
from benchmarks.context_picture import draw
from longcat.config import ModelConfig
from longcat.json_text import dumps
from train.api import Session, build_session, compose
from train.config import Config
from train.run import build_data
from train.stages.configs import stage_config

FIRST, LATER = 400, 200  # steps before the border and behind it
SHORT, LONG = 256, 1024  # tokens per sequence
WINDOWS = 64  # held-out ones, at most
BUCKET = 64  # positions whose losses are averaged
ARMS = {
    "unchanged": "",
    "base 5e4": ", rope_theta: 5e4",
    "YaRN, factor 4": f", rope_scaling: {{factor: 4, original_max_position_embeddings: {SHORT}}}",
}
RUN = ["experiment=context_4k", "schedule=constant", "optim.lr=4e-3", "train.dtype=float32", "loss.mtp_weight=0.3"]
Losses = dict[str, list[float]]  # when → nats per token, by bucket of positions


def configuration(name: str, arm: str, seed: int, runs: Path, steps: int, extra: list[str]) -> Config:
    """The run ``name`` of an arm; before the border all arms are the same."""
    start = steps * SHORT * 16
    words = [f"train.seed={seed}", f"run.dir={runs}", f"run.name={name}", *extra]
    stages = f"data.stages=[{{start_tokens: {start}, sequence_length: {LONG}{ARMS[arm]}}}]"
    return compose(*RUN, *words, "train.global_batch_size=16", stages)


@torch.no_grad()
def by_position(session: Session, model: ModelConfig) -> list[float]:
    """Mean loss of held-out windows by position under the rotary positions of ``model``, in nats."""
    samples = build_data(session.config, session.topology)[1].samples.of_length(LONG)
    (part,) = session.state.models
    present = part.config
    part.use_config(model)
    total, count = torch.zeros(LONG, dtype=torch.float64), min(WINDOWS, samples.num_samples)
    for number in range(count):
        window = torch.from_numpy(samples[number])[None]
        valid = torch.ones(1, LONG, dtype=torch.bool)
        total += part(window[:, :-1], window[:, 1:], valid, mtp=False).token_losses[0].double()
    part.use_config(present)
    return [float(one) for one in (total / count).view(-1, BUCKET).mean(1)]


def first_stage(seed: int, runs: Path, steps: int, extra: list[str]) -> Path:
    """The checkpoint on the border, trained if it is not there yet."""
    with build_session(configuration(f"seed{seed}", "unchanged", seed, runs, steps, extra)) as session:
        path = session.resume()
        if path is not None and session.state.counters.step == steps:
            return path
        while session.state.counters.step < steps:
            session.step()
        return session.save()


def measure(arm: str, seed: int, runs: Path, steps: int, later: int, extra: list[str]) -> Losses:
    """Losses before the border, right after it and ``later`` steps after it."""
    border = first_stage(seed, runs, steps, extra)
    config = configuration(f"seed{seed}-{list(ARMS).index(arm)}", arm, seed, runs, steps, extra)
    model = stage_config(config, 1).model
    with build_session(config) as session:
        session.resume(border)
        found = {"before": by_position(session, config.model), "right after": by_position(session, model)}
        for _ in range(later):
            session.step()
        found[f"{later} steps after"] = by_position(session, model)
    return found


def measure_all(runs: Path, seeds: int, steps: int, later: int, extra: list[str]) -> dict[str, list[Losses]]:
    """Arm → the losses of each seed, those in the folder ``runs`` read back."""
    found: dict[str, list[Losses]] = {arm: [] for arm in ARMS}
    for seed in range(1, seeds + 1):
        for number, arm in enumerate(ARMS):
            path = runs / f"arm{number}-seed{seed}-{steps}-{later}.json"
            if not path.is_file():
                start = time.process_time()
                result = measure(arm, seed, runs, steps, later, extra)
                print(f"{arm}, seed {seed}: {time.process_time() - start:.0f} s of CPU", flush=True)
                path.write_text(dumps(result))
            found[arm].append(json.loads(path.read_text()))
    return found


def mean_by_bucket(of_seeds: list[Losses], when: str) -> list[float]:
    """Means over seeds."""
    return [statistics.mean(values) for values in zip(*(one[when] for one in of_seeds), strict=True)]


def table(found: dict[str, list[Losses]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: the mean loss of ranges of positions, over seeds, by arm and time."""
    ranges = [(0, SHORT), (SHORT, 2 * SHORT), (2 * SHORT, LONG)]
    rows = []
    for arm, of_seeds in found.items():
        for when in of_seeds[0]:
            if when == "before" and rows:
                continue  # the arms share it
            losses = mean_by_bucket(of_seeds, when)
            means = [statistics.mean(losses[low // BUCKET : high // BUCKET]) for low, high in ranges]
            rows.append(["all" if when == "before" else arm, when, *(f"{mean:.3f}" for mean in means)])
    return ["arm", "when", *(f"positions {low} to {high - 1}" for low, high in ranges)], rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=FIRST, help="steps before the border")
    parser.add_argument("--later", type=int, default=LATER, help="steps behind it")
    parser.add_argument("--runs", type=Path, default=Path("runs/context_extension"), help="folder of finished arms")
    parser.add_argument("--picture", type=Path, default=Path("docs/images/context_extension.png"))
    parser.add_argument("keys", nargs="*", help="configuration keys of every run, for instance optim.lr=1e-3")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure_all(options.runs, options.seeds, options.steps, options.later, options.keys)
    columns, rows = table(found)
    print_table("Loss in nats per token of held-out windows of 1,024 tokens, means over seeds", columns, rows)
    curves = {arm: {when: mean_by_bucket(each, when) for when in each[0]} for arm, each in found.items()}
    print(json.dumps({"columns": columns, "rows": rows, "by 64 positions": curves}))
    draw(curves, BUCKET, SHORT, options.picture)


if __name__ == "__main__":
    run_main(main)
