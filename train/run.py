"""A training run, assembled: mesh, model, data, state, loop, report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from longcat.errors import ConfigError
from parallel.chunks import ChunkChoice
from parallel.device import device_name, fastest_dtype, keep_freed_memory, make_deterministic, peak_flops
from parallel.elastic import virtual_ranks
from parallel.mesh import Topology, connect
from parallel.parallelize import parallelize
from parallel.reduce import broadcast
from parallel.torch_internals import set_deterministic_algorithms
from parallel.watchdog import watchdog
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.flight_recorder import enable_flight_recorder
from parallel.watchdog.spans import work_span
from parallel.watchdog.stream_clock import count_stream_waits
from train.balance import build_controller
from train.batches import BatchReader
from train.check import batch_shape
from train.checkpoint.find import find_on_all_ranks, is_inside, resumes_elsewhere
from train.checkpoint.load import load
from train.checkpoint.manifest import list_checkpoints
from train.checkpoint.retention import cleanup
from train.chunks import decide_num_chunks, measure_num_chunks
from train.config import ComputeDtype, Config
from train.data.ids import check_ids, unused_ids
from train.data.samples import TokenSamples
from train.loggers.choice import open_loggers
from train.loggers.interface import MetricsSink, NullSink
from train.loop import Loop
from train.optimizer import make_adamw
from train.process.start_clock import StartClock
from train.process.stop import StopSignal
from train.run_dir.files import write_file
from train.run_dir.folder import (
    CONFIG,
    as_mapping,
    check_same_configuration,
    describe_corpora,
    initial_checkpoint,
    write_config,
)
from train.run_dir.sealed import seal_line
from train.samples import index_folders, open_samples, padding_of
from train.stages.configs import segments_of, tokens_seen
from train.stages.switch import StageSwitch
from train.state import Counters, TrainState
from train.step import Stepper
from train.summary import derived_values, header
from train.terminal import Display, SilentTerminal, Terminal
from train.validation import Validator

LOG = "run.log"  # the terminal's lines, of every start of this run


def train(config: Config, stop_signal: StopSignal, on_hang: Callable[[str], None]) -> None:
    """Assemble the run and train. The watchdog calls ``on_hang`` with a message before it ends the process."""
    clock = StartClock()
    clock.end("imports")
    set_deterministic_algorithms(False)
    if config.train.deterministic:
        make_deterministic()
    enable_flight_recorder(config.run.folder)
    timeout = config.parallel.timeout_seconds

    def on_meeting() -> None:
        watchdog.start(timeout, on_hang, config.run.folder)
        clock.end("meeting")

    topology = connect(config.parallel, on_meeting)
    watchdog.set_timeout(timeout)  # of the mesh's groups too
    clock.end("groups")
    if topology.device.type == "cpu":
        keep_freed_memory()
    count_stream_waits(topology.device)
    stop_signal.listen()  # after all ranks have met: a rank that a signal ends earlier would leave the others waiting
    resolve_dtype(config)
    measured = measure_num_chunks(config, topology)
    state = build_state(config, topology)
    clock.end("model")
    train_samples, validator = build_data(config, topology)
    clock.end("data")
    terminal = open_terminal(config, topology)
    try:
        checkpoint = resume(state, config, topology, terminal)
        decide_num_chunks(measured, state, config, checkpoint, terminal)
        clock.end("checkpoint")
        if state.counters.step < config.train.steps:
            run_steps(state, train_samples, validator, config, topology, terminal, stop_signal, clock, measured)
        else:
            terminal.note(f"already at step {state.counters.step} of train.steps={config.train.steps}: nothing to do")
    finally:
        terminal.close()


def run_steps(
    state: TrainState,
    train_samples: TokenSamples,
    validator: Validator,
    config: Config,
    topology: Topology,
    terminal: Display,
    stop_signal: StopSignal,
    clock: StartClock,
    chunks: ChunkChoice | None = None,
) -> None:
    """Train from the state's step on, log, and write the report however that ends."""
    peak, peak_source = math.nan, ""  # the first rank alone writes the MFU
    if topology.is_first:
        peak, peak_source = peak_flops(topology.device, getattr(torch, config.train.dtype))
    logger: MetricsSink = NullSink()
    describe = partial(
        write_config, config, derived_values(config, peak, chunks), device_name(topology.device), topology.world_size
    )
    is_described = True
    if topology.is_first:
        is_described = describe(terminal.note)
        padding = padding_of(train_samples)
        terminal.header(header(config, topology, state.models, peak, peak_source, padding, chunks))
        unused = unused_ids(config.data.paths, config.model.vocab_size)
        if unused is not None:
            terminal.note(unused)
        with work_span(Event(SpanKind.REPORT), slow=True):  # a resume reads all lines of before
            logger = open_loggers(config, state.counters.step, terminal.note)
    stepper = build_stepper(state, train_samples, config, topology)
    if stepper.guard.note:
        terminal.note(stepper.guard.note)
    stages = StageSwitch(config, state, stepper, validator, train_samples, topology)
    loop = Loop(state, stepper, validator, config, topology, peak, logger, terminal, stop_signal, stages, clock)
    clock.end("logs")
    started = time.perf_counter()
    try:
        loop.run()
        stepper.reader.close()
        finish(state, train_samples, validator, config, topology, terminal)
    finally:
        stepper.reader.close()
        loop.saver.close()
        loop.response.close()
        state.engine.close()
        terminal.note(f"trained for {time.perf_counter() - started:.0f} s")
        if topology.is_first:
            if not is_described:  # a full disk may have space again
                describe(terminal.note)
            close(logger, config, terminal)


def open_terminal(config: Config, topology: Topology) -> Display:
    """The first rank's terminal, which also appends to run.log; other ranks print nothing."""
    if not topology.is_first:
        return SilentTerminal()
    model = config.model
    return Terminal(
        config.train.steps,
        model.expected_ffn_experts,
        model.top_k,
        log=config.run.folder / LOG,
        num_ranks=topology.world_size,
    )


def close(logger: MetricsSink, config: Config, terminal: Display) -> None:
    """Write the report, then close the logs. An error here must not hide how the run itself ended.

    The report comes first: closing may wait for an upload, and the process may be ended meanwhile.
    """
    actions = (("metrics", logger.flush), ("report", lambda: report(config, terminal)), ("metrics", logger.close))
    for name, action in actions:
        try:
            with work_span(Event(SpanKind.REPORT), slow=True):
                action()
        except Exception as error:
            what = "no report" if name == "report" else "the last metrics are lost"
            terminal.note(f"{what}: {type(error).__name__}: {error}; try longcat report {config.run.folder}")


def report(config: Config, terminal: Display) -> None:
    from train.report.page import write_report  # no other rank needs it

    terminal.note(f"report: {write_report(config.run.folder)}")


def resolve_dtype(config: Config) -> None:
    """Decide `train.dtype=auto`: the first rank's for all, as ranks may run on different devices.

    Raises:
        ConfigError: the run folder has a run of another type, which may not change (`train.elastic_bits`).
    """
    if config.train.dtype == ComputeDtype.auto:
        config.train.dtype = ComputeDtype(broadcast(str(fastest_dtype()).removeprefix("torch.")))
        check_same_configuration(config)


def build_state(config: Config, topology: Topology) -> TrainState:
    """This rank's part of the model, its optimizer and the bias controller."""
    engine, store = parallelize(
        config.model,
        config.balance.num_groups,
        config.parallel,
        config.overlap,
        topology,
        batch_shape(config, topology.sizes),
        getattr(torch, config.train.dtype),
        config.train.seed,
        partial(make_adamw, config=config.optim),
        virtual_ranks(config.train.elastic_bits, topology.sizes),
    )
    biases = torch.zeros(config.model.num_layers, config.model.num_routed)
    return TrainState(engine, store, build_controller(config.balance, config.model), Counters(), biases)


def build_stepper(state: TrainState, samples: TokenSamples, config: Config, topology: Topology) -> Stepper:
    """What trains on ``samples``, at the configuration of before the first stage of `data.stages`."""
    later = [segment.start for segment in segments_of(config)[1:] if segment.stage and segment.stage.changes_training]
    end = later[0] if later else None
    return Stepper(state, BatchReader(samples, config, topology, reads_ahead=True, end=end), config, topology)


def build_data(config: Config, topology: Topology) -> tuple[TokenSamples, Validator]:
    """Training samples and the validator. The first rank to need a sample index writes it for the others."""
    with work_span(Event(SpanKind.CORPUS_INDEX), slow=True):
        if topology.is_first:  # the other ranks check what they read
            check_ids(config.data.paths, config.model.vocab_size, index_folders(config))
        train_samples, held_out = open_samples(config, "train"), open_samples(config, "validation")
    return train_samples, Validator(held_out, config, topology)


def resume(state: TrainState, config: Config, topology: Topology, terminal: Display) -> Path | None:
    """Continue from the checkpoint that ``checkpoint.resume`` selects, and report which one and why. Returns it."""
    folder, settings = config.run.folder / "checkpoints", config.checkpoint
    if topology.is_first:
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{folder} cannot be made ({error.strerror}); mount or remove it, or choose another run.dir"
            ) from error
    if topology.is_first and settings.resume == "auto" and not list_checkpoints(folder):
        settings.resume = initial_checkpoint(config.run.folder)  # config.yaml keeps it until there is a checkpoint
        if settings.resume != "auto":
            terminal.note(f"no checkpoint of this run yet: checkpoint.resume={settings.resume}, as in its {CONFIG}")
    with watchdog.slow_timeout():
        path, skipped = find_on_all_ranks(folder, settings.resume, topology)
        if path is not None:
            configuration = as_mapping(config) | describe_corpora(config)
            load(state, path, configuration, config.data.from_start, is_inside(path, folder))
    if not topology.is_first:
        return path
    if settings.resume not in ("auto", "never") and not resumes_elsewhere(folder, settings.resume):
        terminal.note(f"checkpoint.resume={settings.resume} is not used: this run has checkpoints of its own")
    for status in skipped:
        terminal.note(f"skipped {status.folder}: {status.problem}")
    with work_span(Event(SpanKind.CHECKPOINT_CLEANUP), slow=True):
        set_aside = cleanup(folder, path, state.counters.step, skipped)
    for aside in set_aside:
        terminal.note(f"set aside as {aside}")
    if path is not None:
        terminal.note(f"resumed from {path}: step {state.counters.step}, {state.counters.tokens:,} tokens")
        if state.counters.samples and not state.counters.position:
            terminal.note("data.from_start: the data is read from its first sample")
    return path


def finish(
    state: TrainState,
    train_samples: TokenSamples,
    validator: Validator,
    config: Config,
    topology: Topology,
    terminal: Display,
) -> None:
    """After the last step: documents coloured by routing, and n-gram baselines of the final validation loss."""
    folder = config.run.folder
    if config.validation.documents:
        documents = validator.documents_by_experts(state)
        if topology.is_first and documents:
            write_file(folder / "text.json", seal_line({"documents": documents}), terminal.note)
    if not (config.validation.ngram_baselines and topology.is_first):
        return
    position, skipped = state.counters.position, state.health.skipped
    tokens = tokens_seen(segments_of(config), position, skipped)
    with work_span(Event(SpanKind.NGRAM), slow=True):
        baselines = validator.baselines(train_samples, position, tokens, skipped)
    if baselines is None:
        terminal.note("n-gram baselines left out: more tokens than they take in minutes")
        return
    write_file(folder / "baselines.json", seal_line(baselines), terminal.note)
    rows = ", ".join(f"{name} {baselines[name]:.3f}" for name in ("unigram", "bigram", "trigram"))
    terminal.note(f"n-gram models of the same tokens (interpolated Kneser-Ney), nats per token: {rows}")
