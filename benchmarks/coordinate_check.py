"""Coordinate check of the width transfer: `python -m benchmarks.coordinate_check` prints a table and draws a picture.

Models of 1 to 8 times a narrow width take ten training steps on data/python_source (`longcat data build` makes it).
Under "plain" every width has the narrow model's hyperparameters; under "Table 1" they are those of
`train.transfer.scaled`. After each step a fixed validation batch goes through the model, and forward hooks record the
RMS of what each kind of module puts out, and the RMS of its change since step 0. The slope of log RMS over log width
says how a scale grows: 0 = not at all, 1 = as the width. Every finished run is kept in ``--runs`` and not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.common import print_table, run_main
from benchmarks.coordinate_picture import draw
from longcat.interfaces import local_tensor
from longcat.json_text import dumps
from longcat.model import LongCat
from train.api import build_session, compose
from train.config import Config
from train.keys.dotted import flatten
from train.run_dir.folder import as_mapping
from train.transfer import PROPORTIONAL, check_scope, scaled

STEPS = 10
FACTORS = (1, 2, 4, 8)  # widths over the narrowest one
ARMS = ("plain", "Table 1")
MODULES = (
    "embedding", "attention", "dense FFN", "MoE", "residual stream", "logits", "router logits", "router scores",
)  # fmt: skip
# A quarter of `debug` with its proportions; initial values near those of the quick start, as √(0.63 / width)
NARROW = [
    "model=debug", "model.hidden_size=32", "model.num_heads=1", "model.q_lora_rank=12", "model.kv_lora_rank=8",
    "model.ffn_hidden_size=64", "model.expert_hidden_size=16", "model.num_mtp_layers=0", "model.hidden_std=0.14",
    "model.embedding_std=0.5", "optim.lr=2e-3", "schedule=constant", "schedule.warmup_steps=0",
]  # fmt: skip
# One micro-batch a step, and one validation batch, which is the probe
RUN = [
    f"train.steps={STEPS}", "train.sequence_length=128", "train.global_batch_size=8", "train.micro_batch_size=8",
    "train.dtype=float32", "validation.batches=1",
]  # fmt: skip
Scales = dict[str, list[float]]  # module → RMS at steps 0 to 10
Runs = dict[tuple[str, int, int], dict[str, Scales]]  # (arm, factor, seed) → "values" and "changes"


def configuration(arm: str, factor: int, seed: int, extra: list[str]) -> Config:
    """The model of ``factor`` times the narrow width, with the narrow one's hyperparameters or those of Table 1."""
    words = [*NARROW, *RUN, *extra, f"train.seed={seed}"]
    narrow = compose(*words)
    grown = ("hidden_size", *PROPORTIONAL)
    words += [f"model.{name}={getattr(narrow.model, name) * factor}" for name in grown]
    if arm == "Table 1":
        values = scaled(flatten(as_mapping(narrow)), factor)
        words += [f"{key}={value.value}" for key, value in values.items()]
    config = compose(*words)
    assert check_scope(as_mapping(narrow), config, {}, []) == factor, "more than the width differs"
    return config


@contextmanager
def recording(model: LongCat) -> Iterator[dict[str, list[Tensor]]]:
    """What the modules of a model in one process put out in the forwards inside, by kind of module; layers in order."""
    found: dict[str, list[Tensor]] = {name: [] for name in MODULES}

    def keep(name: str, output: Tensor) -> None:
        found[name].append(output.detach().float().clone())

    def norm(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        keep("residual stream", inputs[0])
        assert model.lm_head is not None
        # The loss reads the head's weight, not the module: see `LongCat._cross_entropy`
        keep("logits", output.detach() @ local_tensor(model.lm_head.weight).detach().T)

    def router(module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        keep("router scores", output[0])
        logs = output[0].detach().log()  # the logits but for a constant of each token, which changes no score
        keep("router logits", logs - logs.mean(-1, keepdim=True))

    def combine(plain: Any) -> Any:
        def combined(pending: Any) -> Any:
            output, statistics = plain(pending)
            keep("MoE", output)
            return output, statistics

        return combined

    def hook(module: nn.Module | None, name: str) -> None:
        assert module is not None
        handle = module.register_forward_hook(lambda module, inputs, output: keep(name, output))
        stack.callback(handle.remove)

    with ExitStack() as stack:
        hook(model.embed_tokens, "embedding")
        for layer in model.shortcut_layers():
            for attention, ffn in zip(layer.self_attn, layer.mlps, strict=True):
                hook(attention, "attention")
                hook(ffn, "dense FFN")
            stack.callback(layer.mlp.router.register_forward_hook(router).remove)
            stack.enter_context(patch.object(layer.mlp, "combine", combine(layer.mlp.combine)))  # no forward of its own
        assert model.norm is not None
        stack.callback(model.norm.register_forward_hook(norm).remove)
        yield found


def rms(tensors: list[Tensor]) -> float:
    """Root mean square over all elements of all tensors."""
    total = sum(float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2 for tensor in tensors)
    return math.sqrt(total / sum(tensor.numel() for tensor in tensors))


def measure(config: Config) -> dict[str, Scales]:
    """Train ``train.steps`` steps → RMS of values and of changes since step 0 by module, before and after each step."""
    values: Scales = {name: [] for name in MODULES}
    changes: Scales = {name: [] for name in MODULES}
    first: dict[str, list[Tensor]] = {}
    with TemporaryDirectory() as folder:
        config.run.dir, config.data.cache_dir = folder, folder
        with build_session(config) as session:
            for step in range(config.train.steps + 1):
                if step:
                    session.step()
                with recording(session.state.models[0]) as found:
                    session.validate()
                first = first or found
                for name, tensors in found.items():
                    values[name].append(rms(tensors))
                    changes[name].append(rms([now - old for now, old in zip(tensors, first[name], strict=True)]))
    return {"values": values, "changes": changes}


def measure_all(runs: Path, seeds: int, extra: list[str]) -> Runs:
    """Every run, those in the folder ``runs`` read back. At the narrowest width both arms are one run."""
    found: Runs = {}
    for seed in range(1, seeds + 1):
        for factor in FACTORS:
            for arm in ARMS:
                path = runs / f"{arm.replace(' ', '')}-{factor}-{seed}.json"
                if factor == 1 and arm != ARMS[0]:
                    found[arm, factor, seed] = found[ARMS[0], factor, seed]
                    continue
                if not path.is_file():
                    start = time.process_time()
                    result = measure(configuration(arm, factor, seed, extra))
                    print(f"{arm}, {factor} times the width, seed {seed}: {time.process_time() - start:.0f} s of CPU")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(dumps(result))
                found[arm, factor, seed] = json.loads(path.read_text())
    return found


def slope(widths: list[float], scales: list[float]) -> float:
    """Slope of the least-squares line through log scale over log width; NaN where a scale is 0."""
    if min(scales) <= 0:
        return math.nan
    line = statistics.linear_regression([math.log(width) for width in widths], [math.log(each) for each in scales])
    return line.slope


def slopes(found: Runs, arm: str, kind: str, module: str, step: int) -> list[float]:
    """The slope of each seed."""
    seeds = sorted({seed for _, _, seed in found})
    widths = [float(factor) for factor in FACTORS]
    return [slope(widths, [found[arm, factor, seed][kind][module][step] for factor in FACTORS]) for seed in seeds]


def cell(numbers: list[float]) -> str:
    """Mean ± standard deviation over seeds."""
    if len(numbers) < 2:
        return f"{numbers[0]:.2f}"
    mean = round(statistics.mean(numbers), 2) + 0.0  # no −0.00
    return f"{mean:.2f} ± {statistics.stdev(numbers):.2f}".replace("-", "−")


def table(found: Runs) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: slopes of values at steps 0 and 10, and of changes after steps 1 and 10, under both arms."""
    wanted = [("values", 0), ("values", STEPS), ("changes", 1), ("changes", STEPS)]
    names = {"values": "at step", "changes": "change by step"}
    columns = [f"{arm}: {names[kind]} {step}" for arm in ARMS for kind, step in wanted]
    rows = [
        [module, *(cell(slopes(found, arm, kind, module, step)) for arm in ARMS for kind, step in wanted)]
        for module in MODULES
    ]
    return ["module", *columns], rows


def means_by_step(found: Runs) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Arm → values or changes → module → slope at each step, mean over seeds; changes begin with step 1."""
    return {
        arm: {
            kind: {
                module: [
                    round(statistics.mean(slopes(found, arm, kind, module, step)), 3)
                    for step in range(kind == "changes", STEPS + 1)
                ]
                for module in MODULES
            }
            for kind in ("values", "changes")
        }
        for arm in ARMS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/coordinate_check"), help="folder of finished runs")
    parser.add_argument("--picture", type=Path, default=Path("docs/images/coordinate_check.png"))
    parser.add_argument("keys", nargs="*", help="configuration keys of every run, for instance optim.lr=1e-3")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure_all(options.runs, options.seeds, options.keys)
    columns, rows = table(found)
    print_table("Slopes of log RMS over log width, mean ± standard deviation over seeds", columns, rows)
    by_step = means_by_step(found)
    print(json.dumps({"columns": columns, "rows": rows, "slopes by step": by_step}, ensure_ascii=False))
    draw(found, ARMS, FACTORS, MODULES, by_step, options.picture)


if __name__ == "__main__":
    run_main(main)
