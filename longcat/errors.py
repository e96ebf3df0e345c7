"""The errors that end a run with an exit code of their own."""

from __future__ import annotations

OK, CRASHED, BAD_INPUT, STOPPED, UNHEALTHY = 0, 1, 2, 3, 4


class LongCatError(Exception):
    """An expected end of a run: one line for the person, one exit code for the machine."""

    exit_code = CRASHED


class ConfigError(LongCatError):
    """A wrong configuration or input. The message says what, where and what to do; exit code 2."""

    exit_code = BAD_INPUT


class SaveError(LongCatError):
    """A checkpoint could not be written; those before it are untouched. Ends a run with 1 if it was to be the last."""

    def __init__(self, message: str, is_saved: bool = False) -> None:
        """With ``is_saved`` the checkpoint itself is on disk, and only what was to be done beside it failed."""
        super().__init__(message)
        self.is_saved = is_saved


class StopRequested(LongCatError):
    """A signal asked for the end and the state has been saved; exit code 3."""

    exit_code = STOPPED


class UnhealthyError(LongCatError):
    """The numbers went bad (NaN, infinity); names the last good checkpoint; exit code 4."""

    exit_code = UNHEALTHY
