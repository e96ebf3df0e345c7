"""A real Slurm for tests: munge, one slurmctld and three slurmd on this machine, in a scratch folder of their own."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.ports import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo")
NODES = ("n1", "n2", "n3")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
# cred_expire: a requeued job waits as long as its former credential lives, two minutes by default. The scheduler's
# intervals are for clusters with many jobs; here a test waits for each of them.
CONFIGURATION = """\
ClusterName=ci
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=10
InactiveLimit=0
MinJobAge=600
JobRequeue=1
MailProg=/bin/true
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=4000\n"
PARTITION = "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"


def missing() -> str:
    """Why no Slurm can be started here; empty if one can."""
    if os.geteuid():
        return "slurmctld and slurmd are started as root, and this user is not root"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"not installed: {', '.join(absent)}; apt-get install -y --no-install-recommends slurm-wlm munge"
    return ""


class Slurm:
    """A running cluster. `command` runs one of Slurm's programs on it.

    Args:
        folder: an empty folder for configuration, sockets, state and logs; its path must be short (a socket is in it).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        controller_port, *ports = free_ports(1 + len(NODES))
        host = socket.gethostname()
        for name in ("run", "state", "log", "spool"):
            (folder / name).mkdir(parents=True)
        text = CONFIGURATION.format(host=host, folder=folder, controller_port=controller_port)
        for name, port in zip(NODES, ports, strict=True):
            text += NODE.format(name=name, host=host, port=port)
        (folder / "slurm.conf").write_text(text + PARTITION)
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Start all daemons and wait until each node is idle."""
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        self.folder.chmod(0o755)  # munged refuses a socket that others cannot reach
        run = self.folder / "run"
        self._daemon(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--socket={run}/munge.socket",
            f"--pid-file={run}/munged.pid",
            f"--log-file={self.folder}/log/munged.log",
            f"--seed-file={run}/munge.seed",
        )
        wait(lambda: (run / "munge.socket").exists(), 10, "munged has no socket")
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        wait(lambda: all(state == "idle" for state in self.node_states().values()), 30, "the nodes are not idle")

    def start_node(self, node: str) -> None:
        self._daemon(node, "-D", "-N", node, program="slurmd")

    def _daemon(self, name: str, *words: str, program: str = "") -> None:
        log = (self.folder / "log" / f"{name}.out").open("ab")
        self.daemons[name] = subprocess.Popen(
            [program or name, *words], env=self.environment, stdout=log, stderr=log, start_new_session=True
        )

    def command(self, *words: str, check: bool = True) -> str:
        """Run a program of Slurm's; returns its standard output."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def node_states(self) -> dict[str, str]:
        """Node → its state as sinfo abbreviates it."""
        lines = self.command("sinfo", "-hN", "-o", "%N %t", check=False).splitlines()
        found = dict(line.split() for line in lines)
        return found if len(found) == len(NODES) else dict.fromkeys(NODES, "unknown")

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of a job."""
        words = self.command("scontrol", "-o", "show", "job", number).split()
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    def wait_for_state(self, number: str, *states: str, seconds: float = 120) -> dict[str, str]:
        """Wait until a job is in one of ``states``; it must not end in another one."""
        end = time.monotonic() + seconds
        while True:
            job = self.job(number)
            if job["JobState"] in states:
                return job
            assert job["JobState"] not in ENDED, f"the job ended in {job['JobState']}, not {states}\n{log_of(job)}"
            assert time.monotonic() < end, f"{job['JobState']}, not {states}, after {seconds} s\n{log_of(job)}"
            time.sleep(0.2)

    def nodes_of(self, number: str) -> list[str]:
        """The nodes of a job's newest start, in order."""
        return self.command("scontrol", "show", "hostnames", self.job(number)["NodeList"]).split()

    def processes(self, job: str = "", node: str = "") -> list[int]:
        """Process ids of what jobs run on the nodes, the script and Slurm's own processes left out."""
        marks = [f"SLURM_CONF={self.folder}/slurm.conf", *([f"SLURM_JOB_ID={job}"] if job else [])]
        marks += [f"SLURMD_NODENAME={node}"] if node else []
        return sorted(
            pid
            for pid, words in environments()
            if all(mark.encode() in words for mark in marks)
            and any(word.startswith(b"SLURM_PROCID=") for word in words)
        )

    def training(self, job: str, node: str = "") -> list[int]:
        """Process ids of a job's ranks, in rank order; of its `longcat train` where that is the only rank."""
        found = self.processes(job, node)
        ranks = {pid: rank for pid in found if (rank := variable(pid, "RANK"))}
        programs = [pid for pid in found if name_of(pid).startswith("python")]
        return sorted(ranks, key=lambda pid: int(ranks[pid])) or programs

    def kill_daemon(self, node: str) -> None:
        """SIGKILL a node's slurmd; what it started lives on, as where the daemon alone crashes."""
        self.daemons[node].kill()
        self.daemons.pop(node).wait()

    def lose_node(self, node: str) -> None:
        """SIGKILL everything that runs on a node, the daemon first, as where a machine loses its power."""
        self.kill_daemon(node)
        for pid in [*self.step_daemons(node), *self.processes(node=node), *self.scripts(node)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def scripts(self, node: str) -> list[int]:
        """Process ids of job scripts, and of what they started, that run on a node."""
        marks = (f"SLURM_CONF={self.folder}/slurm.conf".encode(), f"SLURMD_NODENAME={node}".encode())
        return [pid for pid, words in environments() if all(mark in words for mark in marks)]

    def step_daemons(self, node: str) -> list[int]:
        """Process ids of the slurmstepd of a node: parents of what runs there."""
        parents = {parent_of(pid) for pid in self.scripts(node)}
        return [pid for pid in parents if pid and name_of(pid) == "slurmstepd"]

    def restore(self, node: str) -> None:
        """Bring a lost node, or one that was set down, back into service."""
        if node not in self.daemons:
            self.start_node(node)

        def is_idle() -> bool:
            self.command("scontrol", "update", f"NodeName={node}", "State=resume", check=False)  # refused at first
            return self.node_states()[node] == "idle"

        wait(is_idle, 60, f"{node} does not come back")

    def stop(self) -> None:
        """End all jobs and daemons; nothing of this cluster runs afterwards."""
        with contextlib.suppress(Exception):
            self.command("scancel", "--user=root", check=False)
            wait(lambda: not self.command("squeue", "-h", check=False).strip(), 5, "")
        for daemon in self.daemons.values():
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        mark = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        for pid, words in environments():
            if mark in words and pid != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def running_slurm(folder: Path) -> Iterator[Slurm]:
    """A started cluster, stopped at the end."""
    cluster = Slurm(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def wait(condition: object, seconds: float, message: str) -> None:
    """Wait until ``condition()`` is true; fails with ``message`` after ``seconds``."""
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"{message} after {seconds} s")
        time.sleep(0.1)


def environments() -> Iterator[tuple[int, list[bytes]]]:
    """(process id, `NAME=value` words) of each process on this machine."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                yield int(entry.name), (entry / "environ").read_bytes().split(b"\0")


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def variable(pid: int, name: str) -> str:
    """A variable of a process's environment; empty if it has none."""
    with contextlib.suppress(OSError):
        for word in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if word.startswith(f"{name}=".encode()):
                return word.partition(b"=")[2].decode()
    return ""


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def log_of(job: dict[str, str]) -> str:
    """The output of a job, of all its starts, without the lines of the steps."""
    path = Path(job.get("StdOut", ""))
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return "\n".join(line for line in lines if not re.match(r" *(\d+/\d+|step) ", line))
