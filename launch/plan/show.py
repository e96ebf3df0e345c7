"""A plan for people, in 100 columns, and as JSON for machines."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from launch.plan.links import where
from launch.plan.plan import Planned
from launch.plan.search import SearchResult
from longcat.counts import count_parameters, human
from longcat.json_text import dumps
from parallel.memory import mib

RULE = "─"
WIDTH = 96


def as_json(found: Planned) -> str:
    """The plan for machines: bytes, seconds, FLOPs."""
    return dumps(_as_mapping(found), indent=2)


def search_as_json(found: SearchResult, nearest: str) -> str:
    """A search for machines: each traced layout as `as_json` has it, the fastest first; ``nearest`` is a sentence."""
    layouts = {name: [_as_mapping(one) for one in getattr(found, name)] for name in ("fitting", "too_large")}
    numbers = {name: getattr(found, name) for name in ("accepted", "refused", "refusal")}
    return dumps({**numbers, "nearest": nearest, **layouts}, indent=2)


def _as_mapping(found: Planned) -> dict[str, Any]:
    times = {
        str(factor): {
            **{
                name: getattr(one, name) for name in ("seconds", "compute", "bubble", "mfu", "tokens_per_gpu", "chunks")
            },
            "exposed_by_chunks": one.exposed,
            "layer": None if one.layer is None else asdict(one.layer),
            "links": [asdict(line) for line in one.lines],
        }
        for factor, one in found.times.items()
    }
    return {
        "model": found.config.model.name,
        "ranks": found.ranks,
        "mesh": asdict(found.sizes),
        "micro_batches": found.micro_batches,
        "padding": asdict(found.padding),
        "dtype": str(found.config.train.dtype),
        "recompute": str(found.config.parallel.recompute),
        "num_chunks": found.config.overlap.num_chunks,
        "cluster": asdict(found.cluster),
        "memory": [asdict(one) for one in found.memory],
        "needed_bytes": found.needed,
        "fits": found.fits(),
        "model_flops": found.flops,
        "executed_flops": found.executed,
        "times": times,
        "availability": asdict(found.availability),
        "knobs": [asdict(one) for one in found.knobs],
    }


def table(found: Planned) -> list[str]:
    """The plan's lines."""
    return [*_head(found), *_memory(found), *_speed(found), *_messages(found), *_faults(found), *_verdict(found)]


def _title(text: str) -> str:
    return f"{text} {RULE * (WIDTH - len(text) - 1)}"


def _row(name: str, value: str) -> str:
    return f"  {name:<17} {value}"


def _head(found: Planned) -> list[str]:
    config, train, sizes = found.config, found.config.train, found.sizes
    axes = " · ".join(f"{name} {size}" for name, size in vars(sizes).items() if size > 1) or "one of each axis"
    total = human(count_parameters(config.model).total)
    tokens = train.global_batch_size * train.sequence_length
    schedule = f", {config.parallel.schedule}" if sizes.pp > 1 else ""
    gpus = "GPUs" if found.cluster.on_gpu else "ranks"
    return [
        _title(f"{config.model.name}, {total} parameters, on {found.ranks:,} × {found.cluster.name}"),
        _row("layout", f"{axes}{schedule}; {config.parallel.sharding}, recompute {config.parallel.recompute}"),
        *([_row("stage", found.stage)] if found.stage else []),
        _row(
            "batch",
            f"{train.global_batch_size:,} × {train.sequence_length:,} = {human(tokens)} tokens a step; "
            f"{found.micro_batches} micro-batches of {train.micro_batch_size}, {train.dtype}",
        ),
        *_padding(found),
        _row("assumed", _assumed(found, gpus)),
    ]


def _padding(found: Planned) -> list[str]:
    if not found.padding.source:
        return []
    notes = "has its time, is in no tokens/s, FLOPs or MFU; attention is of whole samples"
    return [_row("padding", found.padding.source), _row("", notes)]


def _assumed(found: Planned, gpus: str) -> str:
    one = found.cluster
    return (
        f"{one.gpus_per_node} {gpus} a node; products {one.products_reached:.0%} of {one.bfloat16 / 1e12:,.4g} "
        f"TFLOP/s, links {one.links_reached:.0%}, memory {one.memory_reached:.0%}"
    )


def _memory(found: Planned) -> list[str]:
    factors = list(found.memory[0].peak)
    heads = "".join(f"{f'peak at {factor:g}×':>14}" for factor in factors)
    lines = ["", _title("memory of a rank"), f"  {'':<17} {'weights, moments':>16}{heads}"]
    shown = found.memory
    if len(shown) > 4:
        fullest = max(shown, key=lambda one: one.peak[1.0])
        shown = [shown[0], *([fullest] if fullest not in (shown[0], shown[-1]) else []), shown[-1]]
    for one in shown:
        name = "each" if len(found.memory) == 1 else f"pipeline rank {one.place}"
        lines.append(f"  {name:<17} {mib(one.state):>16}" + "".join(f"{mib(one.peak[f]):>14}" for f in factors))
    needed = "".join(f"{mib(found.needed[factor]):>14}" for factor in factors)
    name = "needs, fullest"
    lines.append(f"  {name:<17} {f'of {mib(found.cluster.capacity)}':>16}{needed}")
    marks = "".join(f"{'fits' if found.fits(factor) else 'too much':>14}" for factor in factors)
    lines.append(f"  {'':<17} {'':>16}{marks}")
    if len(factors) > 1:
        lines.append("  N×: rows that the experts of a rank receive, over their fair share")
    return lines


def _speed(found: Planned) -> list[str]:
    lines = ["", _title("a step")]
    executed = found.executed / found.flops
    lines.append(_row("FLOPs", f"{found.flops:.3e} of the model; {executed:.2f}× that is computed"))
    even = found.times[1.0]
    lines.append(_row("time", f"{even.seconds:.3g} s: {_parts(found)}"))
    lines.append(
        _row("speed", f"{even.tokens_per_gpu:,.0f} tokens/s a GPU, {_rate(found)} tokens a day, MFU {even.mfu:.1%}")
    )
    for factor, one in found.times.items():
        if factor != 1.0:
            lines.append(_row(f"at {factor:g}×", f"{one.seconds:.3g} s, {one.tokens_per_gpu:,.0f} tokens/s a GPU"))
    if even.layer is not None:
        at = ", ".join(f"{count}: {share:.0%}" for count, share in even.exposed.items())
        chunks, taken = found.config.overlap.num_chunks, "auto takes" if found.chooses_chunks else "set"
        lines.append(
            _row(
                "overlap",
                f"a layer's dispatch {1e3 * even.layer.message:.2f} ms beside {1e3 * even.layer.before:.2f} ms;",
            )
        )
        lines.append(_row("", f"waiting by overlap.num_chunks {at}; best {even.chunks}, {taken} {chunks}"))
    return lines


def _parts(found: Planned) -> str:
    one = found.times[1.0]
    exposed = sum(line.exposed for line in one.lines if line.axis != "pp")
    parts = [f"{one.compute / one.seconds:.0%} computing", f"{exposed / one.seconds:.0%} waiting for messages"]
    if found.sizes.pp > 1:
        parts.append(f"{one.bubble:.0%} bubble of {found.config.parallel.schedule}")
    return ", ".join(parts)


def _rate(found: Planned) -> str:
    return human(found.times[1.0].tokens_per_gpu * found.ranks * 86400)


def _messages(found: Planned) -> list[str]:
    rows = [line for line in found.times[1.0].lines if line.num_bytes]
    if not rows:
        return []
    lines = [
        "",
        _title("what a rank sends in a step"),
        f"  {'':<30}{'axis':>6}{'ranks':>8}{'bytes':>12}{'time':>11}{'not hidden':>12}  link",
    ]
    for line in rows:
        lines.append(
            f"  {line.what:<30}{line.axis:>6}{line.group.size:>8,}{mib(line.num_bytes):>12}{_seconds(line.seconds):>11}"
            f"{_seconds(line.exposed):>12}  {where(found.cluster, line.group)}"
        )
    return lines


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def _faults(found: Planned) -> list[str]:
    one, options = found.availability, found.options
    if math.isinf(one.hours_between_faults):
        return []
    steps = "steps" if one.interval_steps > 1 else "step"
    return [
        "",
        _title("faults"),
        _row("expected", f"one every {one.hours_between_faults:,.3g} h ({options.faults_per_gpu_year:g} a GPU-year)"),
        _row(
            "checkpoints",
            f"best every {one.interval_seconds / 60:,.3g} min: checkpoint.every={one.interval_steps} {steps} "
            f"({options.save_seconds:g} s each)",
        ),
        _row("availability", f"{one.share:.2%} with {options.restart_seconds:g} s from a fault to the next step"),
    ]


def _verdict(found: Planned) -> list[str]:
    if found.fits(max(found.needed)):
        return [
            "",
            f"It fits, at every imbalance up to {max(found.needed):g}×." if len(found.needed) > 1 else "It fits.",
        ]
    if found.fits():
        last = max(factor for factor in found.needed if found.fits(factor))
        return ["", f"It fits up to {last:g}×; a worse imbalance runs out of memory."]
    over = found.needed[1.0] - found.cluster.capacity
    lines = ["", f"It does not fit: {mib(over)} too much."]
    for knob in found.knobs:
        saved, change = found.needed[1.0] - knob.peak, knob.seconds / found.times[1.0].seconds - 1
        fits = "fits" if knob.peak <= found.cluster.capacity else "still too much"
        lines.append(f"  {knob.override:<30} saves {mib(saved)}, leaves {mib(knob.peak)} ({fits}), time {change:+.0%}")
    if not found.knobs:
        lines.append("  nothing nearby saves enough; take more GPUs with parallel.fsdp or parallel.pp")
    return lines
