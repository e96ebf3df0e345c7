"""A node runner's connection to the run's store: it joins, sends heartbeats, and reads and writes shared values."""

from __future__ import annotations

import json
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from launch.fleet import Assignment, NodeReport, NodeState
from launch.nodes.store import PROTOCOL, Identity
from longcat.errors import ConfigError
from longcat.json_text import dumps

HELLO_SECONDS = 5.0
REQUEST_SECONDS = 10.0
RETRY_SECONDS = 0.5
# Every node reads what is below job/ with each heartbeat, so that is short and does not grow with their number
END, STOP, INCARNATION, ASSIGNMENT = "job/end", "job/stop", "job/incarnation", "assignment"


class StoreLostError(ConnectionError):
    """The store does not answer any more, so the nodes of the run cannot agree on anything."""


class OtherProgramError(Exception):
    """What listens at the address is no store of a run."""


class Link:
    """Requests to the store, one at a time, from any thread. A broken connection is made anew for ``patience`` seconds.

    Raises:
        OSError: nobody listens there; TimeoutError: nothing answers.
        OtherProgramError: another program does.
        ConfigError: another run's store does.
    """

    def __init__(self, host: str, port: int, identity: Identity, patience: float) -> None:
        self.host, self.port, self.identity, self.patience = host, port, identity, patience
        self.lock = threading.Lock()
        self.has_ended = False
        self.store: str | None = None  # which of several that may have had this address in turn
        self.socket, self.file = self._connect()
        self.own_address = str(self.socket.getsockname()[0])

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def _connect(self) -> tuple[socket.socket, Any]:
        connection = socket.create_connection((self.host, self.port), HELLO_SECONDS)
        try:
            connection.sendall(dumps({"longcat": PROTOCOL, "identity": self.identity}).encode() + b"\n")
            file = connection.makefile("rb")
            hello = json.loads(file.readline(1 << 20))
            theirs = hello["identity"] if hello["longcat"] == PROTOCOL else None
            store = str(hello["store"])
        except TimeoutError:
            connection.close()
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            connection.close()
            raise OtherProgramError from error
        if theirs != self.identity:
            connection.close()
            if theirs is None:
                raise OtherProgramError
            raise ConfigError(describe_other_run(self.address, self.identity, theirs))
        if self.store not in (None, store):
            connection.close()
            raise StoreLostError(f"the store of the run at {self.address} is another one now")
        self.store = store
        connection.settimeout(REQUEST_SECONDS)
        return connection, file

    def request(self, **request: Any) -> dict[str, Any]:
        """Send a request and return the answer.

        Raises:
            StoreLostError: there is none.
        """
        line, end, is_new = dumps(request).encode() + b"\n", time.monotonic() + self.patience, False
        with self.lock:
            while True:
                if self.has_ended:
                    raise StoreLostError(f"this node has left the store of the run at {self.address}")
                try:
                    self.socket.sendall(line)
                    if answer := self.file.readline():
                        return dict(json.loads(answer))
                except (OSError, ValueError):
                    pass  # the store may only be late: connect again, until the patience ends
                if is_new and time.monotonic() > end:
                    raise StoreLostError(f"the store of the run at {self.address} does not answer")
                self._reconnect(end)
                is_new = True

    def _reconnect(self, end: float) -> None:
        self.close()
        while True:
            try:
                self.socket, self.file = self._connect()
                if self.has_ended:  # by another thread, meanwhile
                    self.close()
                    raise StoreLostError(f"this node has left the store of the run at {self.address}")
                return
            except StoreLostError:
                raise
            except (OSError, OtherProgramError, ConfigError) as error:
                # Refused: that machine lives and the store's process does not
                if isinstance(error, ConnectionRefusedError) or self.has_ended or time.monotonic() > end:
                    raise StoreLostError(f"the store of the run at {self.address} is lost") from error
                time.sleep(RETRY_SECONDS)

    def read(self, *prefixes: str) -> dict[str, str]:
        """The values whose keys begin with one of the prefixes."""
        return dict(self.request(read=prefixes)["values"])

    def set(self, key: str, value: str) -> None:
        self.request(set={key: value})

    def end(self) -> None:
        """Close the connection for good, for other threads too."""
        self.has_ended = True
        self.close()

    def close(self) -> None:
        self.file.close()  # it keeps the connection open
        self.socket.close()


class StoreFleet:
    """`launch.fleet.Fleet` by values in the store, which node runners read and write."""

    def __init__(self, link: Link, node_timeout: float, before_start: Callable[[], None] = lambda: None) -> None:
        self.link, self.node_timeout, self.before_start = link, node_timeout, before_start

    def nodes(self) -> list[NodeState]:
        answer = self.link.request(nodes=True, read=[ASSIGNMENT])
        text = answer["values"].get(ASSIGNMENT)
        training = set(Assignment.parse(text).nodes) if text else set()
        return [
            NodeState(name, number, silent, name not in training)
            for number, name, silent in answer["nodes"]
            if silent <= self.node_timeout
        ]

    def start(self, assignment: Assignment) -> None:
        self.before_start()
        self.link.request(set={ASSIGNMENT: assignment.to_json(), INCARNATION: str(assignment.incarnation)})

    def reports(self, incarnation: int) -> list[NodeReport]:
        return [NodeReport.parse(text) for _, text in sorted(self.link.read(f"{incarnation}/report/").items())]

    def signal(self, number: int) -> None:
        incarnation = self.link.read(INCARNATION).get(INCARNATION)
        if incarnation:
            self.link.set(f"{incarnation}/control/signal/{uuid.uuid4().hex}", str(int(number)))

    def stop_ranks(self, incarnation: int, grace_seconds: float) -> None:
        self.link.set(f"{incarnation}/control/stop/{grace_seconds!r}", repr(grace_seconds))

    def stop_requested(self) -> bool:
        return bool(self.link.read(STOP))


def describe_other_run(address: str, ours: Identity, theirs: Identity) -> str:
    """What tells two runs at one address apart, in a line."""
    return (
        f"the store at {address} is that of another run: {difference(ours, theirs)}; give each run a "
        f"launch.rendezvous of its own"
    )


def difference(ours: Identity, theirs: Identity) -> str:
    key = next(key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key))
    return f"{key} is {theirs.get(key) or 'none'} there and {ours.get(key) or 'none'} here"
