"""Training runs for tests: in this process, on two ranks, or as a separate program; and readers of their files."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from longcat.documents import PADDING
from parallel.mesh import Topology, connect
from tests.support.distributed import run_ranks
from tests.support.ports import free_ports
from train.batches import BatchReader
from train.compose import compose
from train.config import Config
from train.process.rank import main
from train.process.stop import SAVE_SIGNAL, STOP_SIGNALS
from train.run import build_state
from train.state import TrainState
from train.step import Stepper

ROOT = Path(__file__).resolve().parents[2]
EXACT = ("loss", "grad_norm", "state_hash")
# One layer with few experts: a step takes some hundredths of a second
NARROW = ["model.num_layers=1", "model.num_experts=4", "model.num_zero_experts=2"]
# A state of some thousand numbers, for tests that check each of them
TINY = [
    "model=debug",
    "model.vocab_size=97",
    "model.num_layers=1",
    "model.hidden_size=12",
    "model.ffn_hidden_size=10",
    "model.expert_hidden_size=6",
    "model.num_experts=3",
    "model.num_zero_experts=2",
    "model.q_lora_rank=8",
    "model.kv_lora_rank=8",
    "train.sequence_length=8",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
    "train.dtype=float32",
]
VOCAB = 512  # tokens of the corpus of the fixtures
SIGNALS = (*STOP_SIGNALS, SAVE_SIGNAL, signal.SIGQUIT)


def train_here(overrides: list[str]) -> int:
    """Train in this process; the run must restore signal handlers and process groups."""
    return run_cleanly(lambda: main(compose(overrides)))


def run_cleanly(action: Callable[[], int]) -> int:
    """Run ``action``, undo the switches of deterministic training, and check that nothing else is left behind."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        return action()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        assert not dist.is_initialized(), "the run left its process group behind"
        assert {number: signal.getsignal(number) for number in SIGNALS} == before, "the run left signal handlers behind"


def _train_all(runs: list[list[str]], ports: list[int]) -> list[int]:
    codes = []
    for overrides, port in zip(runs, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        codes.append(main(compose(overrides)))
    return codes


def train_two(*runs: list[str]) -> list[int]:
    """Train on two ranks, one run after the other in the same two processes; the first rank's exit codes."""
    first, second = run_ranks(_train_all, 2, list(runs), free_ports(len(runs)), timeout=240)
    assert first == second, "ranks ended with different codes"
    return list(first)


@cache
def _uninterrupted(corpus_folder: Path, words: tuple[str, ...]) -> dict[int, dict[str, str]]:
    name = hashlib.sha256(repr(words).encode()).hexdigest()[:12]
    assert train_here([*words, f"run.dir={corpus_folder / 'uninterrupted'}", f"run.name={name}"]) == 0
    return exact(corpus_folder / "uninterrupted" / name)


def uninterrupted(corpus: Path, overrides: list[str]) -> dict[int, dict[str, str]]:
    """The metrics of an uninterrupted run of the same configuration; trained once, in a folder of its own."""
    words = tuple(word for word in overrides if not word.startswith(("run.", "checkpoint.")))
    return _uninterrupted(corpus.parent, words)


def lines(folder: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def exact(folder: Path) -> dict[int, dict[str, str]]:
    """step → the values that a resume must repeat, as text of metrics.jsonl; asserts that each step occurs once."""
    rows = [json.loads(line, parse_float=str) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == list(range(1, len(steps) + 1)), f"steps of metrics.jsonl: {steps}"
    return {row["step"]: {key: row[key] for key in EXACT if key in row} for row in rows}


def exit_json(folder: Path) -> dict[str, Any]:
    """The contents of exit.json."""
    return dict(json.loads((folder / "exit.json").read_text()))


def contents(folder: Path) -> dict[str, str]:
    """Path → hash of every file of a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def program(*words: str) -> subprocess.Popen[str]:
    """Start `python -m words…` in its own process group, with piped output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str]:
    """Wait for a program; returns its exit code and standard error. One that hangs is killed with all its ranks."""
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        raise AssertionError(f"no end within {seconds} s\n{output[-3000:]}\n{errors[-3000:]}") from None
    return process.returncode, errors


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str] | None = None, seconds: float = 120) -> None:
    """Wait until metrics.jsonl holds ``step``; fails if the program ends before."""
    end = time.monotonic() + seconds
    metrics = folder / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_text().count("\n") < step:
        if process is not None and (process.poll() is not None or time.monotonic() > end):
            code, errors = finish(process, 1)
            raise AssertionError(f"ended with {code} before step {step}: {errors[-3000:]}")
        assert time.monotonic() < end, f"no step {step} within {seconds} s"
        time.sleep(0.01)


def ranks_below(agent: int) -> list[int]:
    """Process ids of an agent's ranks, in rank order (Linux)."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (entry / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError, IndexError):
            continue  # no process, or one that has just ended
        rank = next((word for word in environment if word.startswith(b"RANK=")), None)
        if parent == agent and rank is not None:
            found[int(rank.removeprefix(b"RANK="))] = int(entry.name)
    return [pid for _, pid in sorted(found.items())]


class RandomSamples:
    """Sequences of random ids below ``num_ids`` that depend only on the sample's index; id 0 ends documents."""

    num_samples = 64

    def __init__(self, length: int, num_ids: int = 97) -> None:
        self.length, self.num_ids = length, num_ids

    def __getitem__(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(0, self.num_ids, self.length + 1)

    def with_documents(self, index: int) -> np.ndarray:
        ids = self[index]
        return np.stack([ids, numbers_by_end(ids)])


class PaddedSamples(RandomSamples):
    """Samples that end with padding of up to half their length: token ids ``pad``, outside all documents."""

    def __init__(self, length: int, num_ids: int = 97, pad: int = 1) -> None:
        super().__init__(length, num_ids)
        self.pad = pad

    def __getitem__(self, index: int) -> np.ndarray:
        return self.with_documents(index)[0]

    def with_documents(self, index: int) -> np.ndarray:
        ids = super().__getitem__(index)
        numbers, text = numbers_by_end(ids), self.length + 1 - index * 7 % (self.length // 2)
        ids[text:], numbers[text:] = self.pad, PADDING
        return np.stack([ids, numbers])


def numbers_by_end(ids: np.ndarray, eod: int = 0) -> np.ndarray:
    """The number of each token's document in a sample, where documents end with ``eod`` and contain it nowhere else."""
    ends = (ids == eod).astype(np.int64)
    return np.asarray(ends.cumsum(-1) - ends)


def trained_state(overrides: list[str], steps: int) -> tuple[TrainState, Topology, Config]:
    """A state after ``steps`` steps on random tokens, without a run folder; the caller destroys the process group."""
    config = compose(overrides)
    topology = connect(config.parallel)
    state = build_state(config, topology)
    samples: Any = RandomSamples(config.train.sequence_length)
    stepper = Stepper(state, BatchReader(samples, config, topology), config, topology)
    for _ in range(steps):
        assert stepper.step().healthy
    return state, topology, config


def node(name: str, words: list[str]) -> subprocess.Popen[str]:
    """A node runner of this name; SLOW in the environment is a folder whose sitecustomize.py its processes load."""
    path = os.pathsep.join([*filter(None, [os.environ.get("SLOW")]), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "LONGCAT_NODE": name}
    return subprocess.Popen(
        [sys.executable, "-m", "launch", "train", *words],
        env={**environment, "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
