"""The errors that end a run, each with its exit code."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

OK, CRASHED, BAD_INPUT, STOPPED, UNHEALTHY, CORRUPT = 0, 1, 2, 3, 4, 5


class LongCatError(Exception):
    """An expected end of a run: its message is one line for the user, `exit_code` is the process's."""

    exit_code = CRASHED
    details: Mapping[str, Any] = MappingProxyType({})  # for machines: keys of exit.json beside code and message


class ConfigError(LongCatError):
    """A wrong configuration or input; exit code 2. The message says what is wrong, where, and how to fix it."""

    exit_code = BAD_INPUT


class FolderInUseError(ConfigError):
    """Another training has the run folder, perhaps not for long: ranks of a lost node outlive it."""


class SaveError(LongCatError):
    """A checkpoint could not be written; earlier ones are untouched. Exit code 1 if it was to be the last one."""

    def __init__(self, message: str, is_saved: bool = False, is_disk_full: bool = False) -> None:
        """With ``is_saved`` the checkpoint itself is on disk, and only a later step failed."""
        super().__init__(message)
        self.is_saved, self.is_disk_full = is_saved, is_disk_full
        if is_disk_full:
            self.details = {"cause": "disk_full"}


class StopRequested(LongCatError):
    """A signal requested the stop and the state has been saved; exit code 3."""

    exit_code = STOPPED


class SlowRankError(StopRequested):
    """A rank is slow and another node can take its place; the state has been saved; exit code 3.

    Args:
        straggler: for exit.json: the ranks with their hosts.
    """

    def __init__(self, message: str, straggler: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.details = {"straggler": straggler}


class MissingRanksError(LongCatError):
    """Ranks did not come to the start, so that the others cannot form groups; exit code 1.

    Args:
        hang: for exit.json: their numbers.
    """

    def __init__(self, message: str, hang: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.details = {"hang": hang}


class SilentStoreError(LongCatError):
    """The store through which ranks meet accepts connections and does not answer; exit code 1."""

    details: Mapping[str, Any] = MappingProxyType({"cause": "store_lost"})


class UnhealthyError(LongCatError):
    """Training became unhealthy (NaN, infinity); exit code 4. The message names the last checkpoint."""

    exit_code = UNHEALTHY


class CorruptionError(LongCatError):
    """Silent data corruption was found; exit code 5. No checkpoint has the corrupt state."""

    exit_code = CORRUPT

    def __init__(self, message: str, finding: dict[str, Any]) -> None:
        """``finding`` goes to exit.json: kind, step, ranks with hosts and devices, layer, operator, tensor."""
        super().__init__(message)
        self.details = {"finding": finding}

    def with_advice(self, clause: str) -> CorruptionError:
        """The same finding, its message followed by a clause."""
        return type(self)(f"{self}; {clause}", self.details["finding"])


class LocalCorruptionError(CorruptionError):
    """As CorruptionError, on this rank alone and in the middle of a step: no collective may follow."""
