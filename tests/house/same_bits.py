"""Whether two checkouts compute the same bits: losses, gradient norms and state hashes of 16 layouts, step by step.

A refactoring changes no number, so run `record` in each checkout on one machine and `compare` the two files:

    PYTHONPATH=. python tests/house/same_bits.py record --corpus data/python/corpus --out /tmp/before
    PYTHONPATH=. python tests/house/same_bits.py compare /tmp/before /tmp/after
    PYTHONPATH=. python tests/house/same_bits.py resume --from /tmp/before --out /tmp/after

`resume` continues copies of the other checkout's run folders, so that its checkpoints and run folders stay readable.
It uses the command line alone, which both checkouts have.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

STEPS, LATER_STEPS = 10, 14
COMPARED = ("step", "loss", "loss_mtp", "loss_balance", "loss_z", "grad_norm", "state_hash", "first_sample")

LAYOUTS = {  # name → (ranks, overrides)
    "one_process": (1, ""),
    "fsdp2": (2, "parallel.fsdp=2"),
    "dp2": (2, "parallel.fsdp=1 parallel.dp=2"),
    "ep2_chunks2_attention_full": (
        2,
        "parallel.ep=2 overlap.num_chunks=2 overlap.experts_after=attention parallel.recompute=full",
    ),
    "ep2_blocking": (2, "parallel.ep=2 overlap.enabled=false"),
    "ep2_all_gather": (2, "parallel.ep=2 parallel.transport=all_gather overlap.num_chunks=2"),
    "ep2_compile": (2, "parallel.ep=2 parallel.compile=true"),
    "ep2_bfloat16": (2, "parallel.ep=2 train.dtype=bfloat16 train.micro_batch_size=2"),
    "tp2_ep2": (2, "parallel.tp=2 parallel.ep=2"),
    "cp2_ep2_documents": (2, "parallel.cp=2 parallel.ep=2 data.mask_documents=true"),
    "pp2_1f1b": (2, "parallel.pp=2 parallel.schedule=1f1b"),
    "pp2_interleaved": (2, "parallel.pp=2 parallel.schedule=interleaved"),
    "pp2_zbv_ep2_selective": (4, "parallel.pp=2 parallel.schedule=zbv parallel.ep=2 parallel.recompute=selective"),
    "pp2_dualpipev": (2, "parallel.pp=2 parallel.schedule=dualpipev"),
    "zero1_ep2": (2, "parallel.sharding=zero1 parallel.ep=2"),
    "zero2_offload": (2, "parallel.sharding=zero2 parallel.offload=cpu"),
    "zero3": (2, "parallel.sharding=zero3 parallel.recompute=selective"),
}


def train(name: str, corpus: str, folder: Path, steps: int) -> None:
    ranks, overrides = LAYOUTS[name]
    words = [
        "model=debug", "model.num_layers=4", "train.dtype=float32", "train.sequence_length=64", "optim.lr=3e-3",
        "train.global_batch_size=8", "schedule.warmup_steps=4", "checkpoint.every=5", "checkpoint.keep=0",
        "logging.hash_every=1", "logging.wandb=disabled", "validation.every=5", "validation.batches=1",
        "validation.documents=0", f"data.paths=['{corpus}']", f"train.steps={steps}", f"run.dir={folder}",
        f"run.name={name}", f"run.num_processes={ranks}", *overrides.split(),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, "-m", "launch", "train", *words], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")


def numbers(folder: Path) -> dict[int, dict[str, object]]:
    """Step → what is compared of it, of a run folder."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: {key: row.get(key) for key in COMPARED} for row in rows}


def compare(before: Path, after: Path, names: list[str]) -> int:
    wrong = 0
    for name in names:
        old, new = numbers(before / name), numbers(after / name)
        bad = sorted(step for step in old.keys() | new.keys() if old.get(step) != new.get(step))
        wrong += bool(bad)
        verdict = f"DIFFERENT from step {bad[0]} on" if bad else "same bits"
        print(f"{name:30} {len(old):3} steps  {verdict}")
    print(f"{len(names) - wrong} of {len(names)} layouts have the same bits")
    return int(wrong > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record", help="train every layout for 10 steps")
    resume = commands.add_parser("resume", help="continue copies of another checkout's runs for 4 more steps")
    versus = commands.add_parser("compare", help="two recordings, number by number")
    for one in (record, resume):
        one.add_argument("--corpus", required=True)
        one.add_argument("--out", type=Path, required=True)
        one.add_argument("--only", nargs="*", default=list(LAYOUTS))
    resume.add_argument("--from", dest="source", type=Path, required=True)
    versus.add_argument("before", type=Path)
    versus.add_argument("after", type=Path)
    versus.add_argument("--only", nargs="*", default=list(LAYOUTS))
    given = parser.parse_args()
    if given.command == "compare":
        return compare(given.before, given.after, given.only)
    for name in given.only:
        if given.command == "resume":
            shutil.copytree(given.source / name, given.out / name)
        train(name, given.corpus, given.out, STEPS if given.command == "record" else LATER_STEPS)
        print(name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
