"""What grows with the number of ranks in a start: counted on few ranks, timed, and projected to thousands.

    python -m benchmarks.startup_scale --out scale.json

Counted on real gloo ranks: requests to the ranks' store, connections and descriptors until the groups are made and
the watchdog runs, as on CPUs and as on GPUs, where gloo connects pairs of ranks when they talk. Timed: the processor
seconds of the store's one thread for each request, of the nodes' store for each heartbeat, and of one rank for the
mesh and for gloo at the full number of ranks, whose others do not exist. Projected: everything else. NCCL, the network
and the file system are not in it.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch.distributed as dist

from benchmarks.counting_store import CountingStore, kept
from launch.fleet import Assignment
from launch.nodes.link import Link, StoreFleet
from launch.nodes.meeting import free_port, start_store
from launch.nodes.node import LOOK_SECONDS
from launch.nodes.store import RanksStore
from launch.pace import leader_pause, node_pause
from launch.plan.trace import fake_topology
from launch.supervisor.loop import POLL_SECONDS
from parallel.config import ParallelConfig
from parallel.environment import lift_descriptor_limit
from parallel.mesh import background_group, connect
from parallel.sizes import resolve_sizes
from parallel.watchdog import watchdog
from parallel.watchdog.heartbeats import HeartbeatStore
from parallel.watchdog.timing import Timing
from parallel.watchdog.turns import READERS
from train.launch_config import LaunchConfig

COUNTED = (4, 8, 16, 32)
PROJECTED = {1024: ParallelConfig(pp=4, fsdp=-1, cp=8, ep=32), 10240: ParallelConfig(pp=8, fsdp=-1, cp=8, ep=32)}
RANKS_OF_A_NODE = 8
TIMEOUT = 600.0  # parallel.timeout_seconds
REQUESTS = 4000  # timed of each kind
HEARTBEAT = b"x" * 600  # about as long as one
EVERYONE = "multi_get"  # of the heartbeats of all ranks
VERDICT_KEY = "watch/0/diagnosis"
NODE_REQUESTS = 6  # to join, agree on the configuration, read the assignment and the ranks' port


def start_as(rank: int, world: int, port: int, lazy: bool, answers: Any) -> None:
    """One rank up to the groups, the watchdog and the group of checkpoints; puts what it counted."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True", GLOO_SOCKET_IFNAME="lo")
    os.environ["TORCH_GLOO_LAZY_INIT"] = str(int(lazy))
    made: Counter[str] = Counter(connection=1)
    plain, files = dist.rendezvous, len(os.listdir("/proc/self/fd"))

    def counted(*arguments: Any, **named: Any) -> Iterator[Any]:
        for store, *others in plain(*arguments, **named):
            yield kept(CountingStore(store, made)), *others

    with patch.object(dist, "rendezvous", counted):
        topology = connect(ParallelConfig(fsdp=-1, ep=2), partial(watchdog.start, TIMEOUT, print, Path()))
        background_group(TIMEOUT)
    watchdog.stop()  # its next heartbeat comes within a second
    found = {**made, "descriptors": len(os.listdir("/proc/self/fd")) - files}
    answers.put((topology.rank, found))
    answers.close()
    answers.join_thread()
    dist.barrier()
    os._exit(0)


def count(world: int, lazy: bool) -> dict[str, int]:
    """The most that a rank of ``world`` real ones asks of the store, connects and opens."""
    context = multiprocessing.get_context("fork")
    answers: Any = context.Queue()
    with RanksStore("127.0.0.1") as store:
        ranks = [
            context.Process(target=start_as, args=(rank, world, store.port, lazy, answers)) for rank in range(world)
        ]
        for process in ranks:
            process.start()
        found = dict(answers.get(timeout=TIMEOUT) for _ in ranks)
        for process in ranks:
            process.join()
    kinds = dict.fromkeys(kind for one in found.values() for kind in one)
    return {kind: max(one.get(kind, 0) for one in found.values()) for kind in kinds}


@contextmanager
def processor_seconds(process: psutil.Process, found: dict[str, float], name: str, times: int) -> Iterator[None]:
    """Processor seconds of another process while the block runs, for each of so many times."""
    before = process.cpu_times()
    yield
    time.sleep(0.05)
    after = process.cpu_times()
    found[name] = (after.user + after.system - before.user - before.system) / times


def store_costs(connections: int) -> dict[str, float]:
    """Processor seconds of the ranks' store for each request, with so many open connections."""
    found: dict[str, float] = {}
    keys, nodes = [f"watch/0/{rank}" for rank in range(max(PROJECTED))], REQUESTS // RANKS_OF_A_NODE
    with RanksStore("127.0.0.1") as store:
        client: Any = dist.TCPStore("127.0.0.1", store.port)
        server = psutil.Process(store.process.pid)
        with processor_seconds(server, found, "connection", connections):
            clones = [client.clone() for _ in range(connections)]
        for key in keys:
            client.set(key, HEARTBEAT)
        kinds: dict[str, Callable[[Any, int], Any]] = {
            "set": lambda one, number: one.set(keys[number], HEARTBEAT),
            "get": lambda one, number: one.get(keys[number]),
            "check": lambda one, number: one.check([VERDICT_KEY]),
            "wait": lambda one, number: one.wait([keys[number]]),
            "add": lambda one, number: one.add("count", 1),
            "append": lambda one, number: one.append(f"on/{number % nodes}", "10000 "),
            "compare_set": lambda one, number: one.compare_set("turn", "", str(number)),
        }
        for kind, ask in kinds.items():
            with processor_seconds(server, found, kind, REQUESTS):
                for number in range(REQUESTS):
                    ask(clones[number % connections], number)
        with processor_seconds(server, found, EVERYONE, 5):
            for _ in range(5):
                client.multi_get(keys)
    return found


def node_costs(nodes: int) -> dict[str, float]:
    """Processor seconds of the nodes' store for a request, and for a look of the first node at all of so many nodes."""
    identity, port, found = {"run": "measured"}, free_port(), dict[str, float]()
    process = start_store(port, 600.0, identity)
    assert process is not None
    try:
        links, names = [Link("127.0.0.1", port, identity, 60.0) for _ in range(nodes)], []
        for number, link in enumerate(links):
            names.append(link.request(join={"token": str(number), "name": f"node{number}", "wanted": number})["name"])
            link.set(f"agreed/{number}", names[-1])
        fleet, server = StoreFleet(links[0], 600.0), psutil.Process(process.pid)
        fleet.start(Assignment(1, tuple(names), RANKS_OF_A_NODE, ()))
        with processor_seconds(server, found, "beat", REQUESTS):
            for number in range(REQUESTS):
                place = number % nodes
                links[place].request(beat=place, read=["job/", "1/control/"])
        with processor_seconds(server, found, "look", REQUESTS // 20):
            for _ in range(REQUESTS // 20):
                fleet.reports(1)
                assert len(fleet.nodes()) == nodes
        for link in links:
            link.end()
    finally:
        process.kill()
        process.wait()
    return found


def node_shares(nodes: int, of_nodes: dict[str, float]) -> dict[str, float]:
    """What so many nodes take of their store's thread while ranks train."""
    beat, most = of_nodes["beat"], max(PROJECTED) // RANKS_OF_A_NODE
    interval = node_pause(LOOK_SECONDS, nodes, LaunchConfig().node_timeout)
    return {
        "nodes_meet_seconds": nodes * NODE_REQUESTS * beat,
        "nodes_round_seconds": nodes * beat,
        "nodes_interval": interval,
        "nodes_share": nodes * beat / interval,
        "look_share": of_nodes["look"] * nodes / most / leader_pause(POLL_SECONDS, nodes),
    }


def mesh_costs(world: int) -> dict[str, float]:
    """Calls that make groups and processor seconds of one rank of ``world`` for the mesh, without others."""
    sizes, calls, plain = resolve_sizes(PROJECTED[world], world), 0, dist.new_group

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return plain(*arguments, **named)

    began = time.process_time()
    with patch.object(dist, "new_group", counted), fake_topology(sizes, world // 2, world):
        return {"group_calls": calls, "mesh_seconds": time.process_time() - began}


def gloo_costs(world: int) -> dict[str, float]:
    """Processor seconds and MiB of one rank of ``world`` for gloo's two groups of all ranks; no other rank exists."""
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"
    made: Counter[str] = Counter()
    began, before = time.process_time(), psutil.Process().memory_info().rss
    store = kept(CountingStore(dist.HashStore(), made))
    dist.init_process_group("gloo", store=store, rank=0, world_size=world)
    background_group(TIMEOUT)
    seconds, grown = time.process_time() - began, psutil.Process().memory_info().rss - before
    return {"gloo_seconds": seconds, "gloo_mib": grown / 2**20, "gloo_requests": made.total()}


def in_new_process(function: Callable[[int], dict[str, float]], argument: int) -> dict[str, float]:
    context = multiprocessing.get_context("fork")
    answers: Any = context.Queue()

    def run() -> None:
        answers.put(function(argument))
        answers.close()
        answers.join_thread()
        os._exit(0)

    process = context.Process(target=run)
    process.start()
    found: dict[str, float] = answers.get(timeout=TIMEOUT)
    process.join()
    return found


def requests_of_a_rank(counted: dict[int, dict[str, int]], kind: str, world: int) -> float:
    """A count at more ranks than were counted: gloo's trees add a peer with each doubling, and nothing else grows."""
    few, many = min(counted), max(counted)
    doublings = math.log2(many / few)
    grown = counted[many].get(kind, 0) - counted[few].get(kind, 0) if kind in ("get", "wait") else 0
    return counted[few].get(kind, 0) + grown * math.log2(world / few) / doublings


def looks() -> list[Counter[str]]:
    """What a waiting rank asks of the store when its wait gets long, and at each later heartbeat; not a reader's."""
    made: Counter[str] = Counter()
    store = kept(CountingStore(dist.HashStore(), made))
    ranks = [watchdog.Watchdog(HeartbeatStore(store, rank, COUNTED[-1]), TIMEOUT, print) for rank in range(READERS + 1)]
    for one in ranks:
        one.store.publish(one.heartbeat())
        one.store.register(one.machine)
        one.wait_turn.take(0.0, TIMEOUT)
    found = []
    for _ in range(2):
        made.clear()
        ranks[-1]._look(ranks[-1].wait_turn, 1.0, lambda: True)
        found.append(Counter(made))
    return found


def diagnosis_costs(world: int, costs: dict[str, float]) -> dict[str, float]:
    """Of a hang of so many ranks: seconds of the store's thread; its share while ranks wait for the diagnosis."""
    one = costs[EVERYONE] / max(PROJECTED)
    first, later = (
        sum(number * (RANKS_OF_A_NODE * one if kind == EVERYONE else costs[kind]) for kind, number in asked.items())
        for asked in looks()
    )
    interval = Timing.of(TIMEOUT, world).heartbeat
    return {
        "diagnosis_seconds": world * (first + 2 * READERS * one),
        "waiting_share": world * (costs["set"] + costs["check"] + later) / interval,
    }


def project(
    world: int, counted: dict[int, dict[str, int]], costs: dict[str, float], of_nodes: dict[str, float]
) -> dict[str, float]:
    """Seconds of a start of ``world`` ranks on GPUs that the stores and this rank's own groups take, by part."""
    nodes = -(-world // RANKS_OF_A_NODE)
    of_rank = {kind: requests_of_a_rank(counted, kind, world) for kind in costs}
    seconds = {kind: world * number * costs[kind] for kind, number in of_rank.items()}
    own = in_new_process(mesh_costs, world) | in_new_process(gloo_costs, world)
    interval = Timing.of(TIMEOUT, world).heartbeat
    return {
        "nodes": nodes,
        "store_requests_a_rank": sum(number for kind, number in of_rank.items() if kind != "connection"),
        "store_connections": world * of_rank["connection"],
        **node_shares(nodes, of_nodes),
        "connect_seconds": seconds.pop("connection"),
        "request_seconds": sum(seconds.values()),
        **own,
        "heartbeat_interval": interval,
        "heartbeat_share": world * (costs["set"] + costs["check"]) / interval,
        "reading_all_heartbeats_seconds": costs[EVERYONE] * world / max(PROJECTED),
        **diagnosis_costs(world, costs),
    }


ROWS = [  # figure, what it is, how it was found; of each number of ranks
    ("group_calls", "calls that make groups, a rank", "counted at that size"),
    ("mesh_seconds", "mesh and its groups, CPU s a rank", "timed at that size, without connections"),
    ("gloo_seconds", "gloo's two groups of all ranks, CPU s a rank", "timed at that size, without connections"),
    ("gloo_mib", "the same, MiB a rank", "measured at that size"),
    ("store_requests_a_rank", "requests to the ranks' store, a rank", "projected"),
    ("store_connections", "connections to the ranks' store", "projected"),
    ("connect_seconds", "they take of the store's thread, s", "projected"),
    ("request_seconds", "the requests take of the store's thread, s", "projected"),
    ("heartbeat_interval", "s between heartbeats of a rank", "by the rule"),
    ("heartbeat_share", "heartbeats' share of the store's thread", "projected"),
    ("reading_all_heartbeats_seconds", "one rank reads all heartbeats, s of the store's thread", "projected"),
    ("diagnosis_seconds", "all ranks hang, and a few read all heartbeats, s of the store's thread", "projected"),
    ("waiting_share", "waiting ranks' share of the store's thread, with heartbeats", "projected"),
    ("nodes_meet_seconds", "nodes join and agree, s of the nodes' store", "projected"),
    ("nodes_round_seconds", "a heartbeat of every node, s of the nodes' store", "projected"),
    ("nodes_interval", "s between heartbeats of a node", "by the rule"),
    ("nodes_share", "nodes' heartbeats' share of their store's thread", "projected"),
    ("look_share", "the first node's looks at all nodes, share of it", "projected"),
]
NOTES = [
    f"Counted on {', '.join(map(str, COUNTED))} gloo ranks with TORCH_GLOO_LAZY_INIT=1, as a run on GPUs sets it. Only "
    "gets and waits grow, by one each with every doubling of the ranks: gloo's trees have a further peer.",
    "Projected: requests × processor seconds of one request, measured at the store's process. One thread serves all: "
    "this is the least time that the store needs; clients wait for it, and they were on the same machine.",
    f"{RANKS_OF_A_NODE} ranks a node, {NODE_REQUESTS} requests of a node until its ranks start; then only heartbeats.",
    f"A hang: every rank reads the heartbeats of its node's {RANKS_OF_A_NODE} ranks and asks for a turn; {READERS} "
    "ranks read all, twice; the others look at each heartbeat whether the reader that they wait for lives.",
    "Layouts: "
    + "; ".join(f"{world:,} ranks with pp={one.pp}, cp={one.cp}, ep={one.ep}" for world, one in PROJECTED.items()),
    "Not in it: NCCL's communicators (two requests a rank and group, when each is first used), the network, reading "
    "Python's files from a shared file system, the sample index, checkpoints.",
]


def short(value: float) -> float | int | str:
    return value if isinstance(value, int) else float(f"{value:.2g}") if value < 100 else f"{value:,.0f}"


def measurement(found: dict[str, Any]) -> dict[str, Any]:
    """As docs/measurements keeps it."""
    projected = found["projected"]
    return {
        "name": "What grows with the number of ranks in a start",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"one of 2 shared cores under other load ({os.getloadavg()[0]:.0f}), no GPU",
        "command": "python -m benchmarks.startup_scale",
        "commit": None,
        "columns": ["what", "how", *(f"{world:,} ranks" for world in PROJECTED)],
        "rows": [[what, how, *(short(projected[world][key]) for world in PROJECTED)] for key, what, how in ROWS],
        "notes": NOTES,
        "counted": {key: found[key] for key in ("as_on_gpus", "as_on_cpus")},
        "seconds": {"store": found["store_seconds"], "nodes": found["node_store_seconds"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=3000, help="open ones while the store is timed")
    parser.add_argument("--out", type=Path, help="file for docs/measurements")
    options = parser.parse_args()
    lift_descriptor_limit()
    costs, of_nodes = store_costs(options.connections), node_costs(max(PROJECTED) // RANKS_OF_A_NODE)
    gpu = {world: count(world, lazy=True) for world in COUNTED}
    found = {
        "as_on_gpus": gpu,
        "as_on_cpus": {world: count(world, lazy=False) for world in COUNTED},
        "store_seconds": costs,
        "node_store_seconds": of_nodes,
        "projected": {world: project(world, gpu, costs, of_nodes) for world in PROJECTED},
    }
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.write_text(json.dumps(measurement(found), indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
