"""`profile.steps`: which steps, traces that a viewer can open, timelines that agree with the metrics."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from longcat.errors import ConfigError
from longcat.layer import ShortcutLayer
from parallel.watchdog.events import Event, SpanKind, Track
from tests.support.distributed import run_ranks
from tests.support.ports import free_ports
from tests.support.running import exact, lines, train_here
from train.compose import compose
from train.process.rank import main
from train.profiling.config import steps_of
from train.profiling.recorder import CommSpan, Send, Slice, StepRecorder
from train.profiling.timeline import Operator, compute_slices, outermost, subtract
from train.profiling.trace import TorchEvents, moved, rank_events, rows_of

TWO_RANKS = ["model.num_layers=1", "model.num_experts=4", "model.num_zero_experts=2", "train.steps=3"]
SLEEP = 0.05


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ("", []),
        (None, []),
        (10, [10]),
        ("10", [10]),
        ("10-12", [10, 11, 12]),
        ([3, "5-6", 6], [3, 5, 6]),
        ("2,4", [2, 4]),
    ],
)
def test_steps_are_numbers_ranges_and_lists(given: Any, steps: list[int]) -> None:
    assert steps_of(given) == steps


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("profile.steps=ten", "'ten' is no step; write 10, 10-12 or a list"),
        ("profile.steps=0", "'0' is no step"),
        ("profile.steps=12-10", "'12-10' is no step"),
        ("profile.steps=[3,-4]", "'-4' is no step"),
        ("profile.steps=1.5", "'1.5' is no step"),
        ("profile.steps=1-500", "more than 100 steps"),
        ("profile.steps=40-1001", "more than 100 steps"),
        ("profile.steps=990-1001", "asks for step 1001, but train.steps=1000 is the last one"),
        ("profile.stepz=1", "the nearest is 'profile.steps'"),
    ],
)
def test_wrong_profiling_steps_are_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([override])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def slices_by_track(events: list[dict[str, Any]]) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """(rank, track) → slices, after checking the rules of the format."""
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    found = defaultdict(list)
    for event in events:
        assert event["ph"] in ("X", "M", "i"), event
        if event["ph"] == "X":
            assert event["dur"] >= 0 and event["ts"] >= -1e-3, event
            found[event["pid"], names[event["pid"], event["tid"]]].append(event)
    for track, slices in found.items():
        ends: list[float] = []
        for event in sorted(slices, key=lambda event: (event["ts"], -event["dur"])):
            while ends and ends[-1] <= event["ts"] + 1e-3:
                ends.pop()
            assert not ends or event["ts"] + event["dur"] <= ends[-1] + 5e-3, (
                f"{track}: {event} leaves the slice around it"
            )
            ends.append(event["ts"] + event["dur"])
    return found


def test_overlapping_collectives_get_rows_of_their_own() -> None:
    """Operators are inside their phases."""
    recorder, dispatch = StepRecorder(), Event(SpanKind.EXPERT_DISPATCH, layer=0)
    recorder.comm_spans = [CommSpan(dispatch, None, 1.0 + k, 4.0 + k, 10, (2.0 + k, 4.0 + k)) for k in range(3)]
    operators = [
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0.9e6, "dur": 2e6},
        {"ph": "X", "cat": "cpu_op", "name": "aten::add", "ts": 1e6, "dur": 2.5e6},  # a clock with an offset
    ]
    recorder.phases = [Slice(Event(SpanKind.FORWARD, micro_batch=1), 0.5, 9.0)]
    recorder.sends = [Send(1.0, Event(SpanKind.SEND_HIDDEN_STATES), 5, 1)]
    events = rank_events(3, recorder, TorchEvents(operators, {}))
    found = slices_by_track(moved(events, 0.5e6))
    assert {track for _, track in found} == {"compute", "dispatch", "dispatch (2)", "dispatch (3)"}
    assert [e["cat"] for e in found[3, "dispatch"]] == ["communication", "blocked"]
    assert found[3, "dispatch"][0]["args"].items() >= {"bytes sent": 10, "kind": "expert_dispatch", "layer": 0}.items()
    apart = [[{"cat": "communication", "ts": t, "dur": 1.0}] for t in (0.0, 1.0, 2.0)]
    assert len(rows_of(apart)) == 1


def test_backward_operators_belong_to_their_forward_s_module() -> None:
    attention = Event(SpanKind.ATTENTION, layer=1, sublayer=0)
    modules, phases = [Slice(attention, 0.0, 1.0)], [Slice(Event(SpanKind.BACKWARD, micro_batch=1), 2.0, 3.0)]
    forward = Operator("aten::mm", 0.5, 0.6, 7)
    backward = Operator("autograd::engine::evaluate_function: MmBackward0", 2.1, 2.5, 7)
    inside = Operator("aten::mm", 2.2, 2.3, None)
    loose = Operator("aten::add_", 2.6, 2.7, None)
    operators = [forward, backward, inside, loose]
    slices = compute_slices(outermost(operators), operators, modules, phases)
    assert [one.event for one in slices] == [attention, attention, Event(SpanKind.OTHER)]
    left = subtract(slices, [(0.55, 0.58), (2.4, 2.65)])
    assert [(one.start, one.end) for one in left] == [(0.5, 0.55), (0.58, 0.6), (2.1, 2.4), (2.65, 2.7)]


def _runs(plain: list[str], profiled: list[str], slow: list[str], ports: list[int]) -> None:
    """Three runs on this rank; in the third, rank 1 sleeps before each forward of a layer."""
    for words, port in zip((plain, profiled), ports[:2], strict=True):
        os.environ["MASTER_PORT"] = str(port)
        assert main(compose(words)) == 0
    forward = ShortcutLayer.forward

    def late(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if os.environ["RANK"] == "1":
            time.sleep(SLEEP)
        return forward(self, *arguments, **keywords)

    ShortcutLayer.forward = late  # type: ignore[method-assign]
    os.environ["MASTER_PORT"] = str(ports[2])
    assert main(compose(slow)) == 0


@pytest.fixture(scope="module")
def folders(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders of two ranks: `plain`, `profiled` and `slow`."""
    out = tmp_path_factory.mktemp("profiles")
    words = [
        *("model=debug", "model.vocab_size=512", "model.hidden_size=32", "model.ffn_hidden_size=48"),
        *("model.expert_hidden_size=16", f"data.paths=[{corpus}]", "train.sequence_length=32", "parallel.ep=2"),
        *("train.global_batch_size=4", "validation.every=0", "validation.documents=0", "checkpoint.every=0"),
        *("logging.wandb=disabled", "logging.hash_every=1", f"run.dir={out}", *TWO_RANKS),
    ]
    profiled = [*words, "profile.steps=2-3"]
    runs = ([*words, "run.name=plain"], [*profiled, "run.name=profiled"], [*profiled, "run.name=slow"])
    run_ranks(_runs, 2, *runs, free_ports(3), timeout=120)
    return {name: out / name for name in ("plain", "profiled", "slow")}


def trace(folder: Path, step: int) -> dict[str, Any]:
    return dict(json.loads((folder / "traces" / f"step-{step:06}.json").read_text()))


def timeline(folder: Path, step: int) -> dict[str, Any]:
    return dict(json.loads((folder / "traces" / f"timeline-{step:06}.json").read_text()))


def test_trace_of_two_ranks_is_well_formed(folders: dict[str, Path]) -> None:
    names = sorted(path.name for path in (folders["profiled"] / "traces").iterdir())
    ranks = [f"step-{step:06}-rank-{rank:04}.json.gz" for step in (2, 3) for rank in range(2)]
    assert names == sorted([*ranks, *(f"{kind}-{step:06}.json" for kind in ("step", "timeline") for step in (2, 3))])
    found = slices_by_track(trace(folders["profiled"], 3)["traceEvents"])
    for rank in range(2):
        assert {"compute", "dispatch", "combine", "gradients"} <= {track for owner, track in found if owner == rank}
        assert "expert_combine" in {event.get("args", {}).get("kind") for event in found[rank, "combine"]}
    own = json.loads(gzip.decompress((folders["profiled"] / "traces" / ranks[-1]).read_bytes()))
    assert {event["pid"] for event in own["traceEvents"]} == {1}
    assert {track for _, track in found} - set(Track) <= {
        track for _, track in found if "thread" in track or "(" in track
    }


def test_the_timeline_agrees_with_the_metric(folders: dict[str, Path]) -> None:
    rows = {row["step"]: row for row in lines(folders["profiled"])}
    for step in (2, 3):
        ranks = timeline(folders["profiled"], step)["ranks"]
        share = sum(rank["exposed_seconds"] for rank in ranks) / 2 / rows[step]["step_seconds"]
        # the row's seconds begin with the update of the step before and end at the sum
        assert share == pytest.approx(rows[step]["exposed_comm_share"], rel=0.25)
        for rank in ranks:
            busy = sum(one["end"] - one["start"] for one in rank["compute"])
            assert 0 < busy <= rank["end"] - rank["start"] - 1e6 * rank["exposed_seconds"] + 1
    assert all(0 < row["exposed_comm_share"] < 1 for row in rows.values())


def test_profiling_leaves_results_bitwise_identical(folders: dict[str, Path]) -> None:
    assert exact(folders["profiled"]) == exact(folders["plain"])


def test_slow_rank_shows_in_the_other_s_waits(folders: dict[str, Path]) -> None:
    asleep = 2 * SLEEP  # two micro-batches of one layer
    waits, sleeps = timeline(folders["slow"], 3)["ranks"]
    assert waits["exposed_seconds"] > 0.8 * asleep and waits["exposed_share"] > sleeps["exposed_share"]
    mean = lines(folders["slow"])[-1]
    assert mean["exposed_comm_share"] * mean["step_seconds"] > 0.4 * asleep


def test_single_process_has_a_trace_without_waits(overrides: list[str], tmp_path: Path) -> None:
    assert train_here([*overrides, "train.steps=2", "profile.steps=2"]) == 0
    assert [row["exposed_comm_share"] for row in lines(tmp_path / "run")] == [0.0, 0.0]
    found = slices_by_track(trace(tmp_path / "run", 2)["traceEvents"])
    assert (0, "compute") in found and "Timeline" in (tmp_path / "run" / "report.html").read_text()
    (path,) = (tmp_path / "run" / "traces").glob("timeline-*.json")
    (rank,) = json.loads(path.read_text())["ranks"]
    assert {"head", "attention", "dense_ffn", "experts", "optimizer"} <= {one["kind"] for one in rank["compute"]}
