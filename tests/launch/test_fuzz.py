"""Random configurations end as documented: no traceback, no hang, no exit code 1; in this process and on two ranks."""

from __future__ import annotations

import collections
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launch.__main__ import main as longcat
from longcat.errors import BAD_INPUT, OK, STOPPED, UNHEALTHY, ConfigError
from tests.support.distributed import run_ranks
from tests.support.fuzz import Case, cases, is_quick
from tests.support.ports import free_ports
from tests.support.running import run_cleanly
from train.__main__ import main as rank_main
from train.check import check_sizes
from train.compose import compose
from train.config import Config

COUNT, PARTS, SEED = 2000, 20, 20_261_128
PAIRS, PAIR_PARTS = 200, 8
HANG_SECONDS = 120
DOCUMENTED = (OK, BAD_INPUT, STOPPED, UNHEALTHY)
LAYOUT_KEYS = [
    "parallel.pp", "parallel.dp", "parallel.fsdp", "parallel.cp", "parallel.tp", "parallel.ep", "parallel.schedule",
    "parallel.sharding", "parallel.recompute", "parallel.transport", "parallel.reshard_after_forward",
    "overlap.enabled", "overlap.num_chunks", "overlap.experts_after", "train.micro_batch_size",
    "train.global_batch_size", "train.sequence_length", "model.num_layers", "model.num_heads", "model.num_experts",
    "model.num_zero_experts", "model.top_k", "model.num_mtp_layers", "balance.num_groups", "data.mask_documents",
    "validation.every", "checkpoint.asynchronous",
]  # fmt: skip


@pytest.fixture
def base(corpus: Path) -> list[str]:
    """Two steps of a narrow model, with validation and a checkpoint."""
    return [
        "model=debug", "model.vocab_size=512", "model.hidden_size=32", "model.ffn_hidden_size=48",
        "model.expert_hidden_size=16", f"data.paths=[{corpus}]", "train.steps=2", "train.sequence_length=32",
        "train.global_batch_size=4", "train.micro_batch_size=2", "validation.every=2", "validation.batches=1",
        "validation.documents=1", "logging.wandb=disabled", "parallel.timeout_seconds=60", "run.dir=runs",
    ]  # fmt: skip


@contextmanager
def at_most(seconds: int, what: object) -> Iterator[None]:
    """Fail if the block takes longer."""

    def late(number: int, frame: Any) -> None:
        raise AssertionError(f"no end within {seconds} s: {what}")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def checked(words: list[str]) -> Config | None:
    """The configuration, None where it is refused in one line; any other error is a failure of the test."""
    try:
        config = compose(words)
        check_sizes(config, 1)
        return config
    except ConfigError as error:
        assert str(error) and "\n" not in str(error), f"{words}: {error!r}"
        return None


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_random_configurations_end_as_documented(
    part: int, base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Code 0, 3 or 4, or code 2 with one line. Runs that would take minutes are composed and checked only."""
    monkeypatch.chdir(tmp_path)
    ended: collections.Counter[object] = collections.Counter()
    for case in cases(COUNT // PARTS, SEED + part):
        words = [*base, f"run.name=r{case.number}", *case.words]
        with at_most(HANG_SECONDS, case.words):
            config = checked(words)
            if config is None:
                ended[BAD_INPUT] += 1
            elif not is_quick(config):
                ended["not started"] += 1
            else:
                ended[run_in_one_process(words, case, capfd)] += 1
    print(f"seed {SEED + part}: {dict(ended)}")
    assert ended[OK] >= COUNT // PARTS // 5, "too few of the configurations train for this test to mean anything"


def run_in_one_process(words: list[str], case: Case, capfd: pytest.CaptureFixture[str]) -> int:
    """The run's exit code, which is a documented one."""
    capfd.readouterr()
    try:
        code = run_cleanly(lambda: longcat(["train", *words]))
    except BaseException as error:
        raise AssertionError(f"{case.words} of case {case.number} raised {type(error).__name__}: {error}") from error
    errors = capfd.readouterr().err
    assert code in DOCUMENTED, f"{case.words}: code {code}\n{errors}"
    assert "Traceback" not in errors, f"{case.words}:\n{errors}"
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(said) == (code in (BAD_INPUT, UNHEALTHY)), f"{case.words}: code {code}\n{errors}"
    return code


def _run_pairs(runs: list[list[str]], ports: list[int], folder: str) -> list[int]:
    import train.run_dir.folder

    train.run_dir.folder.FIRST_RANK_PRINTS_SECONDS = 0.0  # no agent ends the second rank
    os.chdir(folder)
    codes = []
    for words, port in zip(runs, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        codes.append(rank_main(words))
    return codes


@pytest.mark.long
@pytest.mark.parametrize("part", range(PAIR_PARTS))
def test_random_layouts_end_as_documented_on_two_ranks(part: int, base: list[str], tmp_path: Path) -> None:
    drawn = cases(PAIRS // PAIR_PARTS, SEED - 1 - part, LAYOUT_KEYS)
    runs = [[*base, f"run.name=r{case.number}", *case.words] for case in drawn]
    ports = free_ports(len(runs))
    first, second = run_ranks(_run_pairs, 2, runs, ports, str(tmp_path), timeout=HANG_SECONDS + 20 * len(runs))
    print(f"seed {SEED - 1 - part}: {dict(collections.Counter(first))}")
    assert first == second, "ranks ended with different codes"
    wrong = [(case.words, code) for case, code in zip(drawn, first, strict=True) if code not in DOCUMENTED]
    assert not wrong
    assert first.count(OK) >= 2, "too few of the layouts train for this test to mean anything"
