"""The corpus and the run of seconds that the tests of training use, and what being refused means."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from launch.__main__ import main as longcat
from tests.support.exporting import checkpoint
from tests.support.running import tidily
from tests.train.conftest import corpus, overrides

__all__ = ["Refused", "checkpoint", "corpus", "one_line_of", "overrides", "refused"]

Refused = Callable[..., str]


def one_line_of(errors: str, *telling: str) -> str:
    """The one line of ``errors`` that starts with `error: `; it holds all the telling words."""
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, errors
    for word in telling:
        assert word in said[0], f"{word!r} is not in {said[0]!r}"
    return said[0]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs `longcat words…`, checks that it ends in 2 with one telling line on standard error, and returns the line."""

    def run(words: list[str], *telling: str) -> str:
        capfd.readouterr()
        code = tidily(lambda: longcat(words))
        errors = capfd.readouterr().err
        assert code == 2, errors
        said = one_line_of(errors, *telling)
        assert errors == f"{said}\n"
        return said

    return run
