"""How often a step waits for numbers of the device or for all ranks, with tensors that stand in for a device's."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import parallel.state_store
import train.run
from longcat.model import Losses
from parallel.reduce import PendingSum, sum_in_one_collective
from parallel.state_store import members_by_part
from tests.support.distributed import run_ranks
from tests.support.fixtures import corpus, overrides  # noqa: F401  (fixtures)
from tests.support.pool import close_pools, pool
from tests.support.ports import free_port
from tests.support.running import NARROW
from tests.support.steppers import make_stepper
from tests.support.three_steps import MODEL
from train.compose import compose
from train.process.rank import main
from train.step import Stepper

READS = {"cpu", "item", "tolist", "numpy", "nonzero", "__float__", "__int__", "__bool__", "__index__", "__iter__"}
copies: list[str] = []  # by the function that reads


class OnDevice(Tensor):
    """A tensor that stands in for one of a device: what is computed from it is one too, reading it is counted."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        plain = super().__torch_function__(function, types, args, kwargs or {})
        into_host = name == "__setitem__" and not isinstance(args[0], OnDevice)
        into_host |= name.endswith("_") and not name.startswith("__") and not isinstance(args[0], OnDevice)
        if name in READS or into_host:
            copies.append(f"{name} in {caller()}")
            return plain.as_subclass(Tensor) if isinstance(plain, Tensor) else plain
        return plain


def caller() -> str:
    """The function of this project's packages that is running."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if any(f"/{package}/" in path for package in ("train", "parallel", "longcat")) and "/tests/" not in path:
            return f"{path.rpartition('/')[2]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def on_device(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(OnDevice)


@contextmanager
def device_of(stepper: Stepper, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Losses, routers' sums, gradients' norms and what `torch.zeros` makes for the device stand in for a GPU's."""
    engine, norms, zeros = stepper.state.engine, parallel.state_store.foreach_norms, torch.zeros

    def run(*arguments: Any) -> list[list[Losses]]:
        found = plain_run(*arguments)
        copies.clear()  # a layer's are counted below
        for _, router in stepper.state.routers():
            assert router.probability_grad is not None and router.direction is not None
            router.probability_grad, router.direction = on_device(router.probability_grad), on_device(router.direction)
        return [[Losses(*map(on_device, one)) for one in part] for part in found]

    def zeros_like_device(*arguments: Any, device: Any = None, **options: Any) -> Tensor:
        made = zeros(*arguments, device=device, **options)
        return made if device is None else on_device(made)

    plain_run = engine.run
    patch.setattr(engine, "run", run)
    patch.setattr(parallel.state_store, "foreach_norms", lambda tensors: [on_device(one) for one in norms(tensors)])
    patch.setattr(torch, "zeros", zeros_like_device)
    yield
    patch.undo()


def test_a_step_reads_the_device_twice() -> None:
    """Once before the update, once for statistics after it, whatever the number of layers and micro-batches."""
    for layers, micro_batch in ((2, 1), (3, 2)):
        words = [*MODEL, f"model.num_layers={layers}", f"train.micro_batch_size={micro_batch}", "sdc.every=0"]
        (found,) = pool(1).run(copies_of_a_step, words)
        assert found == {"cpu in reduce.py:to_host": 2}


def copies_of_a_step(words: list[str]) -> dict[str, int]:
    stepper, patch = make_stepper(words), pytest.MonkeyPatch()
    assert stepper.step().healthy
    patch.setattr(parallel.state_store.ShardedAdamW, "gradient_squares", squares_of_a_device)
    with device_of(stepper, patch):
        copies.clear()
        assert stepper.step().healthy
    return dict(Counter(copies))


def waits_of_loop(words: list[str], port: int) -> list[dict[str, int]]:
    """Of each step but the last, from its start to that of the next: reads of the device, collectives of all ranks."""
    patch, zeros, build, step = pytest.MonkeyPatch(), torch.zeros, train.run.build_stepper, Stepper.step
    collectives: list[str] = []
    found: list[dict[str, int]] = []

    def zeros_of_state(*arguments: Any, device: Any = None, **options: Any) -> Tensor:
        made = zeros(*arguments, device=device, **options)
        return on_device(made) if device is not None and caller() == "run.py:build_state" else made

    def watch(name: str) -> Callable[..., Any]:
        plain = getattr(dist, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if options.get("group") in (None, dist.group.WORLD):
                collectives.append(f"{name} in {caller()}")
            return plain(*arguments, **options)

        return call

    def watched_stepper(*arguments: Any) -> Stepper:
        stepper = build(*arguments)
        device_of(stepper, patch).__enter__()
        for name in ("all_reduce", "all_gather_object", "broadcast", "broadcast_object_list", "barrier"):
            patch.setattr(dist, name, watch(name))
        return stepper

    def watched_step(self: Stepper, *arguments: Any) -> Any:
        found.append(dict(Counter(copies + collectives)))
        copies.clear()
        collectives.clear()
        return step(self, *arguments)

    patch.setattr(torch, "zeros", zeros_of_state)
    patch.setattr(parallel.state_store.ShardedAdamW, "gradient_squares", squares_of_a_device)
    patch.setattr(train.run, "build_stepper", watched_stepper)
    patch.setattr(Stepper, "step", watched_step)
    os.environ["MASTER_PORT"] = str(port)
    try:
        assert main(compose(words)) == 0
    finally:
        patch.undo()
    return found[1:]


def test_the_loop_waits_no_more_than_its_steps(overrides: list[str]) -> None:  # noqa: F811
    """Metrics, stragglers and requests need no collective and no copy of their own."""
    words = [*overrides, *NARROW, "train.steps=4", "parallel.fsdp=2", "sdc.every=0", "logging.hash_every=0"]
    words += ["logging.routing_every=1"]
    sums = {"all_reduce in reduce.py:sum_over_ranks": 1, "all_reduce in reduce.py:__init__": 1}
    for found in run_ranks(waits_of_loop, 2, words, free_port(), timeout=240):
        assert found == [{"cpu in reduce.py:to_host": 2, **sums}] * 3


def squares_of_a_device(store: Any) -> Tensor:
    """As `gradient_squares` on a GPU."""
    grads = list(store.gradients())
    norms = parallel.state_store.foreach_norms([grad.values for grad in grads])
    parts = [parallel.state_store.part_number(grad.name, store.num_layers) for grad in grads]
    of_tensors = torch.stack(norms).double().square()
    by_part = store._sum_by_part(of_tensors, parts, store.num_layers + len(parallel.state_store.OTHER_PARTS))
    return torch.cat((of_tensors.sum()[None], by_part))


@pytest.fixture(scope="module", autouse=True)
def _pools() -> Iterator[None]:
    yield
    close_pools()


def reads_of_layers(words: list[str]) -> dict[str, int]:
    """Reads of tensors by the host in forward and backward, but those of code that only CPUs run."""
    stepper = make_stepper(words)
    assert stepper.step().healthy
    counted: Counter[str] = Counter()
    patch = pytest.MonkeyPatch()

    def watch(name: str) -> Callable[..., Any]:
        plain = getattr(Tensor, name)

        def read(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            counted[f"{name} in {caller()}"] += 1
            return plain(tensor, *arguments, **options)

        return read

    run = stepper.state.engine.run

    def watched_run(*arguments: Any) -> Any:
        for name in READS - {"cpu", "numpy", "__index__", "__iter__"}:
            patch.setattr(Tensor, name, watch(name))
        try:
            return run(*arguments)
        finally:
            patch.undo()

    stepper.state.engine.run = watched_run  # type: ignore[method-assign]
    assert stepper.step().healthy
    return dict(counted)


CPU_ONLY = ("grouped.py:", "dispatch.py:", "embedding.py:", "rows.py:", "permute", "point_to_point.py:")


def test_a_layer_reads_nothing_but_split_sizes() -> None:
    """On a GPU they are one copy (`streams.to_host`), here three lists; other reads are in operators for CPUs."""
    words = [*MODEL, "parallel.ep=2", "model.num_experts=4", "model.num_mtp_layers=0"]
    for found in pool(2).run(reads_of_layers, words):
        of_layers = {name: count for name, count in found.items() if not any(word in name for word in CPU_ONLY)}
        once = 2 * 2  # layers, micro-batches
        assert of_layers == {"tolist in split_sizes.py:sent": once, "tolist in split_sizes.py:received": 2 * once}


def pending(rank_values: list[float]) -> list[list[float]]:
    rank = torch.distributed.get_rank()
    statistics = PendingSum(torch.tensor(rank_values[rank]), torch.ones(2, dtype=torch.float32))
    first = sum_in_one_collective(torch.tensor([1.0]), torch.tensor([2**40 + rank]))
    return [first[0].tolist(), first[1].tolist(), *(one.flatten().tolist() for one in statistics.wait())]


def test_sums_in_progress_do_not_mix() -> None:
    for found in pool(2).run(pending, [1.5, 2.0]):
        assert found == [[2.0], [float(2**41 + 1)], [3.5], [2.0, 2.0]]


def test_members_of_parts() -> None:
    assert members_by_part([0, 2, 0, 0], 3).tolist() == [[0, 2, 3], [4, 4, 4], [1, 4, 4]]
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 0.0], dtype=torch.float64)
    assert values[members_by_part([0, 2, 0, 0], 3)].sum(1).tolist() == [13.0, 0.0, 2.0]
