"""The state hash: equal to a slow reference, independent of the layout, changed by every single bit."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from parallel.mesh import connect
from tests.support.distributed import run_ranks
from tests.support.ports import free_ports
from tests.support.running import TINY, trained_state
from train.checkpoint.load import load
from train.checkpoint.save import save
from train.checkpoint.state_hash import COLUMNS, hash_range, state_hash
from train.compose import compose
from train.run import build_state
from train.run_dir.folder import as_mapping
from train.state import TrainState

WORD = 1 << 64

# ------------------------------------------------------------------------------------- a reference in plain integers


def mixed(number: int) -> int:
    """splitmix64 as published: one step of the generator whose state was ``number``."""
    number = (number + 0x9E3779B97F4A7C15) % WORD
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB % WORD
    return number ^ (number >> 31)


def key_of(index: int) -> int:
    row, column = divmod(index, 1 << 15)
    return (mixed(row + (1 << 32)) | 1) * (mixed(column) | 1) % WORD


def name_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") | 1


def slow_sum(values: list[int], start: int = 0) -> int:
    return sum(value * key_of(start + place) for place, value in enumerate(values)) % WORD


def integers(tensor: torch.Tensor) -> list[int]:
    """The values' bits as signed integers, row by row."""
    array = tensor.detach().contiguous().numpy()
    kind = {4: np.int32, 8: np.int64}[array.itemsize]
    return [int(value) for value in np.ascontiguousarray(array).view(kind).ravel()]


def logical(name: str, full: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Stacked experts as single matrices; everything else under its own name."""
    stack, _, leaf = name.rpartition(".")
    if not stack.endswith(".experts"):
        yield (name if name.startswith("lm_head.") else f"model.{name}"), full
        return
    for expert, matrix in enumerate(full):
        if leaf == "down":
            yield f"model.{stack}.{expert}.down_proj.weight", matrix
        else:
            gate, up = matrix.chunk(2)
            yield f"model.{stack}.{expert}.gate_proj.weight", gate
            yield f"model.{stack}.{expert}.up_proj.weight", up


def steps(state: TrainState) -> list[tuple[str, torch.Tensor]]:
    return [(f"optimizer_step/{name}", step) for name, step in state.store.steps()]


def everything(state: TrainState) -> list[tuple[str, torch.Tensor]]:
    return [
        *((local_boxes.key, local_boxes.values) for local_boxes in state.store.local_boxes()),
        *steps(state),
        *state.replicated(),
    ]


def slow_hash(state: TrainState) -> str:
    total = 0
    for local_boxes in state.store.local_boxes():
        for logical_name, matrix in logical(local_boxes.name, local_boxes.values):
            total += name_of(f"{local_boxes.kind}/{logical_name}") * slow_sum(integers(matrix))
    for key, tensor in [*steps(state), *state.replicated()]:
        total += name_of(key) * slow_sum(integers(tensor))
    for key in ("step", "samples", "tokens"):
        total += name_of(f"counter/{key}") * getattr(state.counters, key)
    for key, values in state.health.as_json().items():
        kind = np.float64 if key in ("losses", "norms", "hidden") else np.int64
        total += name_of(f"health/{key}") * slow_sum(integers(torch.from_numpy(np.array(values, kind).reshape(-1))))
    return f"{total % WORD:016x}"


@pytest.fixture(scope="module")
def trained() -> Iterator[tuple[TrainState, Any]]:
    """A state after three steps in this process, and its topology."""
    state, topology, _ = trained_state(TINY, steps=3)
    yield state, topology
    dist.destroy_process_group()


def test_state_hash_equals_the_slow_reference(trained: tuple[TrainState, Any]) -> None:
    state, topology = trained
    names = [name for name, _ in everything(state)]
    assert any("experts.gate_up" in name for name in names) and any("mtp" in name for name in names)
    assert sum(local_boxes.values.numel() for local_boxes in state.store.local_boxes()) > 10_000
    assert len(state.health.losses) == 3
    assert state_hash(state, topology) == slow_hash(state)


# ------------------------------------------------------------------------------------- every bit counts


def raw(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor's own memory."""
    return tensor.detach().numpy().reshape(-1).view(np.uint8)


@given(data=st.data())
def test_state_hash_changes_with_any_bit(data: st.DataObject, trained: tuple[TrainState, Any]) -> None:
    """Of a weight, a moment, a bias, the controller or an optimizer's step count."""
    state, topology = trained
    tensors = everything(state)
    kinds = sorted({name.partition("/")[0] for name, _ in tensors})
    assert kinds == ["bias", "controller", "exp_avg", "exp_avg_sq", "optimizer_step", "weight"]
    kind = data.draw(st.sampled_from(kinds))
    name, tensor = data.draw(st.sampled_from([pair for pair in tensors if pair[0].startswith(f"{kind}/")]))
    memory = raw(tensor)
    place, bit = data.draw(st.integers(0, len(memory) - 1)), data.draw(st.integers(0, 7))
    before = state_hash(state, topology)
    memory[place] ^= 1 << bit
    changed = state_hash(state, topology)
    memory[place] ^= 1 << bit
    assert changed != before, f"bit {bit} of byte {place} of {name}"
    assert state_hash(state, topology) == before


@pytest.mark.parametrize("counter", ["step", "samples", "tokens"])
@pytest.mark.parametrize("bit", [0, 20, 62])
def test_state_hash_changes_with_any_counter(counter: str, bit: int, trained: tuple[TrainState, Any]) -> None:
    state, topology = trained
    before, value = state_hash(state, topology), getattr(state.counters, counter)
    setattr(state.counters, counter, value ^ (1 << bit))
    changed = state_hash(state, topology)
    setattr(state.counters, counter, value)
    assert changed != before and state_hash(state, topology) == before


def test_state_hash_changes_with_the_health_state(trained: tuple[TrainState, Any]) -> None:
    """One bit of a window, an action, a range that is left out, an expert without tokens."""
    state, topology = trained
    before, stored = state_hash(state, topology), state.health.as_json()
    changes: list[dict[str, Any]] = [
        {key: [math.nextafter(stored[key][0], 9.0), *stored[key][1:]]} for key in ("losses", "norms", "hidden")
    ]
    changes += [{"strikes": [2]}, {"skipped": [[4, 8]]}, {"idle": [[0, 1, 2]]}, {"losses": stored["losses"][1:]}]
    hashes = {before}
    for change in changes:
        state.health.restore(stored | change)
        hashes |= {state_hash(state, topology)}
        assert state_hash(state, topology) == slow_hash(state)
    state.health.restore(stored)
    assert len(hashes) == 1 + len(changes) and state_hash(state, topology) == before


def test_state_hash_changes_when_two_values_swap(trained: tuple[TrainState, Any]) -> None:
    """A plain sum would not change."""
    state, topology = trained
    before = state_hash(state, topology)
    rows = dict(everything(state))["weight/embed_tokens.weight"]
    rows[[0, 1]] = rows[[1, 0]]
    assert state_hash(state, topology) != before
    rows[[0, 1]] = rows[[1, 0]]
    assert state_hash(state, topology) == before


# ------------------------------------------------------------------------------------- pieces of a tensor


@given(
    start=st.one_of(st.integers(0, 5), st.integers(COLUMNS - 5, COLUMNS + 5), st.integers(0, 1 << 50)),
    length=st.integers(0, 300),
    cuts=st.lists(st.integers(0, 300), max_size=4),
    seed=st.integers(0, 99),
)
def test_hash_of_a_range_is_the_sum_of_its_parts(start: int, length: int, cuts: list[int], seed: int) -> None:
    values = torch.from_numpy(np.random.default_rng(seed).integers(-(1 << 31), 1 << 31, length, dtype=np.int32))
    full = hash_range(values, start)
    assert full == slow_sum([int(value) for value in values], start)
    edges = [0, *sorted(min(cut, length) for cut in cuts), length]
    parts = [hash_range(values[a:b], start + a) for a, b in pairwise(edges)]
    assert sum(parts) % WORD == full


@pytest.mark.parametrize("start", [0, 1, COLUMNS - 1, COLUMNS, 3 * COLUMNS + 17])
def test_hash_of_a_range_over_several_rows_of_keys(start: int) -> None:
    """2.2 rows long, of 64-bit values."""
    values = torch.from_numpy(np.random.default_rng(start).integers(-(1 << 63), 1 << 63, 72_000, dtype=np.int64))
    assert hash_range(values, start) == slow_sum([int(value) for value in values], start)
    cut = 2 * COLUMNS - start % COLUMNS
    assert (hash_range(values[:cut], start) + hash_range(values[cut:], start + cut)) % WORD == hash_range(values, start)


# ------------------------------------------------------------------------------------- layouts


def hashes_in_layouts(folder: str, layouts: list[list[str]], ports: list[int]) -> list[str]:
    """The hash of one checkpoint's state in each layout of the ranks that run this."""
    found = []
    for layout, port in zip(layouts, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        config = compose([*TINY, "train.seed=5", *layout])
        topology = connect(config.parallel)
        state = build_state(config, topology)
        load(state, Path(folder), as_mapping(config))
        found.append(state_hash(state, topology))
        dist.destroy_process_group()
    return found


def test_state_hash_does_not_depend_on_the_layout(trained: tuple[TrainState, Any], tmp_path: Path) -> None:
    """One process, two shards, two replicas: 3 experts and odd sizes, so shards are uneven and cut experts apart."""
    state, topology = trained
    folder = save(state, tmp_path, as_mapping(compose(TINY)), topology)
    expected = state_hash(state, topology)
    layouts = [["parallel.fsdp=2"], ["parallel.dp=2", "parallel.fsdp=1"]]
    assert run_ranks(hashes_in_layouts, 2, str(folder), layouts, free_ports(2)) == [[expected] * 2] * 2
