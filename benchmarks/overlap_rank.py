"""One rank of `benchmarks.overlap`: the model with sharded experts, the settings in turn, the time of each step."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from benchmarks.link import DEVICES, set_speed
from longcat.config import ModelConfig
from longcat.documents import Documents
from longcat.layer import ShortcutLayer
from longcat.model import LongCat
from longcat.moe import Router
from longcat.names import stored_state
from parallel.config import ExpertsAfter, OverlapConfig, ParallelConfig
from parallel.device import keep_freed_memory
from parallel.expert.placement import apply_expert_parallel
from parallel.fsdp.sharding import local_part
from parallel.mesh import Topology, make_topology, resolve_sizes
from parallel.overlap import apply_overlap
from parallel.watchdog.events import SpanKind
from parallel.watchdog.spans import begin_step, take_blocked_seconds
from train.profiling.recorder import StepRecorder

CHUNKS = (1, 2, 4, 8)
SPEEDS = (0.5, 1.0, 2.0, 4.0)  # relative to the chosen speed
WAITS = (SpanKind.EXPERT_COUNTS, SpanKind.EXPERT_DISPATCH, SpanKind.EXPERT_COMBINE, SpanKind.EXPERT_GATES)
Row = list[float]  # seconds of a step, blocked, CPU seconds of the network threads, blocked in each of WAITS


def measure_rank(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    os.environ["GLOO_SOCKET_IFNAME"] = DEVICES[args.rank]
    dist.init_process_group("gloo", rank=args.rank, world_size=2)
    topology = make_topology(resolve_sizes(ParallelConfig(ep=2), 2), args.rank, 2, torch.device("cpu"))
    bench = Bench(args, topology)
    bench.force_balance(True)
    speed = bench.choose_speed(args.blocked)
    found: dict[str, Any] = {"same_gradients": bench.same_gradients(), "skew": bench.skew()}
    settings = {"blocking": (OverlapConfig(enabled=False), False)}
    for chunks in CHUNKS:
        for place in ("ffn", "attention"):
            name = f"after {place}, {chunks} chunks"
            settings[name] = OverlapConfig(num_chunks=chunks, experts_after=place), False
    for chunks in CHUNKS:
        settings[f"in sequence, {chunks} chunks"] = OverlapConfig(num_chunks=chunks), True
    found["balanced"] = bench.in_turn(settings, args.rounds)
    bench.force_balance(False)
    found["speed"] = {"balanced": speed, "learned": bench.choose_speed(args.blocked)}
    found["learned"] = bench.in_turn(settings, args.rounds)
    bench.force_balance(True)
    found["curve"] = {}
    for factor in SPEEDS:
        bench.set_speed(speed * factor)
        of_speed = {
            f"{speed * factor:.0f} Mbit/s, blocking": (OverlapConfig(enabled=False), False),
            **{
                f"{speed * factor:.0f} Mbit/s, {n} chunks": (
                    OverlapConfig(num_chunks=n, experts_after=ExpertsAfter.attention),
                    False,
                )
                for n in CHUNKS
            },
        }
        found["curve"] |= bench.in_turn(of_speed, max(3, args.rounds // 2))
    Path(args.out, f"{args.rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


class Bench:
    """A trained model in bfloat16, this rank's text, and steps on it."""

    def __init__(self, args: argparse.Namespace, topology: Topology) -> None:
        self.topology = topology
        run = Path(args.run)
        settings = yaml.safe_load((run / "config.yaml").read_text())
        self.config = ModelConfig.from_mapping(settings["model"])
        self.model = load_model(self.config, sorted((run / "checkpoints").glob("step-*"))[-1], topology)
        length = settings["train"]["sequence_length"]
        text = np.memmap(f"{settings['data']['paths'][0]}.bin", dtype=np.uint16, mode="r")
        size = args.sequences * (length + 1)
        sample = torch.from_numpy(text[topology.rank * size : (topology.rank + 1) * size].astype(np.int64))
        sample = sample.view(args.sequences, length + 1)
        self.tokens, self.labels = sample[:, :-1].contiguous(), sample[:, 1:].contiguous()
        self.valid = torch.ones_like(self.labels, dtype=torch.bool)

    def step(self) -> None:
        self.model(self.tokens, self.labels, self.valid, mtp=False).lm.backward()

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def set_speed(self, mbit: float) -> None:
        set_speed(self.topology.rank, mbit)
        dist.barrier()

    def force_balance(self, forced: bool) -> None:
        for router in self.model.routers():
            router.forward = balanced(router) if forced else Router.forward.__get__(router)  # type: ignore[method-assign]

    def timed(self, setting: OverlapConfig, in_sequence: bool) -> Row:
        apply_overlap(self.model, setting, self.topology)
        ShortcutLayer.forward = forward_in_sequence if in_sequence else FORWARD  # type: ignore[method-assign]
        self.clear()
        dist.barrier()
        recorder = StepRecorder()
        begin_step(1)
        recorder.start()
        start, network = time.perf_counter(), network_seconds()
        self.step()
        seconds, blocked, network = time.perf_counter() - start, take_blocked_seconds(), network_seconds() - network
        recorder.finish()
        by_kind = [sum(one.exposed for one in recorder.comm_spans if one.event.kind is kind) for kind in WAITS]
        return [seconds, blocked, network, *by_kind]

    def in_turn(self, settings: dict[str, tuple[OverlapConfig, bool]], rounds: int) -> dict[str, list[Row]]:
        took: dict[str, list[Row]] = {name: [] for name in settings}
        for number in range(rounds + 1):
            for name, setting in settings.items():
                row = self.timed(*setting)
                if number:
                    took[name].append(row)
        return took

    def choose_speed(self, share: float) -> float:
        """The link's Mbit/s at which a step with blocking collectives is blocked for ``share`` of it.

        Medians of both ranks. The search ends within 1.5 % of a step, the noise of a measurement, so moves are damped.
        """
        speed = 1000.0
        for _ in range(12):
            self.set_speed(speed)
            rows = torch.tensor([self.timed(OverlapConfig(enabled=False), False)[:2] for _ in range(8)][1:])
            medians = rows.median(0).values
            dist.all_reduce(medians)
            step, blocked = medians.tolist()
            if abs(blocked / step - share) < 0.015:
                break
            speed *= (blocked / (step - blocked) * (1 - share) / share) ** 0.7
        self.set_speed(speed)
        return speed

    def same_gradients(self) -> bool:
        """Whether overlapped gradients are bitwise identical to blocking ones, for all chunks and positions."""
        for chunks in CHUNKS:
            for place in ("ffn", "attention"):
                hashes = set()
                for enabled in (False, True):
                    self.timed(OverlapConfig(enabled, chunks, place), False)
                    digest = hashlib.sha256()
                    for name, parameter in self.model.named_parameters():
                        if parameter.grad is not None:
                            digest.update(name.encode())
                            digest.update(local_part(parameter.grad)[0].view(torch.int16).numpy().tobytes())
                    hashes.add(digest.hexdigest())
                if len(hashes) > 1:
                    return False
        return True

    def skew(self) -> float:
        """Rows of the busier rank over the mean of both, largest over layers, with the learned router."""
        self.force_balance(False)
        _, statistics = self.model.trunk(self.tokens, None)
        self.force_balance(True)
        loads = torch.stack([one.counts[: self.config.num_experts].view(2, -1).sum(1) for one in statistics])
        dist.all_reduce(loads)
        return float((loads.amax(1) / loads.double().mean(1)).max())


FORWARD = ShortcutLayer.forward


def forward_in_sequence(self: ShortcutLayer, x: Tensor, angles: Tensor, documents: Documents | None = None) -> Any:
    """The same values in the order of an ordinary MoE layer: no dense compute between its three calls."""
    attention, ffn, moe = self.self_attn, self.mlps, self.mlp
    a = x + attention[0](self.input_layernorm[0](x), angles, documents)
    u = self.post_attention_layernorm[0](a)
    pending = moe.dispatch(u.flatten(0, 1), documents)
    moe.send_rows(pending)
    m, statistics = moe.combine(moe.compute(pending))
    b = a + ffn[0](u)
    c = b + attention[1](self.input_layernorm[1](b), angles, documents)
    y = c + ffn[1](self.post_attention_layernorm[1](c))
    return y + m.view_as(y), statistics


def balanced(router: Router) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]:
    """A router that gives every FFN expert the same number of tokens, and each token K_e FFN experts."""
    config = router.config

    def forward(u: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        probabilities, _, _ = Router.forward(router, u, padding)
        used = round(config.expected_ffn_experts)
        token = torch.arange(u.shape[0])[:, None]
        ffn = (token * used + torch.arange(used)) % config.num_experts
        # Alternate, so that a token's experts are on both ranks
        ffn = ffn % 2 * (config.num_experts // 2) + ffn // 2
        rest = torch.arange(config.top_k - used).expand(u.shape[0], -1) + config.num_experts
        indices = torch.cat((ffn, rest), 1)
        return probabilities, indices, probabilities.gather(1, indices) * config.routed_scaling_factor

    return forward


def load_model(config: ModelConfig, checkpoint: Path, topology: Topology) -> LongCat:
    """The model of a checkpoint in bfloat16, its experts sharded over the ranks."""
    import torch.distributed.checkpoint as dcp

    with torch.device("meta"):
        model = LongCat(config)
    apply_expert_parallel(model, topology, "all_to_all")
    model.to_empty(device="cpu")
    for name, tensor in stored_state(model):
        kind = "bias" if name.endswith("e_score_correction_bias") else "weight"
        whole = {f"{kind}/{name}": torch.empty(tensor.shape)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it loads in one process, as asked
            dcp.load(whole, checkpoint_id=checkpoint, no_dist=True)
        local, box = local_part(tensor)
        local.copy_(whole[f"{kind}/{name}"][tuple(slice(*ends) for ends in box)] if box else whole[f"{kind}/{name}"])
    for name, parameter in model.named_parameters():
        if ".router." not in name:
            parameter.data = parameter.data.bfloat16()
    return model


def network_seconds() -> float:
    """CPU seconds of all threads but the main one: gloo's, as torch has one thread."""
    ticks = os.sysconf("SC_CLK_TCK")
    total = 0.0
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) != os.getpid():
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / ticks
    return total
