"""Local ranks under torch's elastic agent; the first failing rank's exit code is the program's."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import site
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.rendezvous import find_place
from longcat.errors import BAD_INPUT, CRASHED, OK
from longcat.search_path import ROOT, without_current_folder
from parallel.environment import count_gpus
from train.check import check
from train.config import Config
from train.run_dir import EXIT, recorded_code
from train.stop import SAVE_SIGNAL, STOP_SIGNALS, is_ignored

SAVE_SECONDS = 3600  # how long ranks may take to save their state after a signal


def num_processes(config: Config) -> int:
    """`run.num_processes`, where -1 is one per GPU, or one on a CPU. Never more than there are GPUs."""
    requested, gpus = config.run.num_processes, count_gpus()
    if requested == -1:
        return max(1, gpus)
    return min(requested, gpus) if gpus else requested


def run_ranks(overrides: list[str], config: Config) -> int:
    """Train on the configured number of ranks, here or on several nodes; returns the run's exit code.

    One rank runs in this process; several run as `python -P -m train` under the elastic agent. `-P` leaves the current
    folder out of the search for modules, where a user's own train.py may be.
    """
    processes = num_processes(config)
    place = find_place(config.launch, os.environ)
    if place is not None:
        from launch.node import run_node

        return run_node(overrides, config, place, processes)
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    check(config, processes)  # reports a wrong configuration once, before ranks start
    if processes == 1 and not config.launch.restarts:
        from train.process import main  # torch

        return main(config)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    if not config.launch.restarts:
        return run_elastic(overrides, config, processes)
    from launch.supervisor.this_machine import supervise_here

    return supervise_here(overrides, config, processes)


def run_elastic(
    overrides: list[str],
    config: Config,
    processes: int,
    codes: dict[int, int] | None = None,
    stopped: threading.Event | None = None,
) -> int:
    """Start ranks once under the elastic agent and return the exit code.

    ``codes`` gets those of ranks that failed, the first one first. A signal that ended the agent sets ``stopped``.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # the ranks report it in one line
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"longcat-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        local_addr="localhost",
        shutdown_timeout=SAVE_SECONDS,
        signals_to_handle="",  # by the agent; see below
    )
    before = exit_written(config.run.folder)
    try:
        with first_signal_alone(), found_by_children():
            if stopped is not None and stopped.is_set():  # before the handlers of `first_signal_alone` stood
                return CRASHED
            elastic_launch(launch, sys.executable)("-P", "-m", "train", *overrides)
    except ChildFailedError as error:
        first, failure = error.get_first_failure()
        if codes is not None:
            codes[first] = failure.exitcode
            codes.update((rank, failed.exitcode) for rank, failed in error.failures.items())
        code = failure.exitcode if failure.exitcode > 0 else CRASHED
        # A rank that had said why it ends may still crash while it ends
        is_own = code != BAD_INPUT and exit_written(config.run.folder) != before  # 2: the folder may be another run's
        return (recorded_code(config.run.folder, code) if is_own else OK) or code
    except SignalException:  # the agent has lost the ranks' codes, and exit.json may be an older run's
        if stopped is not None:
            stopped.set()
        same = exit_written(config.run.folder) == before
        return CRASHED if same else recorded_code(config.run.folder)
    return OK


@contextmanager
def found_by_children() -> Iterator[None]:
    """Let Pythons that are started with `-P` find this program, also in a checkout and beside a user's train.py."""
    name = "PYTHONPATH"
    before = os.environ.get(name)
    entries = without_current_folder(before.split(os.pathsep) if before else [])
    if ROOT not in (*site.getsitepackages(), site.getusersitepackages()):
        entries.insert(0, ROOT)  # a folder of installed packages must not come before the standard library
    os.environ[name] = os.pathsep.join(entries)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def exit_written(folder: Path) -> tuple[int, int] | None:
    """Identity of the exit.json in the folder, or None."""
    try:
        status = (folder / EXIT).stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


@contextmanager
def first_signal_alone() -> Iterator[None]:
    """The first stop signal ends the agent, which passes it on and waits for the ranks; later ones are ignored.

    With the agent's own handler a second signal would end that wait, and the ranks would train on without it. A request
    to save goes to the ranks, and the agent goes on. SIGHUP stays ignored under `nohup`.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    def end(number: int, frame: object) -> None:
        for handled in before:
            signal.signal(handled, signal.SIG_IGN)
        raise SignalException(f"process {os.getpid()} got {signal.Signals(number).name}", signal.Signals(number))

    signals = [
        number for number in (*STOP_SIGNALS, signal.SIGQUIT) if number != signal.SIGHUP or not is_ignored(number)
    ]
    before = {number: signal.getsignal(number) for number in (*signals, SAVE_SIGNAL)}
    try:
        for number in signals:
            signal.signal(number, end)
        signal.signal(SAVE_SIGNAL, lambda number, frame: pass_on(signal.Signals(number)))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def pass_on(number: signal.Signals) -> None:
    """Send a signal to this process's ranks, to those that already handle it: it would end the others."""
    import psutil

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "RANK" in child.environ() and handles(child.pid, number):
                child.send_signal(number)


def handles(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal (Linux)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)
