"""Do `longcat plan` and the clock put layouts in the same order? Ten layouts, planned and timed on this machine.

    .venv/bin/python -m benchmarks.plan_order
    sudo .venv/bin/python -m benchmarks.plan_order --links loopback shaped --out order.json

First `launch/plan/calibrate.py` measures this machine on two ranks. Then each of `LAYOUTS`, which were written down
before any was timed, is planned with these figures, and its ranks train. Rounds go through all layouts, so that a slow
minute slows all of them; the median step counts. Beside it stand the processor seconds of all ranks together, which
other programs on the machine change less. On the shaped link, ranks of the first half are in one network namespace and
the others in a second one (`benchmarks/link.py`). The result is Spearman's rank correlation.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import print_json, print_table
from benchmarks.link import ADDRESSES, DEVICES, inside, shaped_link
from launch.plan.cluster import Cluster, find_cluster
from longcat.errors import ConfigError

COMMON = (
    "model=debug",
    "model.num_layers=4",
    "train.sequence_length=256",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "schedule.warmup_steps=0",
    "sdc.every=0",
)
WORKERS = 4  # processes: the most ranks of a layout
MBIT = 400.0  # of the shaped link
WANTED = 0.85  # correlation
STEPS = 2  # timed, of each layout and round, after one that is not
PORT = 29600


class Layout(NamedTuple):
    """Ranks, and what differs from `COMMON`."""

    ranks: int
    overrides: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join([str(self.ranks), *(one.removeprefix("parallel.") for one in self.overrides)])


LAYOUTS = (
    Layout(2, ("parallel.fsdp=2",)),
    Layout(2, ("parallel.ep=2",)),
    Layout(2, ("parallel.ep=2", "parallel.recompute=full")),
    Layout(2, ("parallel.dp=2", "parallel.fsdp=1")),
    Layout(2, ("parallel.cp=2", "parallel.ep=2")),
    Layout(2, ("parallel.tp=2", "parallel.ep=2")),
    Layout(2, ("parallel.pp=2", "parallel.schedule=zbv")),
    Layout(4, ("parallel.ep=4",)),
    Layout(4, ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=1f1b", "parallel.recompute=full")),
    Layout(4, ("parallel.tp=2", "parallel.cp=2", "parallel.ep=4")),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", nargs="*", default=["loopback"], choices=["loopback", "shaped"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the result as JSON")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def rank_of(worker: int, layout: Layout) -> int | None:
    """The rank of one of the four processes; None if it has none. The first half of the ranks is in the first half."""
    each = WORKERS // layout.ranks
    return None if worker % each else worker // each


def serve(worker: int, rounds: int, folder: Path) -> None:
    """A process: trains each layout in which it is a rank, in turn, and writes the seconds of its steps.

    Each in a process of its own with the modules imported here: groups of one layout must not meet those of the next.
    """
    import train.step  # noqa: F401  (imports torch once)

    context = multiprocessing.get_context("fork")
    found: list[list[tuple[float, float]]] = [[] for _ in LAYOUTS]
    for number in range(rounds * len(LAYOUTS)):
        layout = LAYOUTS[number % len(LAYOUTS)]
        rank = rank_of(worker, layout)
        if rank is not None:
            sizes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": layout.ranks, "MASTER_PORT": PORT + number}
            os.environ |= {name: str(value) for name, value in sizes.items()}
            receiving, sending = context.Pipe(duplex=False)
            process = context.Process(target=answer, args=(layout, sending))
            process.start()
            sending.close()  # so that the end of a rank that fails is seen here
            found[number % len(LAYOUTS)] += receiving.recv()
            process.join()
        Path(folder, f"{worker}.done.{number}").touch()
        while not all(Path(folder, f"{other}.done.{number}").exists() for other in range(WORKERS)):
            time.sleep(0.02)  # a process that a layout leaves out must not start the next one
    Path(folder, f"{worker}.json").write_text(json.dumps(found))


def answer(layout: Layout, sending: Any) -> None:
    sending.send(train_layout(layout))


def train_layout(layout: Layout) -> list[tuple[float, float]]:
    """(seconds, processor seconds) of this rank's steps."""
    import torch
    import torch.distributed as dist

    from parallel.device import keep_freed_memory
    from parallel.mesh import connect
    from tests.support.running import RandomSamples
    from train.batches import BatchReader
    from train.compose import compose
    from train.run import build_state, resolve_dtype
    from train.step import Stepper

    torch.set_num_threads(1)
    keep_freed_memory()
    config = compose([*COMMON, *layout.overrides])
    topology = connect(config.parallel)
    resolve_dtype(config)
    state = build_state(config, topology)
    samples: Any = RandomSamples(config.train.sequence_length, config.model.vocab_size)
    stepper = Stepper(state, BatchReader(samples, config, topology), config, topology)
    seconds = []
    for _ in range(1 + STEPS):
        dist.barrier()
        start, worked = time.perf_counter(), time.process_time()
        if not stepper.step().healthy:
            raise SystemExit(f"{layout}: a step was not finite, so its time is invalid")
        seconds.append((time.perf_counter() - start, time.process_time() - worked))
    state.engine.close()
    dist.barrier()
    dist.destroy_process_group()
    return seconds[1:]


def start(command: list[str], worker: int, workers: int, shaped: bool, variables: dict[str, str]) -> Any:
    """Start a process, the second half of them in the second namespace if the link is shaped."""
    variables = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", **variables}
    if shaped:
        side = 2 * worker // workers
        variables |= {"MASTER_ADDR": ADDRESSES[0], "GLOO_SOCKET_IFNAME": DEVICES[side]}
        command = inside(side, command)
    return subprocess.Popen(command, env=os.environ | variables)


def wait(processes: Sequence[Any]) -> None:
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"the ranks ended with {codes}")


def calibrate(folder: Path, shaped: bool) -> Cluster:
    """What two ranks reach here, with the shaped link between them or in one node."""
    target = folder / f"measured-{shaped}.yaml"
    local = 1 if shaped else 2
    sizes = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": str(local), "MASTER_PORT": str(PORT - 1 - shaped)}
    command = [sys.executable, "-m", "launch.plan.calibrate", str(target)]
    wait([start(command, r, 2, shaped, {**sizes, "RANK": str(r), "LOCAL_RANK": str(r % local)}) for r in range(2)])
    return find_cluster(str(target))


def clusters(loopback: Cluster, shaped: Cluster | None, ranks: int) -> Cluster:
    """The machine as a layout's ranks see it: one node, or two that share its cores; a node's ranks share its link."""
    if shaped is None:
        return replace(loopback, gpus_per_node=WORKERS)
    cores = max(1, loopback.cores // 2)
    network, latency = shaped.network / (ranks // 2), shaped.network_latency
    return replace(loopback, gpus_per_node=ranks // 2, cores=cores, network=network, network_latency=latency)


def predict(layout: Layout, cluster: Cluster, folder: Path) -> float:
    """Seconds of a step by `longcat plan`."""
    from launch.plan.calibrate import as_yaml
    from launch.plan.plan import plan, read

    path = folder / "cluster.yaml"
    path.write_text(as_yaml(cluster))
    config, options = read([*COMMON, *layout.overrides, f"plan.ranks={layout.ranks}", f"plan.cluster={path}"])
    return plan(config, options, with_knobs=False, factors=(1.0,)).times[1.0].seconds


def measure(shaped: bool, rounds: int, folder: Path) -> list[tuple[float, float]]:
    """(seconds, processor seconds of all ranks) of each layout's median step; a step ends when its last rank does."""
    command = [sys.executable, "-m", "benchmarks.plan_order", "--folder", str(folder), "--rounds", str(rounds)]
    wait([start([*command, "--worker", str(one)], one, WORKERS, shaped, {}) for one in range(WORKERS)])
    by_worker = [json.loads(Path(folder, f"{one}.json").read_text()) for one in range(WORKERS)]
    found = []
    for number, layout in enumerate(LAYOUTS):
        having = [one[number] for worker, one in enumerate(by_worker) if rank_of(worker, layout) is not None]
        steps = list(zip(*having, strict=True))
        seconds = statistics.median(max(wall for wall, _ in step) for step in steps)
        found.append((seconds, statistics.median(sum(worked for _, worked in step) for step in steps)))
    return found


def order(values: Sequence[float]) -> list[float]:
    """Places in ascending order; equal values share the mean of theirs."""
    ascending = sorted(values)
    return [ascending.index(value) + (ascending.count(value) - 1) / 2 for value in values]


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rank correlation."""
    return statistics.correlation(order(one), order(other))


def compare(shaped: bool, rounds: int) -> dict[str, Any]:
    """Measure and plan all layouts over one kind of link."""
    around: AbstractContextManager[Any] = shaped_link(MBIT) if shaped else nullcontext()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loopback = calibrate(folder, False)
        with around:
            over_link = calibrate(folder, True) if shaped else None
            predicted = [predict(one, clusters(loopback, over_link, one.ranks), folder) for one in LAYOUTS]
            measured = measure(shaped, rounds, folder)
    rows = [
        {"layout": str(layout), "predicted_seconds": plan, "measured_seconds": clock, "processor_seconds": worked}
        for layout, plan, (clock, worked) in zip(LAYOUTS, predicted, measured, strict=True)
    ]
    machine = {"node": asdict(loopback), "link": None if over_link is None else asdict(over_link)}
    by_clock, by_work = (spearman(predicted, values) for values in zip(*measured, strict=True))
    load = os.getloadavg()[1]
    return {"correlation": by_clock, "of_work": by_work, "load": load, "layouts": rows, "machine": machine}


def main() -> None:
    args = arguments()
    if args.worker is not None:
        serve(args.worker, args.rounds, args.folder)
        return
    found = {}
    for link in args.links:
        try:
            found[link] = one = compare(link == "shaped", args.rounds)
        except ConfigError as error:
            raise SystemExit(str(error)) from None
        rows = [
            [
                row["layout"],
                *(f"{row[name]:.2f}" for name in ("predicted_seconds", "measured_seconds", "processor_seconds")),
            ]
            for row in sorted(one["layouts"], key=lambda row: row["measured_seconds"])
        ]
        correlations = f"{one['correlation']:.3f}, of work {one['of_work']:.3f}"
        title = f"{link}{f', {MBIT:.0f} Mbit/s' * (link == 'shaped')}: rank correlation {correlations}"
        print_table(f"{title} (wanted {WANTED})", ["layout", "planned, s", "measured, s", "CPU s"], rows)
    print_json("plan_order", {"common": COMMON, "mbit": MBIT, "rounds": args.rounds, **found})
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
