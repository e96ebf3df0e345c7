"""`python -m launch.nodes.store`: where the nodes of a run meet, in a process that outlives ranks and node runners.

It serves node runners by lines of JSON. The ranks' TCPStore is in a child process, whose port is under `job/ranks`:
importing torch takes seconds. Its socket listens before, so ranks can start at once.
"""

from __future__ import annotations

import asyncio
import errno
import json
import signal
import socket
import subprocess
import sys
import time
import uuid
from bisect import bisect_left, insort
from typing import Any

from launch.pace import node_pause
from launch.signals import blocked_requests
from longcat.json_text import dumps
from parallel.environment import lift_descriptor_limit
from train.process.lasting_streams import to_null_device
from train.process.stop import REQUESTS

PROTOCOL = "longcat 1"
READY, IN_USE = "ready", "in use"
RANKS_PORT, FOR_RANKS = "job/ranks", "ranks"
HELLO_SECONDS = 10.0
CHECK_SECONDS = 0.2
COUNT_SECONDS = 1.0  # between counts of the nodes
DEPARTED_SECONDS = 5.0  # of silence after which a newcomer of the same name is the same node, started again
MAX_LINE = 1 << 24
BACKLOG = 4096  # ranks that may wait for their store to come up; the system may allow fewer
Identity = dict[str, str]


class Values:
    """What nodes share. A read costs what it finds, however much else there is: most ask for a few of thousands."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.keys: list[str] = []  # sorted

    def set(self, key: str, value: str) -> None:
        if key not in self.values:
            insort(self.keys, key)
        self.values[key] = value

    def claim(self, key: str, value: str) -> None:
        """Set it unless there is one."""
        if key not in self.values:
            self.set(key, value)

    def read(self, prefix: str) -> dict[str, str]:
        """The values whose keys begin so."""
        found = {}
        for place in range(bisect_left(self.keys, prefix), len(self.keys)):
            if not self.keys[place].startswith(prefix):
                break
            found[self.keys[place]] = self.values[self.keys[place]]
        return found


class Membership:
    """Names, ids and heartbeats of node runners, and the values that they share. One thread uses it."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout  # seconds of silence after which a node does not count
        self.values = Values()
        self.ids: dict[str, int] = {}  # token of a node runner → id
        self.names: dict[int, str] = {}
        self.beats: dict[int, float] = {}
        self.last_sign = time.monotonic()
        self.first: dict[str, Any] | None = None  # who decides: id, host and pid
        self.has_ended = False
        self.started = time.monotonic()
        self.counted, self.members = 0.0, 0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carry out a request. Each may come twice: a runner that lost its connection asks again."""
        for key, value in request.get("set", {}).items():
            self.values.set(key, value)
        for key, value in request.get("claim", {}).items():
            self.values.claim(key, value)
        answer: dict[str, Any] = {}
        if "join" in request:
            answer["id"] = number = self._join(**request["join"])
            answer["name"] = self.names[number]
            if "first" in request:
                self.first = {"id": number, **request["first"]}
        if "beat" in request:
            self.beats[request["beat"]] = self.last_sign = time.monotonic()
        if "beat" in request or "about" in request:
            answer |= self._about()
        if "end" in request:
            self.has_ended = True
        if "leave" in request:
            self.beats.pop(request["leave"], None)
        if "read" in request:
            answer["values"] = {
                key: value for prefix in request["read"] for key, value in self.values.read(prefix).items()
            }
        if request.get("nodes"):
            now = time.monotonic()
            answer["nodes"] = [[number, self.names[number], now - beat] for number, beat in sorted(self.beats.items())]
        return answer

    def _about(self) -> dict[str, Any]:
        """The first node, its silence, and how many nodes live; of the same size however many there are."""
        now = time.monotonic()
        if now - self.counted > COUNT_SECONDS:
            self.counted = now
            self.members = sum(now - beat <= self.timeout for beat in self.beats.values())
        silent = None if self.first is None else now - self.beats.get(self.first["id"], self.started)
        return {"first": self.first, "first_silent": silent, "members": self.members}

    def _join(self, token: str, name: str, wanted: int | None) -> int:
        if token in self.ids:
            return self.ids[token]
        now = time.monotonic()
        departed = max(DEPARTED_SECONDS, 2 * node_pause(0.0, len(self.beats), self.timeout))
        for number, beat in list(self.beats.items()):
            if self.names[number] == name and now - beat > departed:
                del self.beats[number]
        number = wanted if wanted is not None and wanted not in self.names else max(self.names, default=0) + 1
        taken = any(self.names[other] == name for other in self.beats)
        self.ids[token], self.names[number] = number, f"{name}/{number}" if taken else name
        self.beats[number] = self.last_sign = now
        return number


class Server:
    """Answers node runners of one run; tells those of another who it is."""

    def __init__(self, identity: Identity, timeout: float) -> None:
        self.identity, self.membership, self.name = identity, Membership(timeout), uuid.uuid4().hex

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: a greeting with the run's identity, then requests."""
        try:
            first = await asyncio.wait_for(reader.readline(), HELLO_SECONDS)
            hello = json.loads(first)
            known = isinstance(hello, dict) and hello.get("longcat") == PROTOCOL
            self._write(writer, {"longcat": PROTOCOL, "identity": self.identity, "store": self.name})
            while known and hello["identity"] == self.identity and (line := await reader.readline()):
                self._write(writer, self.membership.answer(json.loads(line)))
                await writer.drain()
        except (OSError, ValueError, KeyError, TypeError, TimeoutError, asyncio.IncompleteReadError):
            pass  # another program, or a node that is gone
        finally:
            writer.close()

    @staticmethod
    def _write(writer: asyncio.StreamWriter, answer: dict[str, Any]) -> None:
        writer.write(dumps(answer).encode() + b"\n")


async def main(port: int, idle_seconds: float, identity: Identity) -> int:
    """Serve until no node has sent a heartbeat for ``idle_seconds``, until one asks for the end, or SIGKILL.

    Prints `ready`, or `in use` if the port belongs to another process.
    """
    server = Server(identity, idle_seconds / 2)
    try:
        listening = await asyncio.start_server(server.serve, port=port, limit=MAX_LINE)
    except OSError as error:
        print(IN_USE if error.errno == errno.EADDRINUSE else error.strerror, flush=True)
        return 1
    print(READY, flush=True)
    sys.stdout.close()
    to_null_device(1)  # whoever reads this process's output must not wait for its end
    with RanksStore() as ranks_store:
        server.membership.values.set(RANKS_PORT, str(ranks_store.port))
        await until_idle(server.membership, ranks_store, idle_seconds)
    listening.close()
    return 0


async def until_idle(members: Membership, ranks_store: RanksStore, idle_seconds: float) -> None:
    """Return when no node has sent a heartbeat for so long, one asks for the end, or the ranks' store has ended.

    Without it no ranks can start; the nodes start both anew.
    """
    while time.monotonic() - members.last_sign < idle_seconds and not members.has_ended:
        await asyncio.sleep(CHECK_SECONDS)
        if ranks_store.has_ended():
            return


class RanksStore:
    """A TCPStore for ranks, in a process of its own that ends with this one.

    Ranks may connect to `port` from now on: they wait until that process has imported torch.

    Args:
        host: address to listen on; all of this machine's by default.
    """

    def __init__(self, host: str = "") -> None:
        with listen(host) as listening:
            self.port = int(listening.getsockname()[1])
            found = [str(listening.fileno()), str(self.port)]
            with blocked_requests():
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "launch.nodes.store", FOR_RANKS, *found],
                    stdin=subprocess.PIPE,
                    pass_fds=[listening.fileno()],
                    start_new_session=True,
                )

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def __enter__(self) -> RanksStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()


def listen(host: str) -> socket.socket:
    """A listening socket on a free port."""
    if not host and socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
    return socket.create_server((host, 0), backlog=BACKLOG)


def serve_ranks(listening: int, port: int) -> int:
    """Hold the ranks' store until standard input ends, that is as long as the parent process lives."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening)
    sys.stdin.read()
    del store
    return 0


if __name__ == "__main__":
    for number in REQUESTS:  # Slurm and a terminal signal every process of the job
        signal.signal(number, signal.SIG_IGN)
    lift_descriptor_limit()
    if sys.argv[1] == FOR_RANKS:
        sys.exit(serve_ranks(int(sys.argv[2]), int(sys.argv[3])))
    sys.exit(asyncio.run(main(int(sys.argv[1]), float(sys.argv[2]), json.loads(sys.argv[3]))))
