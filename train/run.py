"""A training run, assembled: folder, mesh, model, data, state, loop, report."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longcat.counts import active_range, count_parameters, describe, flops_per_token, human
from longcat.errors import CRASHED, OK, STOPPED, ConfigError, LongCatError
from longcat.model import LongCat, ModelPart
from parallel.device import device_name, fastest_dtype, keep_freed_memory, make_deterministic, peak_flops
from parallel.memory import state_bytes
from parallel.mesh import Topology, connect, resolve_sizes, world_from_environment
from parallel.prepare import BatchShape, check_layout, prepare
from parallel.reduce import broadcast
from parallel.watchdog import watchdog
from parallel.watchdog.flight_recorder import enable_flight_recorder
from parallel.watchdog.spans import wait_span, work_span
from parallel.watchdog.stream_clock import count_stream_waits
from train.balance import build_controller
from train.batches import BatchReader
from train.checkpoint import find, retention
from train.checkpoint.find import is_inside
from train.config import Config
from train.data.samples import TokenSamples
from train.loop import Loop
from train.metrics import SUPERSEDED, MetricsWriter
from train.optimizer import make_adamw
from train.report import write_report
from train.run_dir import (
    CONFIG,
    EXIT,
    as_mapping,
    check_folder,
    claim_exit,
    describe_corpora,
    initial_checkpoint,
    lock,
    recorded_code,
    refuse,
    write_config,
)
from train.state import Counters, TrainState
from train.step import Stepper
from train.stop import StopSignal
from train.terminal import Terminal
from train.validation import Validator, write_json

LOG = "run.log"  # the lines that the terminal showed, of every start of this run


def main(config: Config) -> int:
    """Train in this process, one rank of as many as the environment says; returns the exit code."""
    folder = config.run.folder
    try:
        held = enter(config)
    except LongCatError as error:
        return refuse(folder, error)
    with held, StopSignal(config.train.stop_after_seconds) as stop_signal:
        try:
            code, message = outcome(config, stop_signal)
        except BaseException as error:
            lost = watchdog.explain(error)
            if lost is not None:
                report_hang(folder, lost)
                watchdog.leave(recorded_code(folder))
            if dist.is_initialized() and dist.get_world_size() == 1:
                dist.destroy_process_group()  # a sweep goes on in this process
            if claim_exit(folder, CRASHED, f"{type(error).__name__}: {error}"):
                raise
            return recorded_code(folder)  # another rank ended the run: this failure only follows from that
        finally:
            watchdog.stop()
        claimed = claim_exit(folder, code, message)
        if claimed and code != OK:
            print(f"{'stopped' if code == STOPPED else 'error'}: {message}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            dist.destroy_process_group()
        return code if claimed else recorded_code(folder)


def enter(config: Config) -> AbstractContextManager[Any]:
    """Check what can be checked before ranks meet.

    The first rank takes the folder for as long as the context is held.
    """
    rank, _, world_size = world_from_environment()
    check(config, world_size)
    if rank:
        return nullcontext()
    held = lock(config.run.folder)
    (config.run.folder / EXIT).unlink(missing_ok=True)
    return held


def outcome(config: Config, stop_signal: StopSignal) -> tuple[int, str]:
    """Train; returns the exit code and what to say of it."""
    code, message = OK, "done"
    try:
        train(config, stop_signal)
    except ConfigError as error:
        return error.exit_code, str(error)  # it may be this rank's alone
    except LongCatError as error:
        code, message = error.exit_code, str(error)
    # All ranks come to these ends, and the agent ends the others with the first
    with watchdog.slow_timeout(), wait_span("end of the run"):
        dist.barrier()  # none may still write
    return code, message


_SAYING = threading.Lock()


def report_hang(folder: Path, message: str) -> None:
    """Record and say, once for all ranks, who held the run up. Called from the watch's thread too.

    Who comes second ends the process next, so it waits until the first has printed.
    """
    with _SAYING:
        if claim_exit(folder, CRASHED, message):
            print(f"error: {message}", file=sys.stderr, flush=True)


def check(config: Config, world_size: int) -> None:
    """Everything that can be refused before ranks start: sizes, folder. Raises ConfigError."""
    sizes = resolve_sizes(config.parallel, world_size)
    config.validate_world(sizes.data_ranks)
    share = batch_shape(config, sizes.data_ranks).num_micro_batches
    check_layout(config.model, config.parallel, sizes, config.train.sequence_length, share)
    check_folder(config)


def train(config: Config, stop_signal: StopSignal) -> None:
    """Assemble the run and run it."""
    torch.use_deterministic_algorithms(False)
    if config.train.deterministic:
        make_deterministic()
    enable_flight_recorder(config.run.folder)
    topology = connect(config.parallel)
    if topology.device.type == "cpu":
        keep_freed_memory()
    watchdog.start(config.parallel.timeout_seconds, partial(report_hang, config.run.folder), config.run.folder)
    count_stream_waits(topology.device)
    stop_signal.listen()  # once all ranks have met: one that a signal ends before that leaves the others waiting
    config.train.dtype = resolve_dtype(config)
    state = build_state(config, topology)
    train_samples, validator = build_data(config, topology)
    log = (config.run.folder / LOG).open("a") if topology.is_first else None
    terminal = Terminal(
        config.train.steps,
        config.model.expected_ffn_experts,
        config.model.top_k,
        log=log,
        num_ranks=topology.world_size,
    )
    resume(state, config, topology, terminal if topology.is_first else None)
    if state.counters.step >= config.train.steps:
        if topology.is_first:
            terminal.note(f"already at step {state.counters.step} of train.steps={config.train.steps}: nothing to do")
        return
    peak, peak_source = peak_flops(topology.device, getattr(torch, config.train.dtype))
    writer = None
    if topology.is_first:
        derived = derived_values(config, peak)
        write_config(config, derived, device_name(topology.device), topology.world_size)
        terminal.header(header(config, topology, state.models, peak, peak_source))
        writer = MetricsWriter(config, state.counters.step)
        if writer.num_moved:
            terminal.note(
                f"{writer.num_moved} logged steps after step {state.counters.step} have no checkpoint: they are "
                f"trained again, and their old lines are kept in {SUPERSEDED}"
            )
    stepper = Stepper(state, BatchReader(train_samples, config, topology), config, topology)
    loop = Loop(
        state,
        stepper,
        validator,
        config,
        topology,
        peak,
        writer,
        terminal if topology.is_first else None,
        stop_signal,
    )
    started = time.perf_counter()
    try:
        loop.run()
        finish(state, train_samples, validator, config, topology, terminal)
    finally:
        loop.saver.close()
        state.engine.close()
        if writer is not None:
            terminal.note(f"trained for {time.perf_counter() - started:.0f} s")
            close(writer, config, terminal)


def close(writer: MetricsWriter, config: Config, terminal: Terminal) -> None:
    """Close the logs and write the report. Neither may hide how the run itself ended."""
    try:
        with work_span("logs and report", slow=True):
            writer.close()
            terminal.note(f"report: {write_report(config.run.folder)}")
    except Exception as error:
        terminal.note(f"no report: {type(error).__name__}: {error}; try longcat report {config.run.folder}")


def resolve_dtype(config: Config) -> str:
    """`train.dtype` with `auto` found out, by the first rank for all: ranks may differ in what they can do."""
    if config.train.dtype != "auto":
        return config.train.dtype
    return str(broadcast(str(fastest_dtype()).removeprefix("torch.")))


def build_state(config: Config, topology: Topology) -> TrainState:
    """The model as this rank holds it, its optimizer and bias controller."""
    engine, store = prepare(
        config.model,
        config.balance.num_groups,
        config.parallel,
        config.overlap,
        topology,
        batch_shape(config, topology.data_ranks),
        getattr(torch, config.train.dtype),
        config.train.seed,
        partial(make_adamw, config=config.optim),
    )
    biases = torch.zeros(config.model.num_layers, config.model.num_routed, device=topology.device)
    return TrainState(engine, store, build_controller(config.balance, config.model), Counters(), biases)


def batch_shape(config: Config, data_ranks: int) -> BatchShape:
    """What each of ``data_ranks`` reads for a step."""
    train = config.train
    share = train.global_batch_size // train.micro_batch_size // data_ranks
    return BatchShape(share, train.micro_batch_size, train.sequence_length)


def build_data(config: Config, topology: Topology) -> tuple[TokenSamples, Validator]:
    """Training samples and the validator. Whichever rank comes first leaves its sample index for the others."""
    with work_span("indexing the corpora", slow=True):
        made = {
            split: TokenSamples(
                config.data,
                sequence_length=config.train.sequence_length,
                seed=config.train.seed,
                vocab_size=config.model.vocab_size,
                split=split,  # type: ignore[arg-type]
                cache_dir=Path(config.data.paths[0]).parent / "index",
            )
            for split in ("train", "validation")
        }
    return made["train"], Validator(made["validation"], config, topology)


def resume(state: TrainState, config: Config, topology: Topology, terminal: Terminal | None) -> None:
    """Continue from the checkpoint that ``checkpoint.resume`` means, and say which and why."""
    folder, settings = config.run.folder / "checkpoints", config.checkpoint
    if topology.is_first and settings.resume == "auto" and not find.list_checkpoints(folder):
        settings.resume = initial_checkpoint(config.run.folder)  # stays so in config.yaml, until there is a checkpoint
        if terminal and settings.resume != "auto":
            terminal.note(f"no checkpoint of this run yet: checkpoint.resume={settings.resume}, as in its {CONFIG}")
    with watchdog.slow_timeout():
        path, passed_over = find.find_together(folder, settings.resume, topology)
        if path is not None:
            configuration = as_mapping(config) | describe_corpora(config)
            find.load(state, path, configuration, config.data.from_start, is_inside(path, folder))
    if terminal:
        if settings.resume not in ("auto", "never") and not find.resumes_elsewhere(folder, settings.resume):
            terminal.note(f"checkpoint.resume={settings.resume} is not used: this run has checkpoints of its own")
        for status in passed_over:
            terminal.note(f"passed over {status.folder}: {status.problem}")
        with work_span("tidying checkpoints", slow=True):
            set_aside = retention.cleanup(folder, path, passed_over)
        for aside in set_aside:
            terminal.note(f"set aside as {aside}")
    if terminal and path is not None:
        terminal.note(f"resumed from {path}: step {state.counters.step}, {state.counters.tokens:,} tokens")
        if state.counters.samples and not state.counters.position:
            terminal.note("data.from_start: the data is read from its first sample on")


def finish(
    state: TrainState,
    train_samples: TokenSamples,
    validator: Validator,
    config: Config,
    topology: Topology,
    terminal: Terminal,
) -> None:
    """After the last step: coloured text for the report, and n-gram baselines beside the final validation loss."""
    folder = config.run.folder
    if config.validation.documents:
        documents = validator.colour_documents(state)
        if topology.is_first and documents:
            write_json(folder / "text.json", {"documents": documents})
    if not (config.validation.ngram_baselines and topology.is_first):
        return
    with work_span("n-gram baselines", slow=True):
        baselines = validator.baselines(train_samples, state.counters.position)
    if baselines is None:
        terminal.note("n-gram baselines left out: more tokens than they take in minutes")
        return
    write_json(folder / "baselines.json", baselines)
    rows = ", ".join(f"{name} {baselines[name]:.3f}" for name in ("unigram", "bigram", "trigram"))
    terminal.note(f"n-gram models of the same tokens (interpolated Kneser-Ney), nats a token: {rows}")


def derived_values(config: Config, peak: float) -> dict[str, Any]:
    counts = count_parameters(config.model)
    return {
        "parameters": counts.total,
        "mtp_parameters": counts.mtp,
        "active_parameters": list(active_range(config.model)),
        "flops_per_token": flops_per_token(config.model, config.train.sequence_length),
        "peak_gflops_per_rank": peak / 1e9,
    }


def layers_of(part: ModelPart) -> str:
    """Embedding, layers 0-3."""
    names = ["embedding"] if part.embedding else []
    names.append(f"layers {part.first}-{part.last - 1}" if part.last - part.first > 1 else f"layer {part.first}")
    return ", ".join([*names, *(["head"] if part.head else [])])


def header(
    config: Config, topology: Topology, parts: list[LongCat], peak: float, peak_source: str
) -> list[tuple[str, str]]:
    """What a person wants to see before the first step, derived values among it."""
    train = config.train
    batch_tokens = train.global_batch_size * train.sequence_length
    sizes = topology.sizes
    axes = ", ".join(f"{name} {size}" for name, size in vars(sizes).items() if size > 1) or "one of each"
    stages = [layers_of(model.part) for model in parts]
    held = state_bytes(config.model, sizes, config.parallel.sharding, [model.part for model in parts])
    return [
        ("run", str(config.run.folder)),
        ("model", config.model.name),
        *describe(config.model),
        (
            "batch",
            f"{train.global_batch_size} × {train.sequence_length} = {human(batch_tokens)} tokens a step",
        ),
        ("steps", f"{train.steps}, {human(train.steps * batch_tokens)} tokens"),
        ("ranks", f"{topology.world_size} on {topology.device.type} ({axes})"),
        *([("pipeline", f"{config.parallel.schedule}; this rank: {' and '.join(stages)}")] if sizes.pp > 1 else []),
        ("memory a rank", f"{held} (by formula; activations come on top)"),
        ("compute", f"{train.dtype}, {peak / 1e9:,.0f} GFLOP/s a rank ({peak_source})"),
    ]
