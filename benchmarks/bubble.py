"""Bubbles of the pipeline schedules: by formula, by simulation with measured times, and as recorded on ranks.

First one process measures the seconds of a layer's forward (F), input gradient (I) and weight gradient (W), on layers
of equal cost. The simulation runs each schedule's actions with these times. Then ranks run the schedule and record
each action's CPU seconds. Ranks that share cores would slow each other, so a lock admits one action at a time on the
machine, with real messages between ranks. The recorded bubble replays these seconds: each rank in its recorded order,
each action as soon as its inputs are ready. It includes differences between actions, but not the time of messages.

    python -m benchmarks.bubble --ranks 4 --micro-batches 8
"""

from __future__ import annotations

import argparse
import fcntl
import statistics
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from tempfile import NamedTemporaryFile
from typing import IO, Any

import torch
from torch import Tensor

from benchmarks.common import print_json, print_table
from longcat.config import ModelConfig
from longcat.documents import Documents
from longcat.init import initialise
from longcat.model import LongCat, Losses, ModelPart
from parallel.config import ParallelConfig
from parallel.fsdp.sharding import materialise
from parallel.mesh import Axis, connect
from parallel.pipeline.engine import AddLoss, PipelineEngine
from parallel.pipeline.simulation import Action, Simulation, planned, simulate, theory
from parallel.pipeline.stages import STAGES_PER_RANK, num_stages, split, stages_of
from parallel.pipeline.weight_grad_store import WeightGradQueue, defer_weight_gradients
from tests.support.distributed import run_ranks

# A small vocabulary makes embedding and head cheap, so that all stages cost the same
CONFIG = ModelConfig(
    name="bubble", vocab_size=32, num_layers=8, hidden_size=512, num_heads=4, q_lora_rank=128, kv_lora_rank=64,
    qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, ffn_hidden_size=2048, num_experts=8, num_zero_experts=4,
    top_k=3, expected_ffn_experts=2.0, expert_hidden_size=512, num_mtp_layers=0,
)  # fmt: skip
SEED = 1


@dataclass(frozen=True)
class Batch:
    """One micro-batch of random ids [B, S]."""

    tokens: Tensor
    labels: Tensor
    valid: Tensor
    documents: Documents | None = None


@dataclass(frozen=True)
class Times:
    """Seconds of one layer and one micro-batch."""

    forward: float
    inputs: float
    weights: float

    def of(self, action: Action, layers: int) -> float:
        parts = {"F": self.forward, "I": self.inputs, "W": self.weights, "B": self.inputs + self.weights}
        return layers * parts[action.kind]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4, help="sequences per micro-batch")
    parser.add_argument("--length", type=int, default=64, help="tokens per sequence")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of a layer")
    parser.add_argument("--steps", type=int, default=5, help="recorded steps per schedule")
    return parser.parse_args()


def make_batch(number: int, size: int, length: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(CONFIG.vocab_size, (size, length + 1), generator=generator)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(size, length, dtype=torch.bool))


def objective(losses: Losses) -> Tensor:
    return (losses.lm + losses.balance) * 1e-3


def measure(config: ModelConfig, size: int, length: int, rounds: int) -> Times:
    """Median CPU seconds of F, I and W of one inner layer, with one thread and an idle machine."""
    torch.set_num_threads(1)
    model = LongCat(config, part=ModelPart(1, 2, embedding=False, head=False))
    initialise(model, config, SEED)
    queue = WeightGradQueue()
    defer_weight_gradients(model, queue)
    batch = make_batch(0, size, length)
    hidden = torch.randn(size, length, config.hidden_size, generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(rounds + 3):
        x = hidden.clone().requires_grad_()
        moments = [time.thread_time()]
        losses = model(batch.tokens, batch.labels, batch.valid, hidden=x)
        y = AddLoss.apply(losses.hidden, objective(losses))
        moments.append(time.thread_time())
        y.backward(hidden)
        moments.append(time.thread_time())
        queue.take()()
        moments.append(time.thread_time())
        found.append([b - a for a, b in pairwise(moments)])
    return Times(*(statistics.median(part) for part in zip(*found[3:], strict=True)))


def record(schedule: str, config: ModelConfig, args: argparse.Namespace, turn: str) -> list[list[tuple[Action, float]]]:
    """On one rank: each step's actions in order, with their CPU seconds. ``turn`` is a file to lock."""
    topology = connect(ParallelConfig(pp=args.ranks, fsdp=1))
    parts = split(config, num_stages(schedule, args.ranks), args.length)
    models = []
    for stage in stages_of(schedule, args.ranks, topology.coordinate(Axis.PP)):
        model = LongCat(config, part=parts[stage])
        materialise(model, config, SEED, topology.device)
        models.append(model)
    shape = (args.batch, args.length, config.hidden_size)
    pipeline = PipelineEngine(models, topology, schedule, args.micro_batches, shape, torch.float32)
    batches = [make_batch(number, args.batch, args.length) for number in range(args.micro_batches)]
    log: list[tuple[Action, float]] = []
    lock = open(turn)  # noqa: SIM115  (held as long as the rank runs)
    for stage in pipeline.stages:
        watch(stage, log, lock)
    steps = []
    for _ in range(args.steps + 1):
        log.clear()
        pipeline.run(batches, objective, mtp=False)
        steps.append(list(log))
        for model in models:
            model.zero_grad(set_to_none=True)
    torch.distributed.destroy_process_group()
    return steps[1:]


def watch(stage: Any, log: list[tuple[Action, float]], lock: IO[str]) -> None:
    """Make a torch stage log its forward, backward and weight-gradient calls, and run them under the lock."""

    def logged(name: str, kind: str) -> None:
        inner = getattr(stage, name)

        def call(number: int, *positional: Any, **named: Any) -> Any:
            fcntl.flock(lock, fcntl.LOCK_EX)
            start = time.thread_time()
            result = inner(number, *positional, **named)
            took = time.thread_time() - start
            fcntl.flock(lock, fcntl.LOCK_UN)
            split_off = kind == "B" and not named.get("full_backward", True)
            log.append((Action("I" if split_off else kind, stage.stage_index, number), took))
            return result

        setattr(stage, name, call)

    logged("forward_one_chunk", "F")
    logged("backward_one_chunk", "B")
    logged("backward_weight_one_chunk", "W")


def replay(schedule: str, ranks: list[list[list[tuple[Action, float]]]]) -> Simulation:
    """Simulate a step with the recorded seconds: each action's median over steps."""
    orders = {rank: [action for action, _ in steps[0]] for rank, steps in enumerate(ranks)}
    seconds = {
        (rank, action): statistics.median(step[place][1] for step in steps)
        for rank, steps in enumerate(ranks)
        for place, (action, _) in enumerate(steps[0])
    }
    return simulate(schedule, orders, lambda rank, action: seconds[rank, action])


def row(schedule: str, times: Times, config: ModelConfig, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one schedule."""
    ranks = args.ranks
    order = planned(schedule, ranks, args.micro_batches)
    layers = config.num_layers // num_stages(schedule, ranks)
    share = layers * STAGES_PER_RANK[schedule]  # layers of a rank
    simulated = simulate(schedule, order, lambda _, action: times.of(action, layers))
    with NamedTemporaryFile() as turn:
        recordings = run_ranks(record, ranks, schedule, config, args, turn.name, timeout=600)
    recorded_order = {rank: [action for action, _ in steps[0]] for rank, steps in enumerate(recordings)}
    recorded = replay(schedule, recordings)
    idle = theory(schedule, ranks, share * times.forward, share * times.inputs, share * times.weights)
    return {
        "schedule": schedule,
        "theory_bubble": idle / (idle + simulated.busy),
        "simulated_bubble": simulated.bubble,
        "recorded_bubble": recorded.bubble,
        "theory_idle_ms": idle * 1e3,
        "simulated_idle_ms": simulated.idle * 1e3,
        "recorded_idle_ms": recorded.idle * 1e3,
        "simulated_idle_inside_ms": simulated.idle_inside * 1e3,
        "recorded_idle_inside_ms": recorded.idle_inside * 1e3,
        "live_micro_batches": recorded.live_micro_batches,
        "order_as_planned": recorded_order == order,
    }


def show(rows: list[dict[str, Any]], times: Times, args: argparse.Namespace) -> None:
    """Two tables: bubbles as shares of the step, idle seconds relative to 1F1B; and what the words mean."""
    base, kinds = rows[0], ("theory", "simulated", "recorded")
    title = f"bubble of {args.ranks} ranks, {args.micro_batches} micro-batches of {args.batch} x {args.length} tokens"
    shares = [
        [one["schedule"], *(f"{one[f'{kind}_bubble']:.1%}" for kind in kinds), f"{one['live_micro_batches']:g}"]
        for one in rows
    ]
    print_table(title, ["schedule", *kinds, "live micro-batches"], shares)
    against = [
        [
            one["schedule"],
            *(f"{one[f'{kind}_idle_ms'] / base[f'{kind}_idle_ms']:.3f}" for kind in kinds),
            *(f"{one[f'{kind}_idle_inside_ms'] / base[f'{kind}_idle_inside_ms']:.3f}" for kind in kinds[1:]),
        ]
        for one in rows
    ]
    columns = ["schedule", *kinds, "inside, simulated", "inside, recorded"]
    print_table("idle seconds per rank, relative to 1f1b", columns, against)
    f, i, w = (1e3 * value for value in (times.forward, times.inputs, times.weights))
    print(
        f"F : I : W of a layer = 1 : {i / f:.2f} : {w / f:.2f} ({f:.1f}, {i:.1f}, {w:.1f} ms). The bubble is the share "
        f"of the step, from the first start to the last end on all ranks, in which a rank is idle. Inside: the "
        f"worst rank's idle time between its own first start and last end, as papers count it. Recorded: CPU time of "
        f"each action, run while no other rank computes, and replayed in dependency order."
    )


def main() -> None:
    args = arguments()
    config = replace(CONFIG, num_layers=2 * args.ranks)
    times = measure(config, args.batch, args.length, args.rounds)
    rows = [row(schedule, times, config, args) for schedule in ("1f1b", "interleaved", "zbv", "dualpipev")]
    show(rows, times, args)
    seconds = {"forward": times.forward, "inputs": times.inputs, "weights": times.weights}
    print_json("bubble", {**vars(args), "layer_seconds": seconds, "schedules": rows})


if __name__ == "__main__":
    main()
