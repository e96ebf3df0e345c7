"""Variables of torchrun that are left over in a shell: one process trains without them, or a line names them."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.__main__ import main as longcat
from tests.support.fixtures import Refused
from tests.support.running import NARROW, exit_json, run_cleanly

WRONG = {
    "world-without-rank": ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2", "no RANK and no MASTER_ADDR", "unset WORLD_SIZE"]),
    "world-is-text": ({"WORLD_SIZE": "two"}, ["WORLD_SIZE=two", "must be a number", "unset it"]),
    "world-is-empty": ({"WORLD_SIZE": ""}, ["WORLD_SIZE=", "must be a number"]),
    "nobody": ({"WORLD_SIZE": "0", "RANK": "0"}, ["WORLD_SIZE=0", "must be a number"]),
    "rank-is-text": ({"RANK": "first"}, ["RANK=first", "must be a number"]),
    "negative-rank": ({"RANK": "-1"}, ["RANK=-1", "must be a number"]),
    "local-rank-is-text": ({"LOCAL_RANK": "x"}, ["LOCAL_RANK=x", "must be a number"]),
    "local-world-is-text": ({"LOCAL_WORLD_SIZE": "x"}, ["LOCAL_WORLD_SIZE=x", "must be a number"]),
    "no-address": ({"RANK": "0", "WORLD_SIZE": "2"}, ["no MASTER_ADDR and no MASTER_PORT", "torchrun"]),
    "port-is-text": (
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"},
        ["MASTER_PORT=x", "a port"],
    ),
    "port-is-too-large": (
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"},
        ["MASTER_PORT=99999", "a port"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_contradicting_variables_are_refused(
    case: str, overrides: list[str], refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables, parts = WRONG[case]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused(["train", *overrides], *parts)


def test_rank_beyond_the_world_is_refused(
    overrides: list[str], refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("train.run_dir.folder.FIRST_RANK_PRINTS_SECONDS", 0.0)
    refused(["train", *overrides], "RANK=1 and WORLD_SIZE=1", "ranks are 0 to 0", "unset both")


@pytest.mark.parametrize(
    "variables",
    [{"MASTER_ADDR": "elsewhere"}, {"MASTER_ADDR": "elsewhere", "MASTER_PORT": "x"}, {"RANK": "0", "WORLD_SIZE": "1"}],
    ids=["address", "address-and-port", "one-rank"],
)
def test_a_part_of_them_ends_no_run_of_one_process(
    variables: dict[str, str], overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run_cleanly(lambda: longcat(["train", *overrides, *NARROW, "train.steps=1"])) == 0
    assert exit_json(tmp_path / "run")["code"] == 0
