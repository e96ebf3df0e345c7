"""Injected faults are noticed in the same step, on the right rank, and clean training raises no alarm."""

from __future__ import annotations

import json
from typing import Any

import pytest

from longcat.faults import Place
from tests.support.fault_table import RECORDS, read, write
from tests.support.faults import LAYOUTS, campaign, struck_rank
from tests.support.pool import pool

COVERED = (Place.weight, Place.moment, Place.gathered_weight, Place.payload)
IN_MAKE_TEST = {"one process": 150, "fsdp 2, ep 2, bfloat16": 25, "dp 2": 25}
PER_LAYOUT, CHUNK, CLEAN_STEPS = 1250, 50, 1250
SEED = 5


def check(trials: list[dict[str, Any]]) -> None:
    """Every fault that changed something at a covered place was noticed in that step and its rank is suspected."""
    struck = [trial for trial in trials if trial["struck"]]
    for trial in struck:
        if trial["place"] in COVERED:
            assert trial["noticed"] == trial["struck"], f"not noticed at once: {trial}"
            assert trial["rank"] in trial["suspects"], f"another rank is named: {trial}"
        if trial["kind"] in ("operator", "update"):
            assert list(trial["suspects"]) == [trial["rank"]], f"another rank is named: {trial}"
        if trial["place"] == Place.optimizer and trial["layout"].startswith("dp"):
            assert trial["noticed"] == trial["struck"] + 1, f"replicas differ unnoticed: {trial}"
    for trial in trials:
        assert trial["struck"] or trial["harmless"], f"an alarm or a change without a fault: {trial}"
    assert len(struck) > len(trials) / 2


@pytest.mark.parametrize("layout", IN_MAKE_TEST)
def test_faults_are_noticed_and_named(layout: str) -> None:
    ranks, words = LAYOUTS[layout]
    check(struck_rank(pool(ranks).run(campaign, layout, words.split(), range(IN_MAKE_TEST[layout]), SEED, 20)))


@pytest.mark.long
def test_ten_thousand_faults() -> None:
    """Appends to runs/sdc-faults, so that an interrupted run goes on; then writes the measurement."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    for layout, (ranks, words) in LAYOUTS.items():
        path = RECORDS / f"{layout.replace(' ', '-').replace(',', '')}.jsonl"
        done = path.read_text().count('"place"') if path.is_file() else 0
        for first in range(done, PER_LAYOUT, CHUNK):
            numbers = range(first, min(first + CHUNK, PER_LAYOUT))
            last = numbers.stop == PER_LAYOUT
            arguments = (layout, words.split(), numbers, SEED, CLEAN_STEPS if last else 0)
            trials = struck_rank(pool(ranks).run(campaign, *arguments, timeout=3600))
            more = [{"clean_steps": CLEAN_STEPS, "layout": layout}] if last else []
            with path.open("a") as file:
                file.writelines(json.dumps(one) + "\n" for one in (*trials, *more))
    records = read()
    check([one for one in records if "place" in one])
    write(records)
