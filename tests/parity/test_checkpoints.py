"""A checkpoint of any layout, sharding engine and number of ranks resumes in any other.

Right after loading, the state hash is the one from before saving. The next step equals the writing run's own next step:
bitwise in the same layout, up to the order of sums in another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from parallel.mesh import Topology, background_group, make_topology, resolve_sizes, world_from_environment
from tests.parity.layouts import Layout
from tests.support.comparison import LATER, largest
from tests.support.measure import MODEL, Piece, assemble, logical, samples
from tests.support.pool import close_pools, pool
from train.batches import BatchReader
from train.checkpoint import load as loading
from train.checkpoint.load import load
from train.checkpoint.retention import Keep
from train.checkpoint.save import Snapshot, write
from train.checkpoint.staging import StagingBuffer
from train.checkpoint.state_hash import state_hash
from train.checkpoint.thread_context import ThreadContext
from train.compose import compose
from train.config import Config
from train.run import build_state
from train.run_dir.folder import as_mapping
from train.state import TrainState
from train.step import Stepper

STEPS = 2  # before the checkpoint
PROBLEM = "two_per_micro_batch"  # its routing has no near-ties: `one_process` asserts it
LAYOUTS = [
    Layout("one", 1, "", PROBLEM),
    Layout("tp2-ep2", 2, "tp=2 ep=2", PROBLEM),
    Layout("pp2-zbv", 2, "pp=2 schedule=zbv", PROBLEM),
    Layout("pp2-1f1b", 2, "pp=2 schedule=1f1b", PROBLEM),
    Layout("zero1-ep2", 2, "sharding=zero1 ep=2", PROBLEM),
    Layout("zero3", 2, "sharding=zero3", PROBLEM),
    Layout("fsdp2-cp2-ep4", 4, "fsdp=2 cp=2 ep=4", PROBLEM),
    Layout("zero2-dp2-fsdp2-ep2", 4, "sharding=zero2 dp=2 fsdp=2 ep=2", PROBLEM),
]
MORE = [
    *LAYOUTS,
    Layout("ep2", 2, "ep=2", PROBLEM),
    Layout("cp2", 2, "cp=2", PROBLEM),
    Layout("zero2", 2, "sharding=zero2", PROBLEM),
    Layout("dp2-fsdp2-ep2", 4, "dp=2 fsdp=2 ep=2", PROBLEM),
    Layout("pp2-zbv-tp2", 4, "pp=2 schedule=zbv tp=2", PROBLEM),
    Layout("zero1-cp2-ep2", 4, "sharding=zero1 fsdp=2 cp=2 ep=2", PROBLEM),
]


@dataclass
class Next:
    """One rank's state after the step that follows the checkpoint, as pieces by kind."""

    hash: str
    first_sample: int
    pieces: dict[str, list[Piece]]
    replicated: dict[str, Tensor]  # biases and the controller's state


@dataclass
class Written:
    """A layout's checkpoint, and the next step of its uninterrupted run."""

    path: Path
    hash: str
    following: list[Next]  # of each rank


@dataclass
class Loaded:
    """One rank's state hash after loading a checkpoint, and its next step."""

    hash: str
    following: Next


@pytest.fixture(scope="module", autouse=True)
def _pools() -> Iterator[None]:
    yield
    close_pools()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], Written]:
    """The checkpoint of a layout; written once."""

    @cache
    def found(layout: Layout) -> Written:
        folder = tmp_path_factory.mktemp(layout.name)
        ranks = pool(layout.ranks).run(write_in, str(folder), layout.overrides)
        assert all(rank.hash == ranks[0].hash for rank in ranks)
        return Written(ranks[0].path, ranks[0].hash, [rank.following[0] for rank in ranks])

    return found


class Run:
    """A state in this rank's layout and its stepper. The constructor and all methods are collectives."""

    def __init__(self, overrides: list[str]) -> None:
        self.config: Config = compose([*MODEL, *overrides])
        rank, _, world_size = world_from_environment()
        sizes = resolve_sizes(self.config.parallel, world_size)
        self.topology: Topology = make_topology(sizes, rank, world_size, torch.device("cpu"))
        self.state: TrainState = build_state(self.config, self.topology)
        reader = BatchReader(samples(self.config), self.config, self.topology)  # type: ignore[arg-type]
        self.stepper = Stepper(self.state, reader, self.config, self.topology)

    def hash(self) -> str:
        return state_hash(self.state, self.topology)

    def step(self) -> Next:
        """Train one step; returns the full state."""
        result = self.stepper.step()
        assert result.healthy
        pieces: dict[str, list[Piece]] = {}
        for shard in self.state.store.local_boxes() if self.state.store.counts_here else ():
            pieces.setdefault(shard.kind, []).extend(logical([shard]))
        replicated = {name: tensor.clone() for name, tensor in self.state.replicated()}
        return Next(self.hash(), result.metrics["first_sample"], pieces, replicated)


def write_in(folder: str, overrides: list[str]) -> Written:
    """Train in this layout, and save as training does: from a staged copy, written after a further step."""
    run = Run(overrides)
    for _ in range(STEPS):
        assert run.stepper.step().healthy
    stage = StagingBuffer(run.topology.device)
    configuration = as_mapping(run.config)
    snapshot = stage.copy(lambda take: Snapshot.of(run.state, configuration, run.topology, take=take))
    before, following = run.hash(), run.step()
    path = write(snapshot, Path(folder), run.topology, Keep(), ThreadContext(background_group(60)))
    run.state.engine.close()
    return Written(path, before, [following])


def load_in(overrides: list[str], paths: list[Path], left_out: list[str]) -> list[Loaded]:
    """Load checkpoints in turn into one state of this layout, each followed by a step.

    Every load but the first must replace all of the state that the step before has left.

    Args:
        left_out: for each checkpoint, what loading omits on purpose (see `forgetting`).
    """
    run = Run(overrides)
    found = []
    for path, forgotten in zip(paths, left_out, strict=True):
        with forgetting(run.state, forgotten):
            load(run.state, path, as_mapping(run.config))
        found.append(Loaded(run.hash(), run.step()))
    run.state.engine.close()
    return found


@contextmanager
def forgetting(state: TrainState, what: str) -> Iterator[None]:
    """Make loading omit tensors whose key starts with ``what``, or one part of its work; "" omits nothing."""
    samples, read = state.counters.samples, loading.read

    def without(tensors: dict[str, Tensor], path: Path) -> Exception | None:
        return read({key: one for key, one in tensors.items() if not (what and key.startswith(what))}, path)

    with patch.object(loading, "read", without), ExitStack() as more:
        if what == "engine's own copies":
            more.enter_context(patch.object(state.store, "refresh"))
        if what == "routers' biases":
            more.enter_context(patch.object(state, "set_biases"))
        yield
    if what == "position in the data":
        state.counters.samples = samples


def errors_of_step(ranks: list[Next], expected: list[Next]) -> dict[str, float]:
    """Largest ‖Δ‖/‖ref‖ over the full logical tensors of each kind."""
    errors = {}
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        ours, theirs = (assemble([rank.pieces.get(kind, []) for rank in context]) for context in (ranks, expected))
        errors[kind] = largest(ours, theirs)
    errors["replicated"] = max(largest(rank.replicated, expected[0].replicated) for rank in ranks)
    return errors


def check_loaded(ranks: Sequence[Loaded], written: Written) -> None:
    assert [rank.hash for rank in ranks] == [written.hash] * len(ranks)


def check_step(ranks: Sequence[Loaded], written: Written, same_layout: bool) -> float:
    """Check the step after loading; returns the largest error."""
    following = [rank.following for rank in ranks]
    assert {one.first_sample for one in following} == {written.following[0].first_sample}
    errors = errors_of_step(following, written.following)
    assert max(errors.values()) <= LATER, errors
    if same_layout:
        assert {one.hash for one in following} == {written.following[0].hash}
    return max(errors.values())


def load_everything(into: Layout, sources: list[Layout], written: Callable[[Layout], Written]) -> None:
    """Load all checkpoints in one layout; prints the largest error of each pair."""
    checkpoints = [written(source) for source in sources]
    paths = [one.path for one in checkpoints]
    ranks = pool(into.ranks).run(load_in, into.overrides, paths, [""] * len(paths))
    worst = []
    for number, (source, expected) in enumerate(zip(sources, checkpoints, strict=True)):
        of_pair = [rank[number] for rank in ranks]
        check_loaded(of_pair, expected)
        worst.append(f"{source.name} {check_step(of_pair, expected, same_layout=source == into):.1e}")
    print(f"into {into.name}: {', '.join(worst)}")


@pytest.mark.parametrize("into", [*LAYOUTS[:3], LAYOUTS[-1]], ids=lambda layout: layout.name)
def test_every_checkpoint_resumes_in_some_layouts(into: Layout, written: Callable[[Layout], Written]) -> None:
    load_everything(into, LAYOUTS, written)


@pytest.mark.long
@pytest.mark.parametrize("into", MORE, ids=lambda layout: layout.name)
def test_every_checkpoint_resumes_in_more_layouts(into: Layout, written: Callable[[Layout], Written]) -> None:
    load_everything(into, MORE, written)


KEYS = ("weight/layers.1", "exp_avg/", "exp_avg_sq/", "optimizer_step/", "bias/", "controller/")
WORK = ("position in the data", "engine's own copies", "routers' biases")
OUT_OF_SIGHT = WORK[1:]  # the state hash does not cover these: only the next step shows them


def test_state_that_is_not_restored_is_detected(written: Callable[[Layout], Written]) -> None:
    source, into = (next(one for one in LAYOUTS if one.name == name) for name in ("one", "zero1-ep2"))
    checkpoint, left_out = written(source), ["", *KEYS, *WORK]
    ranks = pool(into.ranks).run(load_in, into.overrides, [checkpoint.path] * len(left_out), left_out)
    for what, of_load in zip(left_out, zip(*ranks, strict=True), strict=True):
        if not what:
            check_loaded(of_load, checkpoint)
            check_step(of_load, checkpoint, same_layout=False)
            continue
        hashes = {one.hash for one in of_load}
        assert (hashes == {checkpoint.hash}) == (what in OUT_OF_SIGHT), what
        with pytest.raises(AssertionError):
            check_step(of_load, checkpoint, same_layout=False)
