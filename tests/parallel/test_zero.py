"""DeepSpeed's ZeRO on gloo ranks computes what one process computes, with every kind of stage, experts and offload."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from longcat.errors import ConfigError
from longcat.model import LongCat
from parallel import zero_setup
from parallel.flat import Shard, boxes_of_range
from parallel.mesh import ParallelConfig, Topology, connect, resolve_sizes
from parallel.sharding import local_part
from parallel.zero import ZeroEngine
from tests.distributed import run_ranks
from tests.parallel import file_aio
from tests.parallel.exchange import BlockingDispatcher
from tests.parallel.test_sharding import MODEL as SMALL
from tests.parallel.test_sharding import RandomSamples
from train.balance import build_controller
from train.batches import BatchReader
from train.config import Config, compose
from train.objective import objective
from train.optimizer import DECAYED_ROLES, OptimConfig, set_rates
from train.run import build_state
from train.schedule import rate_factor
from train.step import Stepper

MODEL = [*SMALL, "model.num_experts=6", "balance.num_groups=2", "optim.lr_scale.hidden=0.5"]
STEPS = 3

Found = dict[str, Any]  # "initial", "grads", "final": (kind, stored name) → whole tensor or this rank's parts


def make_adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    for group in groups:
        group["lr"] = config.lr * getattr(config.lr_scale, group["role"])
        group["weight_decay"] = config.weight_decay if group["role"] in DECAYED_ROLES else 0.0
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def keep(shards: Any) -> list[tuple[str, str, tuple[int, ...], int, torch.Tensor]]:
    return [(s.kind, s.name, s.shape, s.start, s.values.detach().clone()) for s in shards]


def build(config: Config, topology: Topology) -> ZeroEngine:
    with torch.device("meta"):
        model = LongCat(config.model, config.balance.num_groups)
    dtype = getattr(torch, config.train.dtype)
    engine = ZeroEngine(model, topology, config.parallel, dtype, lambda groups: make_adamw(groups, config.optim))
    if topology.sizes.ep > 1:
        for layer in model.shortcut_layers():
            layer.mlp.dispatcher = BlockingDispatcher(topology.experts["ep"].get_group())
    return engine


def move(engine: ZeroEngine, config: Config, topology: Topology) -> ZeroEngine:
    """The same state under another stage: by logical place, through every rank's shards."""
    everything: list[Any] = [None] * topology.world_size
    torch.distributed.all_gather_object(everything, keep(engine.shards()))
    whole = assemble([{"state": shards} for shards in everything], "state")
    counts = {name: float(step) for name, step in engine.steps()}
    biases = [router.e_score_correction_bias for router in engine.model.routers()]
    engine.close()
    moved = build(config, topology)
    for shard in moved.shards(write=True):
        for box, values in shard.boxes():
            values.copy_(whole[shard.kind, shard.name][tuple(slice(*edge) for edge in box)])
    for name, step in moved.steps():
        step.fill_(counts[name])
    for router, bias in zip(moved.model.routers(), biases, strict=True):
        router.e_score_correction_bias.copy_(bias)
    moved.refresh()
    return moved


def train_zero(overrides: list[str], then: str = "") -> Found:
    """Three steps under DeepSpeed, by hand; the last one under another stage if ``then`` names it."""
    config = compose(overrides)
    topology = connect(config.parallel)
    engine = build(config, topology)
    engine.initialise(config.train.seed)
    found: Found = {"initial": keep(engine.shards()), "counts": [], "norms": [], "losses": []}
    controller = build_controller(config.balance, config.model)
    reader = BatchReader(RandomSamples(), config, topology)  # type: ignore[arg-type]
    for number in range(STEPS):
        if then and number == STEPS - 1:
            config = compose([*overrides, f"parallel.sharding={then}"])
            engine = move(engine, config, topology)
        counts, loss = backward(engine, reader, config, number)
        square = torch.stack((engine.gradient_square(), loss))
        torch.distributed.all_reduce(square)
        norm = float(square[0].sqrt())
        if number == 0:
            found["grads"] = keep(engine.gradients())
        if norm > config.optim.grad_clip:
            engine.scale_gradients(config.optim.grad_clip / norm)
        set_rates(engine.optimizer, config.optim, rate_factor(config.schedule, number + 1))
        engine.step()
        for router, bias in zip(engine.model.routers(), controller.update(counts), strict=True):
            router.e_score_correction_bias.copy_(bias)
        found["counts"].append(counts)
        found["norms"].append(norm)
        found["losses"].append(float(square[1]))
    found["final"] = keep(engine.shards())
    found["steps"] = {name: float(step) for name, step in engine.steps()}
    found["biases"] = torch.stack([router.e_score_correction_bias for router in engine.model.routers()])
    engine.close()
    torch.distributed.destroy_process_group()
    return found


def backward(engine: ZeroEngine, reader: BatchReader, config: Config, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and backward of one global batch: all selections, and this rank's part of the loss."""
    batches = list(reader.read(number * config.train.global_batch_size))
    divisors = reader.divisors(batches)
    mtp = number * divisors.tokens >= config.loss.mtp_start_tokens
    counts, losses = [], []
    for place, batch in enumerate(batches, start=1):
        out = engine.forward(batch.tokens, batch.labels, batch.valid, batch.documents, mtp=mtp)
        assert out.hidden.dtype is getattr(torch, config.train.dtype)
        loss = objective(out, divisors, config.loss, config.balance.group_loss_weight)
        engine.backward(loss, last=place == len(batches), mtp=mtp)
        counts.append(out.counts)
        losses.append(out.lm.detach().double())
    total = torch.stack(counts).sum(0)
    torch.distributed.all_reduce(total)
    return total, torch.stack(losses).sum() / divisors.valid_tokens


def train_alone(overrides: list[str]) -> Found:
    """Three steps of the plain trainer in one process: the reference."""
    config = compose(overrides)
    topology = connect(config.parallel)
    state = build_state(config, topology)

    def whole(grads: bool) -> dict[tuple[str, str], torch.Tensor]:
        kept = {}
        for name, weight in state.parameters:
            if grads:
                if weight.grad is not None:
                    kept["grad", name] = local_part(weight.grad)[0].clone()
                continue
            kept["weight", name] = local_part(weight.detach())[0].clone()
            for kind in ("exp_avg", "exp_avg_sq"):
                kept[kind, name] = local_part(state.optimizer.state[weight][kind])[0].clone()
        return kept

    found: Found = {"initial": whole(grads=False)}
    stepper = Stepper(state, BatchReader(RandomSamples(), config, topology), config, topology)  # type: ignore[arg-type]
    update = stepper._update

    def keep_gradients(*arguments: Any) -> None:
        found.setdefault("grads", whole(grads=True))
        update(*arguments)

    stepper._update = keep_gradients  # type: ignore[method-assign]
    results = [stepper.step(stop_requested=False) for _ in range(STEPS)]
    found["final"] = whole(grads=False)
    found["counts"] = [result.counts for result in results]
    found["norms"] = [result.metrics["grad_norm"] for result in results]
    found["losses"] = [result.metrics["loss"] for result in results]
    found["steps"] = {name: float(state.optimizer.state[weight]["step"]) for name, weight in state.parameters}
    found["biases"] = torch.stack([router.e_score_correction_bias for router in state.model.routers()])
    torch.distributed.destroy_process_group()
    return found


def assemble(ranks: list[Found], moment: str) -> dict[tuple[str, str], torch.Tensor]:
    """Whole stored tensors of the ranks' shards; each element comes from exactly one rank."""
    whole: dict[tuple[str, str], torch.Tensor] = {}
    seen: dict[tuple[str, str], torch.Tensor] = {}
    for found in ranks:
        for kind, name, shape, start, values in found[moment]:
            flat = whole.setdefault((kind, name), torch.full(shape, float("nan"))).view(-1)
            flat[start : start + values.numel()] = values
            seen.setdefault((kind, name), torch.zeros(flat.shape, dtype=torch.int64))[
                start : start + values.numel()
            ] += 1
    for key, times in seen.items():
        assert bool((times == 1).all()), f"{key}: some elements are on no rank, or on several"
    return whole


def error(found: torch.Tensor, reference: torch.Tensor) -> float:
    scale = float(torch.linalg.vector_norm(reference))
    return float(torch.linalg.vector_norm(found - reference)) / max(scale, 1e-30)


def worst(found: dict[tuple[str, str], torch.Tensor], reference: dict[tuple[str, str], torch.Tensor]) -> float:
    return max(error(found[key], value) for key, value in reference.items())


LATE = ["loss.mtp_start_tokens=64"]  # MTP joins in the second step
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "zero1": (2, ["parallel.sharding=zero1"]),
    "zero2": (2, ["parallel.sharding=zero2"]),
    "zero3": (2, ["parallel.sharding=zero3"]),
    "zero1-ep2": (2, ["parallel.sharding=zero1", "parallel.ep=2"]),
    "zero2-cpu": (2, ["parallel.sharding=zero2", "parallel.offload=cpu"]),
    "zero1-ep2-cpu": (2, ["parallel.sharding=zero1", "parallel.ep=2", "parallel.offload=cpu"]),
    "zero3-cpu": (2, ["parallel.sharding=zero3", "parallel.offload=cpu"]),
    "zero3-nvme": (2, ["parallel.sharding=zero3", "parallel.offload=nvme"]),
    "zero1-late-mtp": (2, ["parallel.sharding=zero1", *LATE]),
    "zero3-late-mtp": (2, ["parallel.sharding=zero3", *LATE]),
    "zero1-bfloat16": (2, ["parallel.sharding=zero1", "train.dtype=bfloat16"]),
    "zero3-bfloat16": (2, ["parallel.sharding=zero3", "train.dtype=bfloat16"]),
    "zero1-then-zero3": (2, ["parallel.sharding=zero1"]),
    "zero3-then-zero2": (2, ["parallel.sharding=zero3"]),
    "zero1-dp2-ep2": (4, ["parallel.sharding=zero1", "parallel.dp=2", "parallel.ep=2"]),
    "zero2-ep2": (4, ["parallel.sharding=zero2", "parallel.ep=2"]),
    "zero3-four": (4, ["parallel.sharding=zero3"]),
}


def train_each(layouts: list[str], ports: list[int]) -> dict[str, Found]:
    """All layouts of one number of ranks in the same processes: importing takes longer than training."""
    zero_setup.PERSISTENT_NUMEL = 100  # under ZeRO-3 some weights are gathered and some stay whole
    found = {}
    for layout, port in zip(layouts, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        with tempfile.TemporaryDirectory() as folder:
            keys = [*MODEL, *LAYOUTS[layout][1]]
            if "nvme" in layout:
                file_aio.install()
                keys.append(f"parallel.offload_path={folder}")
            found[layout] = train_zero(keys, *layout.split("-then-")[1:])
            found[layout]["files"] = len(list(Path(folder).rglob("*.swp")))
    return found


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


@cache
def trained(world: int) -> list[dict[str, Found]]:
    layouts = [layout for layout, (ranks, _) in LAYOUTS.items() if ranks == world]
    return run_ranks(train_each, world, layouts, free_ports(len(layouts)), timeout=300)


@cache
def alone(late: bool) -> Found:
    return run_ranks(train_alone, 1, [*MODEL, *LATE * late])[0]


def ranks_of(layout: str) -> list[Found]:
    return [found[layout] for found in trained(LAYOUTS[layout][0])]


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if "bfloat16" not in layout])
def test_training_equals_one_process(layout: str) -> None:
    reference, ranks = alone("late" in layout), ranks_of(layout)
    initial = assemble(ranks, "initial")
    assert initial.keys() == reference["initial"].keys()
    for key, value in reference["initial"].items():
        assert torch.equal(initial[key], value), f"{key} starts with other bits"
    grads, final = assemble(ranks, "grads"), assemble(ranks, "final")
    errors = worst(grads, reference["grads"]), worst(final, reference["final"])
    print(f"{layout}: gradients {errors[0]:.1e}, weights and moments {errors[1]:.1e}")
    assert errors[0] <= 2e-6
    assert errors[1] <= 1e-5
    for found in ranks:
        assert found["norms"] == pytest.approx(reference["norms"], rel=1e-5)
        assert found["losses"] == pytest.approx(reference["losses"], rel=1e-5)
        assert all(torch.equal(mine, its) for mine, its in zip(found["counts"], reference["counts"], strict=True))
        assert torch.equal(found["biases"], reference["biases"])
        assert found["steps"] == reference["steps"]


def test_nvme_offload_uses_files() -> None:
    """Through a stand-in for libaio; what makes a file slow or fast is not tested."""
    assert all(found["files"] >= 10 for found in ranks_of("zero3-nvme")), "weights and moments were left in memory"


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if "bfloat16" in layout])
def test_masters_keep_their_float32_bits_under_bfloat16(layout: str) -> None:
    reference, ranks = alone(False), ranks_of(layout)
    initial, final = assemble(ranks, "initial"), assemble(ranks, "final")
    for key, value in reference["initial"].items():
        assert torch.equal(initial[key], value), f"{key} starts with other bits"
    for (kind, name), value in final.items():
        rounded = (value.bfloat16().float() == value).double().mean()
        assert rounded < 0.2, f"{kind} of {name} looks rounded to bfloat16"
    assert ranks[0]["losses"] == pytest.approx(reference["losses"], rel=0.02)


def test_boxes_cover_a_range_in_order() -> None:
    for shape in ((7,), (3, 5), (3, 4, 5)):
        whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32)
        for start in range(whole.numel()):
            for stop in range(start, whole.numel() + 1):
                shard = Shard("weight", "x", shape, start, whole[start:stop])
                boxes = list(shard.boxes())
                assert len(boxes) <= 2 * len(shape) - 1
                for box, values in boxes:
                    index = tuple(slice(*edge) for edge in box)
                    assert torch.equal(whole.view(shape)[index], values)
                assert sum(values.numel() for _, values in boxes) == stop - start
    assert list(boxes_of_range((3, 5), 4, 4)) == []


@pytest.mark.parametrize(
    "keys,world,cure",
    [
        ({"sharding": "zero1", "pp": 2}, 2, "set parallel.pp=1"),
        ({"sharding": "zero2", "tp": 2}, 2, "set parallel.tp=1"),
        ({"sharding": "zero3", "ep": 2}, 2, "parallel.sharding=zero2"),
        ({"sharding": "zero2", "offload": "nvme"}, 2, "parallel.offload=cpu"),
        ({"sharding": "zero3", "offload": "nvme", "offload_path": "/nowhere"}, 2, "parallel.offload_path"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_with_the_cure(keys: dict[str, Any], world: int, cure: str) -> None:
    config = ParallelConfig(**keys)
    with pytest.raises(ConfigError, match=cure) as refusal:
        zero_setup.check(config, resolve_sizes(config, world))
    assert refusal.value.exit_code == 2


def test_offload_without_deepspeed_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"set one of them"):
        ParallelConfig(offload="cpu").validate()
