"""Ranks that die, stop or sleep: the others end in time and say which rank, which exchange, which layer."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from launch.__main__ import main as longcat
from parallel import watch
from parallel.crumbs import TRAIL, state
from tests.train.conftest import corpus, overrides  # noqa: F401  (fixtures)
from tests.train.running import NARROW, ROOT, ended, free_ports, ranks_below, tidily, wait_for_step

TIMEOUT = 4.0
AFTERWARDS = 8.0  # seconds; 2.5 to 4 on idle cores: silence takes 2.5 beats to be certain, and cores are shared


@contextmanager
def ranks_of_a_run(
    words: list[str], world_size: int, wrong: tuple[int, str], meeting: Path
) -> Iterator[list[subprocess.Popen[str]]]:
    """Ranks without an agent, one of which misbehaves in step 3 before the second layer's forward."""
    port = free_ports(1)[0]
    meeting.mkdir()
    fault = [*map(str, wrong), "3", "1", str(TIMEOUT), str(meeting)]
    command = [sys.executable, "-m", "tests.parallel.misbehave", *fault, *words]
    common = {"WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    common |= {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": ROOT}
    ranks = []
    for rank in range(world_size):
        own = {key: str(value) for key, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
        log = (meeting / f"{rank}.log").open("w")
        ranks.append(subprocess.Popen(command, cwd=ROOT, env={**os.environ, **own}, stdout=log, stderr=log, text=True))
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def outcome(
    words: list[str], world_size: int, wrong: tuple[int, str], folder: Path
) -> tuple[str, float, list[int | None], str]:
    """(exit.json's message, seconds from the fault to the last end, exit codes, what all ranks printed)."""
    meeting = folder / "meeting"
    words = [*words, "train.steps=100000", "logging.hash_every=0", "parallel.timeout_seconds=120"]
    with ranks_of_a_run(words, world_size, wrong, meeting) as ranks:
        end = time.monotonic() + 240
        while not (meeting / "acted").exists():
            assert time.monotonic() < end and any(rank.poll() is None for rank in ranks), printed(meeting)
            time.sleep(0.05)
        start = time.monotonic()
        for process in ranks:
            try:
                process.wait(TIMEOUT + AFTERWARDS - (time.monotonic() - start))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"a rank goes on\n{printed(meeting)}") from None
        seconds = time.monotonic() - start
        found = ended(folder / "run")
    assert found["code"] == 1
    return found["message"], seconds, [rank.returncode for rank in ranks], printed(meeting)


def printed(meeting: Path) -> str:
    return "\n".join(log.read_text()[-3000:] for log in sorted(meeting.glob("*.log")))


# FSDP2 gathers the second layer's weights next, or its router's where the router is a unit of its own
NEXT = r'"gathered weights, layers\.1[.a-z]*" \(fsdp\) of forward of micro-batch 1'


@pytest.mark.parametrize(
    "world_size,rank,action,says",
    [
        (2, 1, "dies", "is gone"),
        (3, 0, "dies", "is gone .*; rank 0, which keeps the ranks' signs, does not answer"),
        (3, 1, "stops", "has stopped answering"),
        (2, 0, "stops", "has stopped answering .*; rank 0, which keeps the ranks' signs, does not answer"),
        (3, 2, "sleeps", r'has not come to it .*"forward of micro-batch 1" after "gathered weights, layers\.1"'),
    ],
    ids=lambda value: str(value).partition(" ")[0],
)
def test_the_others_end_in_time_and_name_the_rank(
    world_size: int,
    rank: int,
    action: str,
    says: str,
    overrides: list[str],  # noqa: F811
    tmp_path: Path,
) -> None:
    words = [*overrides, "train.global_batch_size=12"]
    message, seconds, codes, output = outcome(words, world_size, (rank, action), tmp_path)
    place = rf"(could not finish step 3's|has waited \d+ s in step 3 for) {NEXT}"
    assert re.match(rf"rank (?!{rank})\d {place}: rank {rank} \(process \d+ on .*\) {says}", message), message
    assert output.count(f"error: {message}") == 1, output
    assert all(code == 1 for number, code in enumerate(codes) if number != rank), codes
    assert codes[rank] == (1 if action == "sleeps" else -signal.SIGKILL)
    print(f"{world_size} ranks, rank {rank} {action}: all ended after {seconds:.1f} s: {message}")


def test_the_agent_ends_soon_when_a_rank_stops(
    overrides: list[str],  # noqa: F811
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """`longcat train` on two ranks, one stopped: no waiting for the hour that saving may take."""
    folder, stopped = tmp_path / "run", []

    def stop() -> None:
        wait_for_step(folder, 2)
        os.kill(ranks_below(os.getpid())[1], signal.SIGSTOP)
        stopped.append(time.monotonic())

    other = threading.Thread(target=stop)
    other.start()
    words = [*overrides, *NARROW, "train.steps=100000", "run.num_processes=2", "parallel.timeout_seconds=20"]
    code = tidily(lambda: longcat(["train", *words]))
    seconds = time.monotonic() - stopped[0]
    other.join()
    errors = capfd.readouterr().err
    assert code == 1 and seconds < 20 + AFTERWARDS, (code, seconds, errors)
    assert errors.count("rank 1 (process") == 1 and "has stopped answering" in errors, errors
    assert errors.count("error: ") == 1, errors
    assert json.loads((folder / "exit.json").read_text())["message"] in errors


def test_crumbs_nest_and_an_error_leaves_the_innermost() -> None:
    TRAIL.clear()
    with watch.phase("forward of micro-batch 1"), watch.crumb("expert dispatch, layer 3", "ep"):
        assert state()[:4] == ("waits", "expert dispatch, layer 3", "ep", "forward of micro-batch 1")
    assert state()[:2] == ("works", "") and TRAIL.before == "expert dispatch, layer 3" and TRAIL.sequence == 2
    with pytest.raises(ValueError), watch.phase("backward"), watch.crumb("expert combine, layer 3"):
        raise ValueError
    assert state()[:4] == ("failed", "expert combine, layer 3", "", "backward")
    watch.begin_step(2)
    assert state()[0] == "works", "who goes on has dealt with it"
    TRAIL.clear()


def test_one_process_keeps_no_watch(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        before = threading.active_count()
        watch.start(1.0, lambda message: None, tmp_path)
        assert threading.active_count() == before
        assert watch.explain(RuntimeError("Connection closed by peer")) is None
    finally:
        watch.stop()
        torch.distributed.destroy_process_group()
