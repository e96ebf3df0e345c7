"""A node runner as a member of the run: it joins, agrees on the configuration, sends heartbeats, and leaves."""

from __future__ import annotations

import json
import os
import time
import uuid
from typing import Any

from launch.fleet import GRACE_SECONDS
from launch.nodes.claims import Claims
from launch.nodes.link import END, INCARNATION, STOP, Link, StoreLostError
from launch.nodes.meeting import Meeting, describe_self
from launch.nodes.rendezvous import RendezvousParameters, find_identity
from launch.pace import leader_pause, node_pause
from launch.signals import Signals
from launch.supervisor.recall import Earlier
from longcat.errors import STOPPED, ConfigError
from longcat.json_text import dumps
from train.config import Config
from train.keys.dotted import flatten
from train.run_dir.folder import as_mapping

POLL_SECONDS = 0.05
LEAVE_SECONDS = 5.0
CONFIGURATION, AGREED = "configuration", "agreed/"
BEFORE_RANKS = "stopped before the ranks started; nothing was trained"


class Member:
    """This node among the nodes of the run."""

    def __init__(self, config: Config, place: RendezvousParameters, processes: int, signals: Signals) -> None:
        self.config, self.place, self.processes = config, place, processes
        self.signals, self.settings = signals, config.launch
        self.identity = find_identity(config.run.folder, os.environ)
        claims, timeout = Claims(config.run.folder) if self.settings.restarts else None, self.settings.node_timeout
        self.meeting = Meeting(place, self.identity, claims, timeout, signals.is_stopped)
        self.incarnation = 0
        self.id: int | None = None
        self.name = place.name
        self.members, self.command = 0, uuid.uuid4().hex  # of the run; the first node's command is that of all
        self.first_name = ""  # of the node that decides
        self.earlier: Earlier | None = None  # decisions that this node goes on from
        self.deadline = time.monotonic() + self.settings.join_seconds

    @property
    def link(self) -> Link:
        return self.meeting.link

    def pause(self, least: float) -> float:
        """Seconds until this node's next request. The first node, which all others watch, never waits for longer."""
        if self.meeting.is_first:
            return least
        return node_pause(least, max(self.members, self.place.nodes), self.settings.node_timeout)

    def join(self) -> None:
        """Become a member, under the same name and number as before.

        Raises:
            ConfigError: there are too many nodes, or they were not started alike.
        """
        is_first, nodes, again = self.meeting.is_first, self.place.nodes, self.id is not None
        wanted = self.id if again else 0 if is_first else self.place.id
        request: dict[str, Any] = {"join": {"token": uuid.uuid4().hex, "name": self.name, "wanted": wanted}}
        if is_first:
            request["first"] = describe_self(self.meeting.number) | {"name": self.name, "command": self.command}
        joined = self.link.request(**request)
        self.id, self.name = joined["id"], joined["name"]
        if self.id >= nodes and not self.settings.restarts:
            self.link.request(leave=self.id)
            raise ConfigError(
                f"launch.nodes={nodes} nodes have joined the run at {self.link.address} already; raise launch.nodes on "
                f"all of them, or do not start it here"
            )
        self.check_agreement()
        if again and self.signals.is_stopped():
            self.link.set(STOP, "stop")

    def wait_for_nodes(self, expected: int) -> list[str]:
        """On the first node, wait for the others; returns their names in the order of node ranks.

        Raises:
            ConfigError: one is missing at the first start, or does not agree.
            InterruptedError: a stop signal reached a node.
        """
        takes_over = self.earlier is not None
        seconds = self.settings.node_timeout + 2 * GRACE_SECONDS if takes_over else self.settings.join_seconds
        deadline = time.monotonic() + seconds
        while True:
            values = self.look()
            found = self.link.request(nodes=True, read=[AGREED])
            names = [name for number, name, _ in found["nodes"] if f"{AGREED}{number}" in found["values"]]
            if END in values:
                raise ConfigError(json.loads(values[END])["message"])
            if len(names) >= expected:
                return names
            if not takes_over and (self.signals.is_stopped() or STOP in values):
                self.end_before_ranks(STOPPED, BEFORE_RANKS)
                raise InterruptedError
            if time.monotonic() > deadline:
                if takes_over:
                    return names  # the supervisor waits for more, or goes on with these
                message = (
                    f"{len(names)} of launch.nodes={self.place.nodes} nodes came to {self.link.address} within "
                    f"{self.settings.join_seconds:g} s (launch.join_seconds): {', '.join(names)}; "
                    f"start longcat train on {self.missing(names)} as well"
                )
                self.end_before_ranks(ConfigError.exit_code, message)
                raise ConfigError(message)
            time.sleep(leader_pause(0.1, self.place.nodes))

    def end_before_ranks(self, code: int, message: str) -> None:
        """On the first node: all nodes end so."""
        self.link.request(claim={END: dumps({"code": code, "message": message})})
        self.leave(True)

    def missing(self, names: list[str]) -> str:
        """The hosts that did not come, where Slurm tells all, else how many."""
        missing = [host for host in self.place.hosts if host not in names]
        return ", ".join(missing) or f"{self.place.nodes - len(names)} more"

    def check_agreement(self) -> None:
        """Compare this node's configuration with that of the first to come.

        Raises:
            ConfigError: with a key that differs; before ranks have started, on every node.
        """
        ours: dict[str, Any] = flatten(as_mapping(self.config))
        ours |= {"launch.nodes": self.place.nodes, "run.num_processes": self.processes}
        text = dumps({"node": self.place.name, "keys": ours}, default=str)
        answer = self.link.request(claim={CONFIGURATION: text}, read=["job/", CONFIGURATION])["values"]
        first, here = json.loads(answer[CONFIGURATION]), json.loads(text)["keys"]
        theirs = first["keys"]
        for key in sorted(here.keys() | theirs.keys()):
            if here.get(key) != theirs.get(key):
                message = (
                    f"{key} is {theirs.get(key)} on node {first['node']} and {here.get(key)} on node "
                    f"{self.place.name}; start longcat train with the same words and files on every node"
                )
                if INCARNATION not in answer:
                    self.link.request(claim={END: dumps({"code": ConfigError.exit_code, "message": message})})
                self.link.request(leave=self.id)
                raise ConfigError(message)
        self.link.set(f"{AGREED}{self.id}", self.place.name)

    def look(self) -> dict[str, str]:
        """Send a heartbeat; read what is asked of this node.

        Raises:
            StoreLostError: the store, or the first node, is lost.
        """
        self.meeting.check_sometimes()
        answer = self.link.request(beat=self.id, read=["job/", f"{self.incarnation}/control/"])
        values, first = dict(answer["values"]), answer["first"]
        if END in values:
            return values
        if first is None:
            if time.monotonic() > self.deadline:
                raise StoreLostError("the first node has not come (launch.join_seconds)")
            return values
        self.members, self.meeting.number = answer["members"], first["claim"]
        self.first_name, self.command = first["name"], first["command"]
        if answer["first_silent"] > self.settings.node_timeout:
            raise StoreLostError(
                f"the first node sent no heartbeat for {self.settings.node_timeout:g} s (launch.node_timeout)"
            )
        return values

    def leave(self, is_first: bool) -> None:
        """Say goodbye; the first node, whose store ends next, waits for the others'."""
        self.link.request(leave=self.id)
        nodes = max(self.members, self.place.nodes)
        seconds = max(LEAVE_SECONDS, 2 * node_pause(0.0, nodes, self.settings.node_timeout))
        end = time.monotonic() + seconds
        while is_first and time.monotonic() < end:
            if all(silent > seconds for _, _, silent in self.link.request(nodes=True)["nodes"]):
                return
            time.sleep(leader_pause(POLL_SECONDS, nodes))
