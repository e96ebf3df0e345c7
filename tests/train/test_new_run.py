"""What a message tells to type, the program accepts: another value of a fixed key goes into a new run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from launch.supervisor.causes import Cause, Fault
from launch.supervisor.decide import End
from launch.supervisor.ledger import Life
from launch.supervisor.node_choice import Choice, Start
from launch.supervisor.page import page
from tests.support.running import NARROW, exit_json, lines, train_here
from train.compose import compose
from train.health.corpora import CorpusWatch
from train.health.events import hidden_growth, small_gradient
from train.new_run import words

ADVICE = re.compile(r"run\.name=NEW[^:;,]*")
BLOWS_UP = ["optim.lr=1e30", "optim.grad_clip=0", "schedule.warmup_steps=0"]


def typed(message: str, name: str, **values: str) -> list[str]:
    """The overrides in a message, filled in."""
    found = ADVICE.search(message)
    assert found, message
    words = found[0].replace("NEW", name).split()
    return [word.replace("…", values.get(word.partition("=")[0].replace(".", "_"), "")) for word in words]


def with_values(words: list[str], changes: list[str]) -> list[str]:
    """An edited command: each key once."""
    keys = [change.partition("=")[0] for change in changes]
    return [*(word for word in words if word.partition("=")[0] not in keys), *changes]


@pytest.mark.parametrize("folder", ["plain/run", "my runs/it's", "lr=0.1,wd=0", "a$b"])
def test_a_path_is_typed_as_shell_and_program_read_it(folder: str) -> None:
    text = " ".join(words("optim.lr", checkpoint=f"/{folder}"))
    found = compose([word.replace("…", "0.1") for word in shlex.split(text)])
    assert found.checkpoint.resume == f"/{folder}"


@pytest.mark.parametrize("kept", [0, 7])
def test_the_page_keeps_where_an_unhealthy_run_began(kept: int) -> None:
    """Its own checkpoint replaces that, where it has one; keys that it gives anew are left out."""
    fault = Fault(Cause.unhealthy, 4, "the loss is not finite")
    start = Start(fault, 0, 9, 0, ("a",), 2.0)
    life = Life(1.0, 2.0, (), 0, kept, 0.0, 0, True)
    command = ["model=debug", "++optim.lr=1", "run.name=old", "checkpoint.resume=/base"]
    text = page("/runs/old", command, ["a"], [start], [life], End(4, "why"), Choice())
    resume = "checkpoint.resume=/runs/old" if kept else "checkpoint.resume=/base"
    (typed,) = (line.split() for line in text.splitlines() if "longcat train" in line and "NEW" in line)
    assert set(typed[2:]) == {"model=debug", "run.name=NEW", "optim.lr=…", resume}


def test_the_cure_for_a_loss_that_is_not_finite_is_accepted(overrides: list[str], tmp_path: Path) -> None:
    words = [*overrides, *NARROW, *BLOWS_UP, "checkpoint.every=1", "train.steps=30"]
    assert train_here(words) == 4
    message = exit_json(tmp_path / "run")["message"]
    changes = typed(message, "cured", optim_lr="0.001")
    assert f"checkpoint.resume={tmp_path}/run/checkpoints/step-" in changes[1]
    assert train_here([*words, "optim.lr=0.001"]) == 2, "not in the same folder"
    healthy = with_values(words, ["run.name=healthy", "optim.lr=0.001", "train.steps=2"])
    assert train_here(healthy) == 0
    changes[1] = f"checkpoint.resume={tmp_path}/healthy"
    assert train_here(with_values(words, [*changes, "run.name=again", "optim.lr=0.0001", "train.steps=4"])) == 0
    assert [row["step"] for row in lines(tmp_path / "again")] == [3, 4]


def test_the_cure_for_biases_that_are_not_finite_is_accepted(overrides: list[str], tmp_path: Path) -> None:
    words = [*overrides, *NARROW, "balance.ki=1e40", "train.steps=2"]
    assert train_here(words) == 4
    changes = typed(
        exit_json(tmp_path / "run")["message"], "cured", balance_ki="0.01", balance_kp="0.01", balance_kd="0"
    )
    assert [change.partition("=")[0] for change in changes] == ["run.name", "balance.ki", "balance.kp", "balance.kd"]
    assert train_here(with_values(words, changes)) == 0


def test_the_cure_for_a_corpus_that_gets_worse_is_accepted(overrides: list[str], corpus: Path, tmp_path: Path) -> None:
    """Its share rises in a stage that has not begun; `data.weights` may not change in the middle of the data."""
    words = [*overrides, *NARROW, f"data.paths=[{corpus},{corpus}]", "data.weights=[1,1]", "train.steps=2"]
    assert train_here(words) == 0
    watch = CorpusWatch(0.1)
    watch.see(1, {"a": 1.0}, 1.0)
    (event,) = watch.see(2, {"a": 2.0}, 1.0)
    stage = f"[{{start_tokens:{2 * 4 * 32},weights:[1.0,3.0]}}]"
    changes = typed(event.text, "cured", optim_lr="0.0001", data_stages=stage)
    changes[1] = changes[1].replace("PATH", str(tmp_path / "run"))
    assert train_here(with_values(words, [*changes, "train.steps=4"])) == 0


@pytest.mark.parametrize("key", ["optim.eps", "optim.lr"])
def test_health_events_name_a_new_run(key: str, overrides: list[str], tmp_path: Path) -> None:
    assert train_here([*overrides, *NARROW, "train.steps=1"]) == 0
    event = small_gradient(5, "head", 1e-9, 1e-8) if key == "optim.eps" else hidden_growth(5, 1e3, 20.0, 9)
    values = {"optim_eps": "1e-12", "optim_lr": "0.0001", "loss_hidden_z_weight": "0.001"}
    changes = typed(event.text, "cured", **values)
    changes[1] = changes[1].replace("PATH", str(tmp_path / "run"))
    assert train_here([*with_values([*overrides, *NARROW], changes), "train.steps=2"]) == 0
