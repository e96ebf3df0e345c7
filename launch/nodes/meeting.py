"""How a node joins the run: at the first node's store, or at another's when that store or node is lost."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from launch.nodes.claims import Claim, ClaimError, Claims
from launch.nodes.link import Link, OtherProgramError, StoreLostError, difference
from launch.nodes.rendezvous import RendezvousParameters
from launch.nodes.store import DEPARTED_SECONDS, IN_USE, READY, Identity
from launch.signals import blocked_requests
from longcat.errors import ConfigError
from longcat.json_text import dumps

RETRY_SECONDS = 0.5
SILENT_SECONDS = 30.0  # for which what listens at the address may be a store that is only slow
ALIVE_SECONDS = 2.0  # of silence: the first node sends a heartbeat every half second
CHECK_SECONDS = 2.0  # between the first node's looks for a claim above its own
RENEWALS = 4  # of the lease within the time after which it is old
TURN_SECONDS = 2.0  # between the attempts of the nodes to become the first one
LAST_TURN = 30


class Meeting:
    """A node runner's way to the others.

    With `claims`, whoever starts a store claims the next number in the run folder, and the highest claim holds: nodes
    that have lost their store or their first node meet there, and a first node whose claim is not the highest gives up.
    No node claims the next number while the first one's lease is renewed.

    Args:
        claims: of the run folder; None where the loss of the store ends the run.
        timeout: seconds without an answer or a heartbeat after which a store or a node is lost.
    """

    link: Link

    def __init__(
        self,
        place: RendezvousParameters,
        identity: Identity,
        claims: Claims | None,
        timeout: float,
        stopped: Callable[[], bool],
    ) -> None:
        self.place, self.identity, self.claims, self.timeout, self.stopped = place, identity, claims, timeout, stopped
        self.server: subprocess.Popen[str] | None = None
        self.number = 0  # of the claim of the store that this node is connected to
        self.own = self.end_number = 0  # of this node's claims: of its store, of the run's end
        self.checked = self.renewed = 0.0
        self.seen: dict[int, float] = {}  # other runs' claims → when their leases had been renewed at the first look
        self.silent_since: float | None = None

    @property
    def is_first(self) -> bool:
        """Whether the store is this node's."""
        return self.server is not None

    def begin(self, deadline: float) -> None:
        """Connect to the first node's store, which may not have started yet, or start it where this is the first node.

        Args:
            deadline: of `time.monotonic`.

        Raises:
            ConfigError: nobody is at the address, another program or another run is, or another has the run folder.
            ClaimError: the run folder cannot be read or written.
            InterruptedError: a stop signal came first.
        """
        place = self.place
        while True:
            claim = self.claims.newest() if self.claims is not None else None
            if claim is not None and claim.code is None:
                self._refuse_other_run(claim, time.monotonic() > deadline)
                if claim.identity == self.identity and self._connect_to_claim(claim):
                    return
            above = claim.number if claim is not None else self._highest()
            has_ended = claim is not None and claim.code is not None
            is_free = self.claims is None or has_ended or not self._is_held(claim, above)
            if place.may_be_first and is_free and self._serve(place.host, [place.port], above):
                return
            error = self._connect_to_place()
            if error is None:
                return
            if self.stopped():
                raise InterruptedError
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"no first node of this run at {place.host}:{place.port} (launch.join_seconds); start longcat "
                    f"train on it with the same launch.rendezvous, or correct the address"
                ) from error
            time.sleep(RETRY_SECONDS)

    def again(self, turn: int, deadline: float) -> int | None:
        """After a loss: connect to the store of the highest claim, or start one when it is this node's turn to.

        Its turn comes when the lease of the highest claim is old, or is this node's own.

        The caller has ended its ranks.

        Args:
            turn: 0 for the node that is to try at once.
            deadline: of `time.monotonic`.

        Returns:
            The run's exit code if it has ended meanwhile.

        Raises:
            StoreLostError: neither succeeded.
            ConfigError: another run has taken the run folder.
        """
        assert self.claims is not None
        own, own_address = self.own, self.link.host if self.is_first else self.link.own_address
        self.close()
        due: float | None = None
        problem = "no node has taken the place of the first one (launch.join_seconds)"
        while True:
            try:
                claim = self.claims.newest()
                if claim is not None and claim.number > self.number:
                    if claim.identity != self.identity:
                        raise ConfigError(self._describe_other_run(claim))
                    if claim.code is not None:
                        return claim.code
                is_open = claim is not None and claim.code is None and claim.number != own
                if claim is not None and is_open and self._connect_to_claim(claim):
                    return None  # perhaps to the same store: only the way to it was lost
                above = claim.number if claim is not None else self.claims.highest()
                if self._is_held(claim, above):
                    due = None
                elif due is None:
                    due = time.monotonic() + TURN_SECONDS * min(turn, LAST_TURN)
                ports = [self.place.port, free_port(), free_port()]
                if due is not None and time.monotonic() >= due and self._serve(own_address, ports, above):
                    return None
            except ClaimError as error:  # perhaps not for long
                problem = str(error)
            if time.monotonic() > deadline:
                raise StoreLostError(problem)
            time.sleep(RETRY_SECONDS)

    def check(self) -> None:
        """On the first node, now and then: whether it still is, as far as the run folder can be read now.

        Raises:
            StoreLostError: another node has claimed to be.
        """
        with suppress(ClaimError):
            self._check()

    def check_before_start(self) -> None:
        """On the first node: `check`, which waits for a run folder that cannot be read.

        Raises:
            StoreLostError: another node has claimed to be.
            ClaimError: the run folder cannot be read for `timeout` seconds.
        """
        give_up = time.monotonic() + self.timeout
        while True:
            try:
                return self._check()
            except ClaimError:
                if time.monotonic() > give_up:
                    raise
            time.sleep(RETRY_SECONDS)

    def _check(self) -> None:
        self.checked = time.monotonic()
        if self.is_first and self.claims is not None:
            highest = self.claims.highest()
            if highest > self.own and highest != self.end_number:
                raise StoreLostError("another node has become the first one")

    def check_sometimes(self) -> None:
        """On the first node, often: renew the lease and `check` when it is time to."""
        now = time.monotonic()
        if self.is_first and self.claims is not None and now - self.renewed > self.timeout / RENEWALS:
            self.renewed = now
            self.claims.renew(self.own)
        if now - self.checked > CHECK_SECONDS:
            self.check()

    def end(self, code: int) -> bool:
        """On the first node: the run has ended with this code. False if another node has become the first one.

        Raises:
            ClaimError: it cannot be written; a node that finds no store any more does not learn the code.
        """
        if self.claims is None:
            return True
        self.end_number = self.own + 1  # before it is there: another thread looks for higher claims
        is_taken = self.claims.take(Claim(self.end_number, self.place.name, self.link.host, 0, self.identity, code))
        if not is_taken:
            self.end_number = 0
        return is_taken

    def is_others(self) -> bool:
        """Whether another node leads the run, or has ended it, so that this one must not write how it ended."""
        if self.claims is None:
            return False
        try:
            claim = self.claims.newest()
            return claim is not None and claim.number != self.own and (claim.code is not None or self._is_held(claim))
        except ClaimError:
            return False

    def close(self) -> None:
        """End the connection, and the store if it is this node's."""
        if hasattr(self, "link"):
            self.link.end()
        if self.own and self.claims is not None:
            self.claims.release(self.own)
            self.own = 0
        if self.server is not None:
            self.server.kill()
            self.server.wait()
            self.server = None

    def _serve(self, host: str, ports: list[int], above: int) -> bool:
        """Start a store on the first free port and claim it with the number after ``above``."""
        for port in ports:
            self.server = start_store(port, 2 * self.timeout, self.identity)
            if self.server is not None:
                break
        else:
            return False
        try:
            self.link = Link(host, port, self.identity, self.timeout)
            if self.claims is not None:
                claim = Claim(above + 1, self.place.name, host, port, self.identity)
                if not self.claims.take(claim):
                    self.close()
                    return False
                self.own = self.number = claim.number
                self.renewed = time.monotonic()
        except (OSError, OtherProgramError):
            self.close()
            return False
        except ClaimError:
            self.close()
            raise
        return True

    def _highest(self) -> int:
        return self.claims.highest() if self.claims is not None else 0

    def _is_held(self, claim: Claim | None, number: int = 0) -> bool:
        """Whether the node that made the highest claim may still be the first one.

        Args:
            number: of the claim where its file cannot be read.
        """
        assert self.claims is not None
        if claim is not None and claim.machine == socket.gethostname() and not is_process(claim.pid):
            return False
        return self.claims.seconds_since_renewal(claim.number if claim is not None else number) <= self.timeout

    def _refuse_other_run(self, claim: Claim, is_late: bool) -> None:
        """Raise ConfigError if an open claim is that of another run, such as another Slurm job, that lives.

        It does if it renews its lease while this node looks on: that of a killed one may not be old yet.
        """
        assert self.claims is not None
        if claim.identity == self.identity or not self._is_held(claim):
            return
        renewed = self.claims.renewed_at(claim.number)
        if renewed > self.seen.setdefault(claim.number, renewed) or is_late:
            raise ConfigError(self._describe_other_run(claim))

    def _describe_other_run(self, claim: Claim) -> str:
        assert self.claims is not None
        return (
            f"{self.claims.folder} is in use by another run, which {claim.node} ({claim.host}:{claim.port}) leads: "
            f"{difference(self.identity, claim.identity)}; end that run first, or choose another run.name"
        )

    def _connect_to_claim(self, claim: Claim) -> bool:
        try:
            link = Link(claim.host, claim.port, self.identity, self.timeout)
        except (OSError, OtherProgramError, ConfigError):  # the node is lost, or the claim that of an earlier run
            return False
        return self._is_led(link, claim.number)

    def _connect_to_place(self) -> OSError | None:
        """Connect to `launch.rendezvous`; returns why it cannot be done yet.

        Raises:
            ConfigError: another program, or another run, is there.
        """
        place = self.place
        try:
            link = Link(place.host, place.port, self.identity, self.timeout)
            self.silent_since = None
        except TimeoutError as error:
            self.silent_since = self.silent_since or time.monotonic()
            if time.monotonic() - self.silent_since < SILENT_SECONDS:
                return error
            raise ConfigError(
                f"launch.rendezvous: nothing answers at {place.host}:{place.port} within {SILENT_SECONDS:g} s: another "
                f"program than longcat train, or a machine that is too slow; give a free port of the first node"
            ) from error
        except OtherProgramError as error:
            raise ConfigError(
                f"launch.rendezvous: another program than longcat train answers at {place.host}:{place.port}; "
                f"give a free port of the first node, the same on every node"
            ) from error
        except OSError as error:
            return error
        return None if self._is_led(link, self._highest()) else OSError("its first node sends no heartbeat")

    def _is_led(self, link: Link, number: int) -> bool:
        """Keep a connection whose store's first node lives, or has yet to come.

        A store lives on for a while without its first node. A new start must not join it, and ends it where it finds
        that the first node's process on this machine has ended.

        Args:
            number: of the store's claim where its first node has yet to come.
        """
        try:
            about = link.request(about=True)
            first = about["first"]
            if first is None or about["first_silent"] <= ALIVE_SECONDS:
                self.number = number if first is None else first["claim"]
                self.link = link
                return True
            is_here = first["host"] == socket.gethostname()
            if about["first_silent"] > DEPARTED_SECONDS and is_here and not is_process(first["pid"]):
                link.request(end=True)
        except StoreLostError:
            pass  # it ended meanwhile: there is nothing to join
        link.end()
        return False


def describe_self(claim: int) -> dict[str, str | int]:
    """What a store knows of its first node's process."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "claim": claim}


def is_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is another user's: it lives
    return True


def free_port() -> int:
    with socket.create_server(("", 0)) as found:
        return int(found.getsockname()[1])


def start_store(port: int, idle_seconds: float, identity: Identity) -> subprocess.Popen[str] | None:
    """Start the store's process; None if the port is taken, perhaps by the first of several nodes on this machine.

    Raises:
        ConfigError: this machine cannot listen on the port.
    """
    words = [sys.executable, "-P", "-m", "launch.nodes.store", str(port), str(idle_seconds), dumps(identity)]
    with blocked_requests():
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True, text=True
        )
    assert process.stdout is not None
    answer = process.stdout.readline().strip()
    if answer == READY:
        return process
    process.wait()
    if answer == IN_USE:
        return None
    raise ConfigError(
        f"the store of this run cannot listen on port {port}: {answer}; "
        f"give another port in launch.rendezvous=HOST:PORT, on every node"
    )
