"""Bit flips in a run of packed samples: each is reported, or nothing that the run computes depends on it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from longcat.faults import Place, install_hook
from longcat.ops.calls import set_observer
from parallel.sdc.replay import TRACE, Traced, traced
from parallel.sdc.spec import InjectedFault
from tests.support.faults import Everything, Rank
from tests.support.pool import close_pools, pool
from train.checkpoint.state_hash import state_hash

PACKED = ["data.packing=best_fit", "data.mask_documents=true", "train.sequence_length=16", "sdc.every=0"]
SEEDS = 8  # flips of each operator's results


@dataclass(frozen=True)
class Step:
    """One training step."""

    struck: int  # times that the fault changed something
    repeated: list[str]  # operators whose repetition differed
    trace: Traced  # what a replay compares
    loss: float
    state_hash: str


def step(here: Rank, *faults: InjectedFault) -> Step:
    """One step from the same state, in which every call is repeated."""
    here.restore()
    stepper, recomputer = here.stepper(faults), Everything(1)
    recomputer.install(list(here.state.models))
    recomputer.begin_step(here.state.counters.step + 1)
    try:
        with traced() as trace:
            result = stepper.step()
    finally:
        install_hook(None)
        set_observer(None)
    recomputer.end_step()
    repeated = [one.operator for one in recomputer.take()]
    strikes = len(stepper.guard.injector.strikes)
    return Step(strikes, repeated, trace, result.metrics["loss"], state_hash(here.state, here.topology))


def flips() -> tuple[Counter[str], list[str]]:
    """Flips by operator that changed no module's result; and what contradicts the checks' claims."""
    here = Rank(PACKED)
    TRACE.watch(here.state.models)
    calls = {name: count for name, count in here.calls().items() if name.startswith(f"{Place.activation} ")}
    assert len(calls) > 10, calls
    clean, quiet, wrong = step(here), Counter[str](), list[str]()
    assert not clean.repeated
    chance = torch.Generator().manual_seed(0)
    for key, count in sorted(calls.items()):
        name = key.removeprefix(f"{Place.activation} ")
        for seed in range(SEEDS):
            call = 2 * int(torch.randint(count, (1,), generator=chance)) + 1  # behind each call is its repetition
            fault = InjectedFault(
                Place.activation, "bits", here.counters["step"] + 1, call=call, name=name, count=1, seed=seed
            )
            found = step(here, fault)
            if found.struck != 1 or len(found.repeated) != 1:
                wrong.append(f"{fault}: struck {found.struck} times, repetitions that differ: {found.repeated}")
            if found.trace == clean.trace:
                quiet[name] += 1
                if (found.loss, found.state_hash) != (clean.loss, clean.state_hash):
                    wrong.append(f"{fault}: changes the run, and a replay does not see it")
    here.state.engine.close()
    return quiet, wrong


def test_each_flip_is_reported_or_changes_nothing() -> None:
    """A repeated call reports every flip in it; a replay each that changes a module's result, else nothing changes."""
    ((quiet, wrong),) = pool(1).run(flips)
    close_pools()
    assert not wrong, wrong
    # Queries and keys of positions that see nothing but themselves; gates of padding, which zeros replace
    assert quiet["rotary"] and quiet["gates"], quiet
    assert quiet.total() < SEEDS * 3, f"too few flips had an effect: {quiet}"
