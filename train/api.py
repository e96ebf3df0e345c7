"""Training from Python: compose a configuration, build a session, step, checkpoint.

    config = compose("model=debug", "data.source=texts/", "train.steps=100")
    build_corpus(config)
    with build_session(config) as session:
        for _ in range(100):
            metrics = session.step()
        session.save()

Under torchrun every rank runs the same lines: all methods of a session are collectives. Nothing is printed and there is
no watchdog (it ends the process), metrics file or report; for these use ``longcat train``. Waits for a lost rank end in
an error after ``parallel.timeout_seconds`` at most. A session locks its run folder until `Session.close`.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from longcat.errors import ConfigError, UnhealthyError
from parallel.chunks import ChunkChoice
from parallel.config import AUTO
from parallel.device import data_sheet_flops, device_name, keep_freed_memory, make_deterministic
from parallel.mesh import Topology, connect, world_from_environment
from parallel.reduce import broadcast
from parallel.torch_internals import set_deterministic_algorithms
from parallel.watchdog.events import SpanKind
from train import compose as composing
from train import run
from train.checkpoint.earlier import EarlierCheckpoints
from train.checkpoint.find import find_on_all_ranks, is_inside
from train.checkpoint.load import load
from train.checkpoint.retention import Keep
from train.checkpoint.save import save
from train.checkpoint.state_hash import state_hash
from train.checkpoint.thread_context import ThreadContext
from train.config import Config
from train.data.build import build
from train.data.corpus import CorpusInfo
from train.health.config import OnSpike
from train.health.response import go_back
from train.process import rank as process
from train.process.stop import deferred_interrupt
from train.run_dir.folder import as_mapping, describe_corpora, lock, write_config
from train.stages.switch import StageSwitch
from train.state import TrainState
from train.summary import derived_values
from train.terminal import SilentTerminal
from train.validation import ValidationResult

__all__ = ["Session", "build_corpus", "build_session", "compose"]


def compose(*overrides: str) -> Config:
    """The configuration from `key=value` overrides, as on the command line.

    Raises:
        ConfigError: an unknown key, a wrong type or an impossible size; the message names the key.
    """
    return composing.compose(list(overrides))


def build_corpus(config: Config) -> CorpusInfo:
    """Train a tokenizer on ``data.source`` and write the corpus to ``data.out``. A finished corpus is kept.

    Raises:
        ConfigError: the source cannot be read, or ``data.out`` holds a corpus of other settings.
    """
    return build(config.data, config.model.vocab_size)


def build_session(config: Config) -> Session:
    """Join the process group, then build model, optimizer and data. Makes the run folder; loads no checkpoint.

    Sets torch's deterministic mode for the whole process if ``train.deterministic`` is true.

    Raises:
        ConfigError: layout, batch sizes, corpora or run folder do not fit, and the message names the key; or another
            session is open in this process.
        FolderInUseError: a training or another session has the run folder.
    """
    if dist.is_initialized():
        raise ConfigError("this process is in a process group; if another session is open, call its close() first")
    process.check(config, world_from_environment()[2])
    set_deterministic_algorithms(False)
    if config.train.deterministic:
        make_deterministic()
    held = ExitStack()
    held.callback(leave_process_group)
    try:
        topology = connect(config.parallel)
        lock_on_all_ranks(config.run.folder, topology, held)
        return _build(config, topology, held)
    except BaseException:
        held.close()
        raise


def leave_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def lock_on_all_ranks(folder: Path, topology: Topology, held: ExitStack) -> None:
    """`lock` on the first rank until ``held`` is closed; if it fails, all ranks raise.

    Raises:
        ConfigError: as `lock`.
    """
    failure = None
    if topology.is_first:
        try:
            held.enter_context(lock(folder))
        except ConfigError as error:
            failure = error
    if (failure := broadcast(failure)) is not None:
        raise failure


def _build(config: Config, topology: Topology, held: ExitStack) -> Session:
    if topology.device.type == "cpu":
        keep_freed_memory()
    run.resolve_dtype(config)
    automatic_chunks = config.overlap.num_chunks == AUTO
    measured = run.measure_num_chunks(config, topology)
    state = run.build_state(config, topology)
    run.decide_num_chunks(measured, state, config, None, SilentTerminal())
    samples, validator = run.build_data(config, topology)
    stepper = run.build_stepper(state, samples, config, topology)
    stages = StageSwitch(config, state, stepper, validator, samples, topology)
    return Session(config, topology, state, stages, held, measured, automatic_chunks)


class Session:
    """A model in training. ``state.models`` are this rank's modules, ``state.counters`` steps, samples and tokens."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        state: TrainState,
        stages: StageSwitch,
        held: ExitStack,
        measured_chunks: ChunkChoice | None = None,
        automatic_chunks: bool = False,
    ) -> None:
        self.config, self.topology, self.state = config, topology, state
        self._stages, self._stepper, self._validator = stages, stages.stepper, stages.validator
        self._measured_chunks, self._automatic_chunks = measured_chunks, automatic_chunks
        self._held = held  # until `close`: the lock and the process group
        self._is_described = False  # config.yaml is written
        self._validation_loss: float | None = None  # of the present state
        self._earlier = EarlierCheckpoints(self.checkpoints, topology)

    @property
    def checkpoints(self) -> Path:
        """The run's folder of checkpoints, where ``longcat train`` looks for them too."""
        return self.config.run.folder / "checkpoints"

    def step(self) -> dict[str, Any]:
        """Train on the next global batch; returns the figures of this step under the keys of metrics.jsonl.

        A spike has the key `spike_action`: with `skip` the batch was left out, with `rollback` the state is that of the
        last checkpoint and the next step reads behind the spike.

        Raises:
            UnhealthyError: the loss, a gradient or a bias is not finite, or a spike is to end the run
                (``health.on_spike``); nothing was updated.
            CorruptionError: silent data corruption was found; nothing was updated. As LocalCorruptionError it is raised
                on this rank alone: the others wait for it, so end the process.
        """
        self._validation_loss = None
        self._stages.enter()
        result = self._stepper.step()
        if not result.healthy:
            raise UnhealthyError(f"step {self.state.counters.step}: {result.problem}; nothing was updated")
        if (spike := result.spike) is not None and spike.action == OnSpike.stop:
            raise UnhealthyError(f"step {spike.step}: {spike.reason}; nothing was updated")
        if spike is not None and spike.action == OnSpike.rollback:
            others = self._earlier.others
            left_out = go_back(self.state, spike, self.config, self._description(), self.topology, others)
            result.metrics["spike_action"] = str(OnSpike.skip if left_out is None else OnSpike.rollback)
        return result.metrics

    def validate(self) -> ValidationResult:
        """Loss in nats per token and bits per byte on the first batches of the validation split.

        It is measured in the stage of ``data.stages`` of the last step, after `resume` in that of the next one.
        """
        found = self._validator.measure(self.state)
        self._validation_loss = found.loss
        return found

    def save(self, folder: Path | None = None) -> Path:
        """Write and commit a checkpoint `step-…` below ``folder`` (default: ``checkpoints``); returns its path.

        In ``checkpoints`` it keeps what ``checkpoint.keep``, ``keep_every`` and ``keep_best`` say, but first warns
        before that removes what is older than this session. It renames, with a warning, those that this state does not
        come from. The first save writes config.yaml. Ctrl-C waits for the end, a second one does not.

        Raises:
            SaveError: it could not be written, or with ``is_saved`` others could not be renamed or removed.
            UnhealthyError: a weight, a moment or a bias is not finite.
        """
        description = self._description()
        with deferred_interrupt():
            if folder is not None:
                return save(self.state, folder, description, self.topology, val_loss=self._validation_loss)
            self._describe()
            keep, settles = Keep.of(self.config.checkpoint), self._earlier.is_pending
            path = save(
                self.state,
                self.checkpoints,
                description,
                self.topology,
                Keep() if settles else keep,
                self._validation_loss,
            )
            if settles:
                self._earlier.settle(path, keep)
            return path

    def _describe(self) -> None:
        """Write config.yaml as a run does, without a measured FLOP/s: the folder has a run from here on."""
        if self._is_described:
            return

        def write() -> bool:
            if not self.topology.is_first:
                return False
            device = self.topology.device
            peak = data_sheet_flops(device, getattr(torch, self.config.train.dtype))
            derived = derived_values(self.config, None if peak is None else peak[0], self._measured_chunks)
            return write_config(self.config, derived, device_name(device), self.topology.world_size, warnings.warn)

        self._is_described = ThreadContext().run_on_all_ranks(SpanKind.REPORT, write)[0]

    def resume(self, checkpoint: Path | None = None) -> Path | None:
        """Load ``checkpoint``, or the newest valid one of this run; returns what was loaded, None if there is none.

        No checkpoint is renamed or removed before the next `save`, and a rollback loads none that the state does not
        come from. A deterministic run with ``overlap.num_chunks=auto`` goes on with the checkpoint's number of chunks.

        Raises:
            ConfigError: the checkpoint is damaged or of another model or data.
        """
        path, skipped = find_on_all_ranks(self.checkpoints, str(checkpoint or "auto"), self.topology)
        if path is not None:
            own = is_inside(path, self.checkpoints)
            if self._automatic_chunks:
                self.config.overlap.num_chunks = AUTO
                run.decide_num_chunks(self._measured_chunks, self.state, self.config, path, SilentTerminal())
            self._validation_loss = None
            load(self.state, path, self._description(), self.config.data.from_start, own)
            self._earlier.start_from(path, self.state.counters.step, skipped)
            self._stages.enter()
        return path

    def state_hash(self) -> str:
        """64 bits of weights, moments, biases and counters, equal in every layout, as hexadecimal digits."""
        return state_hash(self.state, self.topology)

    def close(self) -> None:
        """Release the model's resources and the run folder, and leave the process group."""
        with self._held:
            self._stepper.reader.close()
            self.state.engine.close()

    def _description(self) -> dict[str, Any]:
        return as_mapping(self.config) | describe_corpora(self.config)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
