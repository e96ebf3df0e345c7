"""A checkpoint of any layout and either sharding engine loads into any other: the same hash of the whole state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.mesh import Topology, group_beside_training, make_topology, resolve_sizes, world_from_environment
from tests.parity.measure import MODEL, RandomSamples
from tests.parity.pool import close_pools, pool
from train.batches import BatchReader
from train.checkpoint import Keep, load
from train.config import compose
from train.folder import as_mapping
from train.run import build_state
from train.stage import Stage
from train.state import TrainState
from train.state_hash import state_hash
from train.step import Stepper
from train.writing import Side, Snapshot, write

LAYOUTS = {
    "ep2": ["parallel.ep=2"],
    "tp2-ep2": ["parallel.tp=2", "parallel.ep=2"],
    "cp2": ["parallel.cp=2"],
    "pp2-zbv": ["parallel.pp=2"],
    "pp2-1f1b": ["parallel.pp=2", "parallel.schedule=1f1b"],
    "zero1-ep2": ["parallel.sharding=zero1", "parallel.ep=2"],
    "zero3": ["parallel.sharding=zero3"],
}


@pytest.fixture(scope="module", autouse=True)
def _pools() -> Iterator[None]:
    yield
    close_pools()


def save_staged(state: TrainState, folder: Path, configuration: dict[str, Any], topology: Topology) -> Path:
    """As training saves: from a copy, on a group of its own. The state itself may change meanwhile."""
    stage = Stage(topology.device)
    snapshot = stage.copy(lambda take: Snapshot.of(state, configuration, topology, take=take))
    for held in state.store.held(write=True):
        held.values.zero_()
    return write(snapshot, folder, topology, Keep(), Side(group_beside_training(60)))


def write_and_load(folder: str, written: list[str], loaded: dict[str, list[str]]) -> tuple[str, dict[str, str]]:
    """Train two steps and save in one layout; load in all: the hash when saving, and the hashes after loading."""
    rank, _, world_size = world_from_environment()
    before = ""
    after = {}
    for name, layout in {"": written, **loaded}.items():
        config = compose([*MODEL, *layout])
        topology = make_topology(resolve_sizes(config.parallel, world_size), rank, world_size, torch.device("cpu"))
        state = build_state(config, topology)
        if not name:
            reader = BatchReader(RandomSamples(), config, topology)  # type: ignore[arg-type]
            stepper = Stepper(state, reader, config, topology)
            assert all(stepper.step().healthy for _ in range(2))
            before, path = state_hash(state, topology), save_staged(state, Path(folder), as_mapping(config), topology)
        else:
            load(state, path, as_mapping(config))
            after[name] = state_hash(state, topology)
        state.engine.close()
    return before, after


@pytest.mark.parametrize("written", LAYOUTS)
def test_loads_into_every_layout(written: str, tmp_path: Path) -> None:
    for before, after in pool(2).run(write_and_load, str(tmp_path), LAYOUTS[written], LAYOUTS):
        assert after == dict.fromkeys(LAYOUTS, before)
