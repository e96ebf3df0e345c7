"""Steps that a neighbouring group of ranks computes too: clean in every layout, and a defective device is named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from longcat.errors import CorruptionError
from longcat.faults import install_hook
from longcat.ops.calls import set_observer
from parallel.mesh import make_topology, resolve_sizes, world_from_environment
from parallel.sdc.replay import Traced
from tests.support.measure import MODEL, samples
from tests.support.pool import close_pools, pool
from train.batches import BatchReader
from train.checkpoint.state_hash import state_hash
from train.compose import compose
from train.run import build_state
from train.sdc.guard import Guard
from train.step import Stepper

SMALL = [
    "model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=64", "model.expert_hidden_size=32",
    "train.global_batch_size=4", "balance.num_groups=2", "data.mask_documents=true",
]  # fmt: skip
REPLAYS = ["sdc.every=1000", "sdc.replay_every=2"]
PACKED = "data.packing=best_fit"
LAYOUTS = {
    "fsdp2": (2, "parallel.fsdp=2"),
    "dp2 elastic, recomputation": (2, f"{PACKED} parallel.dp=2 train.elastic_bits=4 parallel.recompute=full"),
    "fsdp4, ep2, bfloat16": (4, "parallel.fsdp=4 parallel.ep=2 train.dtype=bfloat16"),
    "pp2 zbv, fsdp2": (4, "parallel.pp=2 parallel.schedule=zbv parallel.fsdp=2 model.num_layers=4"),
    "cp2, fsdp2, ep2": (4, "parallel.cp=2 parallel.fsdp=2 parallel.ep=2"),
    "tp2, fsdp2, all-gather": (4, "parallel.tp=2 parallel.fsdp=2 parallel.ep=2 parallel.transport=all_gather"),
    "fsdp4, ep2, chunks, compile": (4, "parallel.fsdp=4 parallel.ep=2 overlap.num_chunks=2 parallel.compile=true"),
    "pp2 1f1b, dp2, late MTP": (4, "parallel.pp=2 parallel.schedule=1f1b parallel.dp=2 loss.mtp_start_tokens=256"),
}
IN_MAKE_TEST = ("dp2 elastic, recomputation", "pp2 1f1b, dp2, late MTP")


@pytest.fixture(scope="module", autouse=True)
def _pools() -> Iterator[None]:
    yield
    close_pools()


def train(words: list[str], steps: int) -> tuple[str, dict[str, Any], list[int]]:
    """Hash of the state or the message of a finding, the finding, and the steps that were replayed. A collective."""
    config = compose([*MODEL, *SMALL, *words])
    rank, _, world_size = world_from_environment()
    topology = make_topology(resolve_sizes(config.parallel, world_size), rank, world_size, torch.device("cpu"))
    state = build_state(config, topology)
    stepper = Stepper(state, BatchReader(samples(config), config, topology), config, topology)  # type: ignore[arg-type]
    replayed = []
    plain = stepper.guard.compare_with_neighbours

    def compare(own: Traced, theirs: Traced) -> None:
        plain(own, theirs)
        names = {name.partition(" ")[0] for name, _ in own}
        assert len(own) == len(theirs) > 50 and "gradient" in names
        assert config.parallel.ep == 1 or {"sent", "received"} <= names
        replayed.append(stepper.guard.step)

    stepper.guard.compare_with_neighbours = compare  # type: ignore[method-assign]
    try:
        for _ in range(steps):
            stepper.step()
        return state_hash(state, topology), {}, replayed
    except CorruptionError as error:
        return str(error), error.details["finding"], replayed
    finally:
        install_hook(None)
        set_observer(None)
        state.engine.close()


@pytest.mark.parametrize(
    "layout",
    [pytest.param(one, marks=[pytest.mark.long] * (one not in IN_MAKE_TEST)) for one in LAYOUTS],
)
def test_replays_agree_and_change_nothing(layout: str) -> None:
    ranks, words = LAYOUTS[layout]
    plain, checked = (pool(ranks).run(train, [*words.split(), *more], 4) for more in (["sdc.replay_every=0"], REPLAYS))
    assert [one[0] for one in plain] == [one[0] for one in checked], "a replay changed the training"
    assert all(one[2] == [2, 4] for one in checked)


@pytest.mark.parametrize(
    ("layout", "strike", "suspects"),
    [
        ("pp2 zbv, fsdp2", "elementwise/lane/step:3/persistent", {0, 1}),
        ("fsdp4, ep2, bfloat16", "activation/bits/step:4/call:9", {1}),
        ("fsdp4, ep2, bfloat16", "activation/row/step:4/name:permute", {1}),
        ("fsdp2", "gradient/bits/step:4/call:20", {1}),
    ],
)
def test_defective_rank_is_named(layout: str, strike: str, suspects: set[int]) -> None:
    """Also in a lane that no permutation can tell from another. Of two groups that always differ both are named."""
    ranks, words = LAYOUTS[layout]
    ends = pool(ranks).run(train, [*words.split(), *REPLAYS, f"sdc.inject={strike}/rank:1"], 4)
    assert all(one == ends[0] for one in ends)
    message, finding, replayed = ends[0]
    assert finding["kind"] == "replay" and replayed == [2, 4], message
    assert {one["rank"] for one in finding["suspects"]} == suspects
    assert ("the fault is transient" in message) == (len(suspects) == 1)


def test_four_ranks_name_the_one() -> None:
    words = ["parallel.fsdp=4", *REPLAYS, "sdc.inject=elementwise/lane/step:3/rank:2/persistent"]
    message, finding, _ = pool(4).run(train, words, 4)[0]
    assert [one["rank"] for one in finding["suspects"]] == [2], message
    assert "the fault is lasting" in message and finding["step"] == 4


def on_other_devices() -> list[str]:
    """The guard's notes where both stages of one data rank have other devices than the other data rank, and not."""
    rank = torch.distributed.get_rank()
    config = compose([*MODEL, *SMALL, *LAYOUTS["pp2 zbv, fsdp2"][1].split(), *REPLAYS])
    topology = make_topology(resolve_sizes(config.parallel, 4), rank, 4, torch.device("cpu"))
    state = build_state(config, topology)
    notes = []
    for name in (f"device {rank % 2}", f"device {rank // 2}"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("train.sdc.guard.arithmetic_of", lambda _, name=name: name)
            guard = Guard(state, config.sdc, topology, config.run.folder, repeats=True)
            notes.append(f"{guard.replay_every} {guard.note}")
    set_observer(None)
    state.engine.close()
    return notes


def test_replays_are_off_between_other_devices() -> None:
    """Stages may be on other devices: they are not compared."""
    different, same = pool(4).run(on_other_devices)[0]
    assert different.startswith("0 sdc.replay_every is off") and "device 0; device 1" in different
    assert same == "2 "


def test_one_group_has_nothing_to_compare() -> None:
    assert pool(1).run(train, REPLAYS, 2)[0][2] == []
