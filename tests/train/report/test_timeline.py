"""The report's picture of a profiled step: tracks, blocked slices, the layer that it shows enlarged."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from parallel.watchdog.events import Event, SpanKind
from tests.support.fabricate_run import fabricate
from tests.train.report.html_page import read
from train.report import write_report
from train.report.timeline import merged, union_length
from train.report.timeline_data import TrackSlice, close_ups, read_timeline
from train.report.timeline_v1 import upgrade


def exchange(track: str, name: str, around: str, times: tuple[float, float], blocked: Any = None) -> dict[str, Any]:
    about = {"lane": track, "name": name, "around": around, "bytes": 141_312, "blocked": blocked}
    return {**about, "start": times[0], "end": times[1]}


def rank_row(rank: int) -> dict[str, Any]:
    """10 ms in the older format: a layer, forward and backward; 1 ms of a dispatch and 1 ms of a sum are exposed."""
    forward, backward = "forward of micro-batch 1", "backward of micro-batch 1"
    return {
        "rank": rank,
        "start": 0.0,
        "end": 10_000.0,
        "exposed_share": 0.2,
        "exposed_seconds": 0.002,
        "compute": [
            ["attention 0, layer 0", 100.0, 900.0],
            ["dense FFN 0, layer 0", 1000.0, 1800.0],
            ["experts, layer 0", 3000.0, 3400.0],
            ["attention 1, layer 0", 3500.0, 4000.0],
            ["dense FFN 1, layer 0", 4000.0, 4400.0],
            ["dense FFN 1, layer 0", 5000.0, 5500.0],
            ["attention 0, layer 0", 7000.0, 8000.0],
            ["<optimizer>", 9000.0, 9100.0],
        ],
        "actions": [["F1, layer 0", 100.0, 4400.0], ["B1, layer 0", 5000.0, 8000.0]],
        "exchanges": [
            exchange("dispatch", "expert dispatch, layer 0", forward, (1000.0, 2900.0), [1900.0, 2900.0]),
            exchange("combine", "expert combine, layer 0", forward, (3400.0, 4200.0), [4400.0, 4401.0]),
            exchange("combine", "expert combine, layer 0", backward, (5000.0, 5400.0)),
            exchange("dispatch", "expert dispatch, layer 0", backward, (6000.0, 6500.0)),
            exchange("gradients", "summed gradients, layers.0", backward, (8000.0, 8999.0), [8000.0, 8999.0]),
        ],
    }


@pytest.fixture(params=["older format", "today's format"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A run folder with timelines in the older format or in today's."""
    convert = upgrade if request.param == "today's format" else dict
    folder = fabricate(tmp_path / "run", steps=40, extras=False, routing_rows=0)
    (folder / "traces").mkdir()
    for step in (3, 12):
        step_row = {"step": step, "world_size": 2, "ranks": [convert(rank_row(0)), convert(rank_row(1))]}
        (folder / "traces" / f"timeline-{step:06}.json").write_text(json.dumps(step_row))
    return folder


def test_last_profiled_step_is_drawn_with_its_exposed_share(run: Path) -> None:
    html, page = read(write_report(run))
    assert {"Timeline", "Step 12", "Layer 0, forward of micro-batch 1"} <= set(page.heads)
    assert "Step 3" not in page.heads
    assert "20.0\u202f% of step 12 is exposed communication, the mean over all ranks" in page.text
    assert "dispatch 10.0\u202f%, gradients 10.0\u202f%" in page.text
    assert "Exposed communication" in page.text
    assert html.count('aria-label="compute"') == 2 + 2
    assert "expert dispatch, layer 0: 141 kB sent, in forward of micro-batch 1: 1.90\u202fms" in html
    assert "<optimizer>" not in html


def test_close_up_shows_a_full_layer_in_both_directions(run: Path) -> None:
    found = read_timeline(run, [])
    assert found is not None
    forward, backward = close_ups(found)
    assert forward.title == "Layer 0, forward of micro-batch 1" and backward.title.startswith("Layer 0, backward")
    assert forward.start < 100 and 4400 < forward.end < 5000
    assert 4900 < backward.start < 5000 and 8000 < backward.end < 8999


def test_without_expert_collectives_only_the_step_is_drawn(run: Path) -> None:
    row = rank_row(0) | {"exchanges": []}
    step_row = {"step": 20, "world_size": 64, "ranks": [row]}
    (run / "traces" / "timeline-000020.json").write_text(json.dumps(step_row))
    page = read(write_report(run))[1]
    assert "Step 20" in page.heads and not any(head.startswith("Layer") for head in page.heads)
    assert "mean over the first 1 of 64 ranks" in page.text


@pytest.mark.parametrize(
    "content", ["", "[]", '{"step": 1, "world_size": 1, "ranks": []}', '{"step": 1, "ranks": [{}]}']
)
def test_damaged_timeline_is_reported_in_the_footer(run: Path, content: str) -> None:
    (run / "traces" / "timeline-000099.json").write_text(content)
    page = read(write_report(run))[1]
    assert "timeline-000099.json is left out" in page.text and "Timeline" not in page.heads


def test_adjacent_spans_are_drawn_as_one() -> None:
    assert merged([(5, 9), (0, 2), (3, 4), (20, 21)]) == [(0, 9), (20, 21)]
    event = Event(SpanKind.EXPERT_DISPATCH)
    slices = [TrackSlice("dispatch", event, "", *times) for times in ((0.0, 4.0), (2.0, 5.0), (7.0, 8.0))]
    assert union_length(slices) == 6.0


def test_every_colour_of_the_timeline_is_in_its_legend(run: Path) -> None:
    html, page = read(write_report(run))
    section = html[html.index('<section id="timeline"') :].split("</section>")[0]
    legend = "".join(re.findall(r'<p class="keys">.*?</p>', section))
    drawn = set(re.findall(r'<path class="(c\d|rest|blocked)"', section))
    assert {"c0", "c1", "c2", "c3", "c6", "rest", "blocked"} == drawn
    assert drawn <= set(re.findall(r"<i class=(\w+)>", legend))
    for name in ("dispatch: tokens to their experts", "combine: results back", "gradients and weights", "other"):
        assert name in page.text
    assert "tensor parallelism" not in page.text, "no such communication in this step"
