"""Ctrl-C inside `deferred_interrupt`: the first waits and is never lost, the second ends it at once."""

from __future__ import annotations

import os
import signal

import pytest

from train.process.stop import deferred_interrupt

pytestmark = pytest.mark.usefixtures("heeds_ctrl_c")


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_is_not_lost_where_the_save_fails() -> None:
    with pytest.raises(KeyboardInterrupt) as stopped, deferred_interrupt():
        ctrl_c()
        raise OSError("not saved")
    assert isinstance(stopped.value.__context__, OSError)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_ends_a_save_that_hangs() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt, match="second Ctrl-C"), deferred_interrupt():
        ctrl_c()
        reached.append("after the first")
        ctrl_c()
        reached.append("after the second")
    assert reached == ["after the first"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_under_torchrun_one_ctrl_c_may_arrive_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    reached = False
    with pytest.raises(KeyboardInterrupt), deferred_interrupt():
        ctrl_c()
        ctrl_c()
        reached = True
    assert reached
