"""Ranks that die, stop, sleep or mismatch: all end in time and name the rank, the collective and the layer."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch.__main__ import main as longcat
from parallel.watchdog import watchdog
from parallel.watchdog.diagnosis import Diagnosis, HangCause
from parallel.watchdog.errors import causes, is_lost_rank
from parallel.watchdog.events import Event, RankState, SpanKind
from parallel.watchdog.heartbeats import Announcement, HeartbeatStore
from parallel.watchdog.spans import SPANS, begin_step, status, wait_span, work_span
from parallel.watchdog.timing import Timing
from parallel.watchdog.watchdog import Watchdog
from tests.parallel.watchdog.misbehave import Fault, rank_main
from tests.support.distributed import rank_context
from tests.support.fixtures import corpus, overrides  # noqa: F401  (fixtures)
from tests.support.ports import free_port
from tests.support.running import NARROW, exit_json, ranks_below, run_cleanly, wait_for_step

# Seconds allowed for pauses of the machine
STALL = float(os.environ.get("LONGCAT_STALL", "0"))
LOST = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:554] Connection closed by peer [127.0.0.1]:52367"
AT_MOST = 30.0  # seconds beyond the timeout before the test fails and prints the logs


@contextmanager
def ranks_of_a_run(
    words: list[str], world_size: int, wrong: tuple[int, str], timeout: float, meeting: Path
) -> Iterator[list[BaseProcess]]:
    """Ranks without an agent, one of which misbehaves in step 3 before the second layer's forward."""
    port, environment = free_port(), dict(os.environ)
    meeting.mkdir()
    fault = Fault(*wrong, timeout, meeting)
    ranks: list[BaseProcess] = [
        rank_context().Process(target=rank_main, args=(rank, world_size, port, fault, words, environment))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.join()


def ended(ranks: list[BaseProcess], seconds: float, meeting: Path) -> list[int | None]:
    """Wait for all ranks; their exit codes, negative for a signal."""
    for process in ranks:
        process.join(seconds)
        assert process.exitcode is not None, f"a rank did not end\n{printed(meeting)}"
    return [process.exitcode for process in ranks]


def outcome(
    words: list[str], world_size: int, wrong: tuple[int, str], timeout: float, folder: Path
) -> tuple[str, float, list[int | None], str]:
    """(exit.json's message, seconds from the fault to the last exit, exit codes, output of all ranks)."""
    meeting = folder / "meeting"
    words = [*words, "train.steps=100000", "logging.hash_every=0", "parallel.timeout_seconds=120"]
    with ranks_of_a_run(words, world_size, wrong, timeout, meeting) as ranks:
        end = time.monotonic() + 240
        while not (meeting / "acted").exists():
            assert time.monotonic() < end and any(rank.is_alive() for rank in ranks), printed(meeting)
            time.sleep(0.05)
        start = float((meeting / "acted").read_text())  # one clock for all processes of a machine
        codes = ended(ranks, timeout + AT_MOST, meeting)
        seconds = time.monotonic() - start
        found = exit_json(folder / "run")
    assert found["code"] == 1
    return found["message"], seconds, codes, printed(meeting)


def printed(meeting: Path) -> str:
    return "\n".join(log.read_text()[-3000:] for log in sorted(meeting.glob("*.log")))


# The MTP layer's weights are in flight while the last layer computes; those of its backward are the next to start. A
# rank that ends early may not have sent what was in flight
NEXT = r'"weight all-gather, (layers\.1|mtp\.layers\.0)[.a-z]*" \(fsdp\) during (forward|backward) of micro-batch 1'


DEAD = "has died"
UNRESPONSIVE = "has stopped answering"
STORE = ".*; rank 0, which holds the heartbeat store, does not answer"
ASLEEP = r'has not reached it .*"forward of micro-batch 1" after "weight all-gather, layers\.1"'
# If the rank itself diagnoses first, it says where the others are
ELSEWHERE = (
    r'has not reached it: it waits at step 3, "sum over all ranks" during forward of micro-batch 1'
    rf"(, while rank \d \(process \d+ on .*\) waits at step 3, {NEXT})?; raise"
)


@pytest.mark.alone
@pytest.mark.parametrize(
    "timeout,world_size,rank,action,says",
    [
        pytest.param(4, 2, 1, "dies", DEAD, marks=pytest.mark.long),
        (4, 3, 0, "dies", DEAD + " " + STORE),
        (4, 3, 1, "stops", UNRESPONSIVE),
        pytest.param(4, 2, 0, "stops", UNRESPONSIVE + " " + STORE, marks=pytest.mark.long),
        (4, 3, 2, "sleeps", ASLEEP),
        (4, 3, 1, "differs", ELSEWHERE),
        pytest.param(10, 2, 1, "dies", DEAD, marks=pytest.mark.long),
        pytest.param(10, 2, 1, "stops", UNRESPONSIVE, marks=pytest.mark.long),
        pytest.param(10, 2, 1, "sleeps", ASLEEP, marks=pytest.mark.long),
        pytest.param(10, 3, 1, "differs", ELSEWHERE, marks=pytest.mark.long),
    ],
    ids=lambda value: str(value).partition(" ")[0],
)
def test_run_ends_within_its_timeout_and_names_the_rank(
    timeout: float,
    world_size: int,
    rank: int,
    action: str,
    says: str,
    overrides: list[str],  # noqa: F811
    tmp_path: Path,
) -> None:
    """From the moment that a rank goes wrong to the end of the last process.

    How a timeout is divided follows from its length alone (`test_checks_begin_early_enough_to_end_in_time`), so one of
    10 s is a long test.
    """
    words = [*overrides, "train.global_batch_size=12"]
    message, seconds, codes, output = outcome(words, world_size, (rank, action), timeout, tmp_path)
    print(f"{world_size} ranks, rank {rank} {action}: all ended after {seconds:.2f} of {timeout} s: {message}")
    place = rf"(failed in step 3 in|has waited \d+ s in step 3 for) {NEXT}"
    assert re.match(rf"rank (?!{rank})\d {place}: rank {rank} \(process \d+ on .*\) {says}", message), message
    assert output.count(f"error: {message}") == 1, output
    assert all(code == 1 for number, code in enumerate(codes) if number != rank), codes
    assert codes[rank] == (1 if action in ("sleeps", "differs") else -signal.SIGKILL)
    assert seconds < timeout + STALL, message


@pytest.mark.alone
@pytest.mark.parametrize("action", ["sleeps", pytest.param("stops", marks=pytest.mark.long), "dies"])
def test_pipeline_stage_is_named_with_its_layers(
    action: str,
    overrides: list[str],  # noqa: F811
    tmp_path: Path,
) -> None:
    """The second stage hangs in its second micro-batch; the first waits for the gradients of its first."""
    words = [*overrides, "parallel.pp=2", "parallel.schedule=1f1b"]
    message, seconds, _, _ = outcome(words, 2, (1, action), 4, tmp_path)
    print(f"pp2, rank 1 {action}: all ended after {seconds:.2f} of 4 s: {message}")
    waits = (
        r'"(gradients of micro-batch \d into|hidden states of micro-batch \d out of) layer 0" \(pp\) during pipeline'
    )
    place = rf"(failed in step 3 in|has waited \d+ s in step 3 for) {waits}"
    assert re.match(rf"rank 0 {place}: rank 1 \(process", message), message
    says = {
        "stops": UNRESPONSIVE,
        "dies": DEAD,
        "sleeps": r'has not reached it .* "forward of micro-batch 2 in layer 1"',
    }[action]
    assert re.search(says, message), message
    assert seconds < 4 + STALL, message


@pytest.mark.alone
@pytest.mark.parametrize("asynchronous", ["true", pytest.param("false", marks=pytest.mark.long)])
def test_slow_disk_ends_no_run_before_the_slow_timeout(
    asynchronous: str,
    overrides: list[str],  # noqa: F811
    tmp_path: Path,
) -> None:
    """A disk that takes two timeouts per shard is waited for; one that takes twenty ends the run after six.

    Also in the background, where the run waits for it at its end.
    """
    timeout, words = 1.0, [*overrides, "train.global_batch_size=8", "train.steps=3", "parallel.timeout_seconds=120"]
    words.append(f"checkpoint.asynchronous={asynchronous}")
    with ranks_of_a_run(words, 2, (1, "saves slowly"), timeout, tmp_path / "meeting") as ranks:
        codes = ended(ranks, 120, tmp_path / "meeting")
    assert codes == [0, 0], printed(tmp_path / "meeting")
    assert exit_json(tmp_path / "run")["message"] == "done"
    assert (tmp_path / "run" / "checkpoints" / "step-00000003" / "manifest.json").is_file()

    words = [*words, "run.name=never"]
    with ranks_of_a_run(words, 2, (1, "hardly saves"), timeout, tmp_path / "again") as ranks:
        codes = ended(ranks, 120, tmp_path / "again")
    message = exit_json(tmp_path / "never")["message"]
    assert codes == [1, 1], printed(tmp_path / "again")
    assert re.match(r"rank 0 has waited [56] s in step 3 for \"outcome of writing the checkpoint", message), message
    assert re.search(r'rank 1 .* at step 3, "writing the checkpoint"', message), message


@pytest.mark.alone
def test_launcher_ends_soon_after_a_rank_stops(
    overrides: list[str],  # noqa: F811
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """`longcat train` on two ranks, one suspended: the launcher does not wait for the hour that saving may take."""
    folder, stopped = tmp_path / "run", []

    def stop() -> None:
        wait_for_step(folder, 2)
        os.kill(ranks_below(os.getpid())[1], signal.SIGSTOP)
        stopped.append(time.monotonic())

    other = threading.Thread(target=stop)
    other.start()
    words = [*overrides, *NARROW, "train.steps=100000", "run.num_processes=2", "parallel.timeout_seconds=20"]
    code = run_cleanly(lambda: longcat(["train", *words]))
    seconds = time.monotonic() - stopped[0]
    other.join()
    errors = capfd.readouterr().err
    assert code == 1 and seconds < 20 + AT_MOST, f"{code} after {seconds} s: {errors}"
    assert errors.count("rank 1 (process") == 1 and "has stopped answering" in errors, errors
    assert errors.count("error: ") == 1, errors
    assert json.loads((folder / "exit.json").read_text())["message"] in errors


def test_spans_nest_and_an_error_keeps_the_innermost() -> None:
    SPANS.clear()
    forward, dispatch = Event(SpanKind.FORWARD, micro_batch=1), Event(SpanKind.EXPERT_DISPATCH, layer=3)
    with work_span(forward), wait_span(dispatch, [0, 1]):
        assert status()[:3] == (RankState.WAITING, dispatch, forward) and status().group == [0, 1]
    assert status()[:2] == (RankState.WORKING, None) and SPANS.last_wait == dispatch and SPANS.sequence == 2
    with pytest.raises(ValueError), work_span(forward), wait_span(dispatch):
        raise ValueError
    assert status()[:3] == (RankState.FAILED, dispatch, forward)
    begin_step(2)
    assert status().state == RankState.WORKING, "a run that continues has handled the error"
    SPANS.clear()


@pytest.mark.parametrize("timeout", [0.5, 1, 4, 10, 60, 600])
@pytest.mark.parametrize("world_size", [2, 8192])
def test_checks_begin_early_enough_to_end_in_time(timeout: float, world_size: int) -> None:
    timing = Timing.of(timeout, world_size)
    assert timeout / 2 <= timing.investigate < timeout
    assert timing.heartbeat < timing.confirm
    if world_size == 2:
        assert timing.investigate + timing.confirm + 3 * timing.heartbeat < timeout
        assert timing.investigate > timeout - 6.6, "a wait may take nearly parallel.timeout_seconds"


def test_timeout_restarts_after_a_slow_phase() -> None:
    kept = Watchdog(HeartbeatStore(torch.distributed.HashStore(), 0, 2), 10.0, lambda message: None)
    late, silent = Diagnosis(HangCause.STRAGGLER, (1,), ""), Diagnosis(HangCause.UNRESPONSIVE, (1,), "")
    assert kept._too_long(9.0, float("inf"), late) and not kept._too_long(6.0, float("inf"), late)
    assert not kept._too_long(50.0, 0.0, late) and kept._too_long(58.0, 0.0, late)
    assert not kept._too_long(50.0, 3.0, late) and kept._too_long(50.0, 9.0, late)
    assert not kept._too_long(50.0, 0.0, silent), "until its last heartbeat is that old"


def test_a_rank_that_holds_the_store_never_finds_itself_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own reading may take longer than a check; it must end with a message, not wait for itself or kill itself."""
    ended = list[str]()
    kept = Watchdog(HeartbeatStore(torch.distributed.HashStore(), 0, 2), 10.0, ended.append)
    assert kept.store.at_rank_0
    kept.store.known[0] = kept.heartbeat()  # as after a first look
    monkeypatch.setattr(kept.store, "read", lambda seconds: None)
    _, found = kept._diagnose(lambda: True)
    assert found is not None and (found.cause, found.ranks) == (HangCause.STORE_LOST, ())
    assert kept._too_long(58.0, 0.0, found), "also behind slow work that nobody sees the end of"


def test_a_rank_that_hears_a_diagnosis_has_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever rank ends first writes exit.json, and machines need the ranks and hosts in it."""
    shared, heard = torch.distributed.HashStore(), list[Any]()
    finding = {"kind": "unresponsive", "ranks": [{"rank": 0, "host": "node-1"}]}
    HeartbeatStore(shared, 0, 2).announce(Announcement("rank 0 has stopped", finding))
    hearing = Watchdog(HeartbeatStore(shared, 1, 2), 10.0, lambda message: heard.append((message, hearing.finding)))
    monkeypatch.setattr("parallel.watchdog.watchdog.exit_process", lambda _: hearing.stopped.set())
    hearing.timing = replace(hearing.timing, heartbeat=0.01)
    hearing._publish()
    assert heard == [("rank 0 has stopped", finding)]


@pytest.mark.parametrize(
    ("error", "in_wait", "is_lost"),
    [
        (RuntimeError(LOST), False, True),
        (dist.DistBackendError("NCCL: Watchdog caught collective operation timeout"), False, True),
        (dist.DistStoreError("wait timeout after 1000ms"), False, True),
        (RuntimeError("Timed out"), True, True),
        (ConnectionResetError(104, "Connection reset by peer"), True, True),
        (RuntimeError("the tokenizer's server timed out"), False, False),
        (OSError(110, "Connection timed out", "/nfs/x.idx"), True, False),
        (OSError(110, "Connection timed out"), False, False),
        (RuntimeError("CUDA error: the launch timed out and was terminated"), True, False),
        (torch.AcceleratorError("the launch timed out and was terminated"), True, False),
    ],
)
def test_only_a_wait_for_ranks_loses_a_rank(error: Exception, in_wait: bool, is_lost: bool) -> None:
    """A mount and a kernel time out too: their ranks would end without a traceback, with a strike for their node."""
    assert is_lost_rank(error, in_wait) == is_lost


def test_an_error_of_a_mount_is_explained_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """In work inside of a wait, or after one."""
    watching = Watchdog(HeartbeatStore(torch.distributed.HashStore(), 0, 2), 10.0, lambda _: None)
    SPANS.clear()
    wait, work = wait_span(Event(SpanKind.BROADCAST)), work_span(Event(SpanKind.CORPUS_INDEX))
    with pytest.raises(OSError, match="timed out") as raised, wait, work:
        raise OSError(110, "Connection timed out")
    assert watching.explain(raised.value) is None
    SPANS.clear()


def test_lost_connection_is_recognised_by_the_cause() -> None:
    try:
        try:
            raise RuntimeError(LOST)
        except RuntimeError as error:
            raise RuntimeError("stage 1 failed to run forward") from error
    except RuntimeError as error:
        assert [is_lost_rank(cause) for cause in causes(error)] == [False, True]


def test_single_process_starts_no_watchdog(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        before = threading.active_count()
        watchdog.start(1.0, lambda message: None, tmp_path)
        assert threading.active_count() == before
        assert watchdog.explain(RuntimeError(LOST)) is None
    finally:
        watchdog.stop()
        torch.distributed.destroy_process_group()
