"""Runs a script of `longcat slurm` without a Slurm: stand-ins for its programs that behave as Slurm 22.05 does."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from launch.__main__ import main as longcat

# Each note their words. A start of training ends as the next line of the file `ends` says; nodes in $DEAD do not
# answer. As in Slurm 22.05, excluded nodes of a running job cannot be changed, requeue and requeuehold send TERM to all
# that the script runs, and squeue shows a step only once srun has made it
PROGRAMS = {
    "srun": r"""
        if [ "${!#}" = true ]; then
            : >"$CALLS.asked.$$"
            for _ in {1..600}; do   # $TOGETHER: answers once so many are asked
                asked=("$CALLS".asked.*); [ "${#asked[@]}" -ge "$TOGETHER" ] && break; /bin/sleep 0.1
            done
            for node in $DEAD; do [[ "$*" == *"=$node "* ]] && exit 1; done
            exit 0
        fi
        name=${1#--job-name=}
        echo "srun $*" >>"$CALLS"
        /bin/sleep "$REGISTERS"
        echo "7.0 $name" >"$RUN/step"
        trap 'rm -f "$RUN/step"' EXIT
        end=$(head -n 1 "$ENDS"); sed -i 1d "$ENDS"
        case $end in
        wait*) trap 'printf "%s" "${end#wait}" >"$RUN/exit.json"; exit 143' TERM; echo $$ >"$RUN/srun.pid"
            while :; do read -rt 0.02 <> <(:); done ;;
        saves*) trap 'until [ -f "$CALLS.saved" ]; do /bin/sleep 0.05; done
            printf "%s" "${end#saves}" >"$RUN/exit.json"; exit 143' TERM; echo $$ >"$RUN/srun.pid"
            while :; do read -rt 0.02 <> <(:); done ;;
        killed*) trap "exit 143" TERM; echo $$ >"$RUN/srun.pid"
            while :; do read -rt 0.02 <> <(:); done ;;
        none*) exit "${end#none}" ;;
        begun*) echo "$name" >"$RUN/config.yaml.new"; mv "$RUN/config.yaml.new" "$RUN/config.yaml"; exit 137 ;;
        gave*) echo "what to do" >"$RUN/gave_up.new"; mv "$RUN/gave_up.new" "$RUN/gave_up.txt"
            printf '%s' '{"code": 1}' >"$RUN/exit.json"; exit 143 ;;
        forgets*) rm -f "$RUN/gave_up.txt"; exit 137 ;;
        journal*) printf '%s\n' "${end#journal}" >>"$RUN/launch.jsonl"; exit 137 ;;
        refused*) echo refused >"$LONGCAT_REFUSAL"; exit 1 ;;
        *) printf '%s' "$end" >"$RUN/exit.json"; exit 143 ;;
        esac""",
    "scontrol": r"""
        echo "scontrol $*" >>"$CALLS"
        case "$*" in
        "show hostnames"*) printf 'n1\nn2\nn3\n' ;;
        "-o show node"*) echo "NodeName=n1 NodeAddr=10.0.0.1 NodeHostName=n1" ;;
        "-o show job"*) echo "JobId=7 JobName=mine ReqNodeList=(null) ExcNodeList=$EXCLUDED NodeList=n[1-3]" ;;
        requeue*) : >"$CALLS.pending"; kill -TERM $$ "$PPID"; /bin/sleep 0.2 ;;
        update*)
            [ -f "$CALLS.pending" ] || { echo "Job is no longer pending execution for job 7" >&2; exit 1; } ;;
        esac""",
    "squeue": r"""echo '7.1 true'; [ ! -f "$RUN/step" ] || cat "$RUN/step" """,
    "scancel": r"""echo "scancel $*" >>"$CALLS"; [ -f "$RUN/srun.pid" ] && kill -TERM "$(cat "$RUN/srun.pid")"; true""",
    "sleep": r"""[ "$1" -lt 5 ] && exec /bin/sleep "$1"; echo "sleep $1" >>"$CALLS"; [ "$1" -lt 200 ]""",
}
SAVED = '{"code": 3, "message": "saved"}'


class Script:
    """A script that `longcat slurm` wrote, run by bash with stand-ins for Slurm's programs.

    Args:
        folder: that of the run's folder `runs`, and of the stand-ins.
        words: keys of `longcat slurm`.
    """

    def __init__(self, folder: Path, words: list[str]) -> None:
        self.run = folder / "runs" / "mine"
        assert longcat(["slurm", "model=debug", f"run.dir={self.run.parent}", "run.name=mine", *words]) == 0
        self.path = self.run / "slurm.sh"
        self.calls, self.log = folder / "calls", folder / "log"
        programs = folder / "programs"
        programs.mkdir(exist_ok=True)
        for name, text in PROGRAMS.items():
            (programs / name).write_text(f"#!/bin/bash\n{text}\n")
            (programs / name).chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "ENDS": str(folder / "ends"),
            "DEAD": "",
            "TOGETHER": "0",
            "REGISTERS": "0",
            "EXCLUDED": "(null)",
            "RUN": str(self.run),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
        }

    def start(self, *ends: str, **environment: str) -> subprocess.Popen[str]:
        """Start the script; its starts of training end in turn as ``ends`` say."""
        for path in self.calls.parent.glob("calls.*"):
            path.unlink()
        self.calls.write_text("")
        Path(self.environment["ENDS"]).write_text("".join(f"{end}\n" for end in ends))
        return subprocess.Popen(
            ["bash", str(self.path)],
            env={**self.environment, **environment},
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ends(self, process: subprocess.Popen[str]) -> tuple[int, bool, str]:
        """(exit code, whether it was queued again, output)."""
        code = process.wait(120)
        queued, output = "scontrol requeue" in self.calls.read_text(), self.log.read_text()
        assert not (queued and "cannot be queued again" in output), output
        return code, queued, output

    def starts(self) -> list[str]:
        """The nodes of each start of training."""
        return re.findall("^srun .*--nodelist=(\\S+)", self.calls.read_text(), re.M)

    def commands(self) -> list[str]:
        """What scontrol was told to do."""
        return re.findall("^scontrol ((?:requeue|update|release).*)", self.calls.read_text(), re.M)

    def wait_for(self, condition: Callable[[], object], seconds: float = 60) -> None:
        limit = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < limit, self.log.read_text()
            time.sleep(0.01)

    def signalled(self, number: signal.Signals, end: str = f"wait{SAVED}", **environment: str) -> tuple[int, bool, str]:
        """Signal the script while srun runs (with REGISTERS: before Slurm knows its step); returns as `ends` does."""
        process = self.start(end, **environment)
        self.wait_for(self.starts if "REGISTERS" in environment else (self.run / "srun.pid").exists)
        process.send_signal(number)
        ended = self.ends(process)
        with contextlib.suppress(OSError):  # of ranks that do not save
            os.kill(int((self.run / "srun.pid").read_text()), signal.SIGKILL)
        (self.run / "srun.pid").unlink(missing_ok=True)
        return ended
