"""The training loop: steps, and after each of them validation, metrics, checkpoints and requests to stop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from longcat.errors import (
    CorruptionError,
    LocalCorruptionError,
    LongCatError,
    SlowRankError,
    StopRequested,
    UnhealthyError,
)
from parallel.mesh import Topology
from parallel.reduce import broadcast
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import work_span
from train.checkpoint.failures import describe
from train.checkpoint.find import last_committed
from train.checkpoint.saver import Saver
from train.checkpoint.state_hash import state_hash
from train.config import Config
from train.data.stages import segment_of
from train.health import figures
from train.health.corpora import PREFIX, CorpusWatch, losses_in
from train.health.response import SpikeResponse
from train.launch_config import OnStraggler, launch_metrics
from train.loggers.interface import MetricsSink
from train.loggers.jsonl import METRICS, rows
from train.new_run import new_run
from train.process.start_clock import StartClock
from train.process.stop import StopSignal
from train.profiling.profiler import Profiler
from train.run_dir.folder import as_mapping, describe_corpora
from train.stages.switch import StageSwitch
from train.state import TrainState
from train.step import NOT_FINITE_BIASES, Stepper, StepRequests, StepResult
from train.stragglers import Straggler, StragglerWatch, as_finding, name_hosts
from train.sweeps.pruning import Pruner, StoppedEarly
from train.terminal import Display
from train.validation import Validator

SDC_ADVICE = "take the named machine out of the job, then resume"


def due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


class Loop:
    """Runs steps until the last one, or until a rank requests a stop."""

    def __init__(
        self,
        state: TrainState,
        stepper: Stepper,
        validator: Validator,
        config: Config,
        topology: Topology,
        peak_flops: float,
        writer: MetricsSink,
        terminal: Display,
        stop_signal: StopSignal,
        stages: StageSwitch,
        clock: StartClock,
    ) -> None:
        self.state, self.stepper, self.validator = state, stepper, validator
        self.config, self.topology, self.peak_flops = config, topology, peak_flops
        self.writer, self.terminal = writer, terminal
        self.stop_signal, self.stages = stop_signal, stages
        corpora = describe_corpora(config)
        self.saver = Saver(state, config, topology, terminal, corpora)
        self.response = SpikeResponse(
            state,
            stepper.monitor,
            config,
            as_mapping(config) | corpora,
            topology,
            self.saver.wait_pending,
            writer.rewind,
            terminal.note,
        )
        self.stragglers = StragglerWatch(config.launch, topology.sizes.pp)
        self.pruner = Pruner(config, corpora)
        self.first_step = state.counters.step
        self.corpora = CorpusWatch(config.validation.worse_by, self._past_validations())
        self.profiler = Profiler(config.profile, config.run.folder, state.models, topology)
        self.clock: StartClock | None = clock  # until the first step has ended
        self.launch_metrics = launch_metrics(config.run.folder) if config.launch.restarts and topology.is_first else {}

    def _past_validations(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl with a loss for each corpus in windows of the present length, on the first rank."""
        found: list[dict[str, Any]] = []
        if not self.topology.is_first or len(self.config.data.paths) < 2 or not self.config.validation.worse_by:
            return found
        parts, place = self.stages.segments, self.state.health.skipped.place
        length = segment_of(parts, place(self.state.counters.position)).length
        for row in rows(self.config.run.folder / METRICS):
            if segment_of(parts, int(row.get("first_sample") or 0)).length != length:
                found.clear()
            elif losses_in(row):
                found.append(row)
        return found

    def run(self) -> None:
        """Train to ``train.steps``.

        Raises:
            StopRequested: a signal or the time limit requested it; the state is saved.
            SlowRankError: a rank was slow for many steps (`launch.on_straggler=restart`); the state is saved.
            StoppedEarly: a run of a sweep is hopeless (`pruning.percentile`); the state is saved.
            SaveError: the last checkpoint could not be saved.
            UnhealthyError: the loss, a gradient or a bias is not finite, or a spike ends the run (`health.on_spike`);
                nothing was updated, the last checkpoint is named.
            CorruptionError: silent data corruption was found; nothing was updated, the last checkpoint is named.
        """
        counters, config = self.state.counters, self.config
        owed_save = False  # a request to save of a step that a rollback undid
        while counters.step < config.train.steps:
            length = self.stages.present.length
            if (entered := self.stages.enter()) is not None:
                self.terminal.note(entered)
                if self.stages.present.length != length and counters.step > self.first_step:
                    self.corpora.restart()  # validation is in other windows
            with self.profiler.step(counters.step + 1):
                start = time.perf_counter()
                result = self._step(owed_save)
                seconds = time.perf_counter() - start
            if not result.healthy:
                raise UnhealthyError(self._describe_bad_step(result))
            with self._advising():  # it may wait for a save
                is_undone = self.response.act(result)
            if is_undone:
                owed_save = result.requests.save  # a request to stop is repeated by its signal
                continue
            owed_save = False
            last = counters.step == config.train.steps
            self._finish_metrics(result, seconds)
            slow = self._watch_ranks(result)
            restart = bool(slow) and config.launch.on_straggler == OnStraggler.restart and not last
            if due(config.validation.every, counters.step) or (last and config.validation.every):
                self._validate(result.metrics)
            hopeless = "" if last else self._judge(result.metrics)
            if due(config.logging.hash_every, counters.step):
                result.metrics["state_hash"] = state_hash(self.state, self.topology)
            self._report(result, last)
            final = last or result.requests.stop or restart or bool(hopeless)
            with self._advising():
                if result.requests.wait_pending:
                    self.saver.wait_pending()
                if final or result.requests.save or due(config.checkpoint.every, counters.step):
                    self.saver.save(result.metrics.get("val_loss"))
                if final:
                    self.saver.wait_pending(final=True)
            if result.requests.stop and not last:
                raise StopRequested(
                    f"stopped on {self.stop_signal.reason or 'request'} after step {counters.step}; state saved, "
                    f"the same command{self._with_auto()} resumes from there"
                )
            if hopeless:
                self.terminal.note(str(error := StoppedEarly(counters.step, hopeless)))
                raise error
            if restart:
                raise SlowRankError(f"{slow[0]}; stopped after step {counters.step}; state saved", as_finding(slow))

    def _step(self, owed_save: bool) -> StepResult:
        requests = StepRequests(
            bool(self.stop_signal),
            self.stop_signal.take_save_request() or self.saver.is_overdue() or owed_save,
            self.saver.has_ended(),
        )
        with self._advising("the update was not applied and "):
            return self.stepper.step(requests)

    @contextmanager
    def _advising(self, outcome: str = "") -> Iterator[None]:
        """Add to a finding what became of the step (``outcome``), which checkpoints there are, and what to do."""
        try:
            yield
        except LocalCorruptionError as error:
            raise error.with_advice(f"{outcome}the last checkpoint is the one to resume from; {SDC_ADVICE}") from error
        except CorruptionError as error:
            with suppress(LongCatError):  # this finding is the one to report
                self.saver.wait_pending()  # its state was checked, and may be the last checkpoint
            checkpoint = last_committed(self.config.run.folder / "checkpoints", self.topology).phrase
            since, step = error.details["finding"].get("since"), error.details["finding"]["step"]
            doubtful = (
                f"; checkpoints of steps {since} to {step - 1} may hold the fault's effect"
                if since is not None and since < step
                else ""
            )
            raise error.with_advice(f"{outcome}{checkpoint}{doubtful}; {SDC_ADVICE}") from error

    def _finish_metrics(self, result: StepResult, seconds: float) -> None:
        """Add what needs a clock or the biases."""
        metrics, usage = result.metrics, result.usage
        flops = metrics["flops"]
        biases, step = self.state.biases, self.state.counters.step
        if due(self.config.logging.routing_every, step) or (self.config.logging.routing_every and step == 1):
            metrics |= result.grad_norms | result.by_layer
            metrics |= figures.named("bias_range", figures.bias_ranges(biases, self.config.model))
        metrics["step_seconds"] = seconds
        metrics["tokens_per_second"] = result.num_tokens / seconds
        metrics["mfu"] = flops / seconds / (self.peak_flops * self.topology.world_size)
        metrics["bias_range"] = float(biases.max() - biases.min())
        metrics["exposed_comm_share"] = usage.blocked_share
        metrics["memory_rank"] = largest = int(usage.memory_gib.argmax())
        metrics["memory_gib"] = float(usage.memory_gib[largest])
        if self.clock is not None:  # in the first line of a start
            self.clock.end("first_step")
            metrics |= self.clock.metrics() | self.launch_metrics
            self.terminal.note(self.clock.text())
            self.clock = None

    def _watch_ranks(self, result: StepResult) -> list[Straggler]:
        """Compare the ranks' times of a step; the stragglers that are to be named now, with a collective if any are."""
        metrics, times = result.metrics, result.usage.own_seconds
        ratios = self.stragglers.ratios(times)
        metrics["slowest_rank"] = slowest = int(ratios.argmax())
        metrics["slowest_rank_ratio"] = float(ratios[slowest])
        found = name_hosts(self.stragglers.see(times), self.stragglers.steps)
        self.response.report([one.event(self.state.counters.step) for one in found])
        return found

    def _validate(self, metrics: dict[str, Any]) -> None:
        with work_span(Event(SpanKind.VALIDATION)):
            measured = self.validator.measure(self.state)
        metrics["val_loss"] = measured.loss
        metrics["val_bits_per_byte"] = measured.bits_per_byte
        metrics |= {f"{PREFIX}{name}": loss for name, loss in measured.by_corpus.items()}
        self.response.report(self.corpora.see(self.state.counters.step, measured.by_corpus, measured.loss))

    def _judge(self, metrics: dict[str, Any]) -> str:
        """After a validation: why this run of a sweep ends here, by the first rank; empty if it goes on."""
        if not self.config.pruning.percentile or "val_loss" not in metrics:
            return ""
        reason = ""
        if self.topology.is_first:
            try:
                reason = self.pruner.judge(self.state.counters.step, metrics["val_loss"])
            except Exception as error:  # other runs' files must not end this one, whose ranks wait for the answer
                self.terminal.note(f"pruning: other runs of the sweep cannot be read ({describe(error)}); going on")
        return str(broadcast(reason))

    def _report(self, result: StepResult, last: bool) -> None:
        step = self.state.counters.step
        self.writer.write(result.metrics, result.counts, self.state.biases)
        if self.profiler.note:
            self.terminal.note(self.profiler.note)
        if due(self.config.logging.every, step) or last or step == 1:
            self.terminal.step(result.metrics)
        if last:
            ffn = result.counts[:, : self.config.model.num_experts].double()
            loads = (ffn.amax(1) / ffn.mean(1).clamp_min(1e-9)).tolist()
            text = ", ".join(f"{layer}: {load:.2f}" for layer, load in enumerate(loads))
            self.terminal.note(f"expert load, max/mean by layer: {text}")
        if result.metrics.get("val_loss") is not None:
            self.terminal.validation(
                step, result.metrics["val_loss"], result.metrics["val_bits_per_byte"], losses_in(result.metrics)
            )

    def _with_auto(self) -> str:
        return "" if self.config.checkpoint.resume == "auto" else " with checkpoint.resume=auto"

    def _describe_bad_step(self, result: StepResult) -> str:
        self.saver.wait_pending()  # the checkpoint being written may be the last one
        last = last_committed(self.config.run.folder / "checkpoints", self.topology)
        of_biases = result.problem == NOT_FINITE_BIASES
        keys = ["balance.ki", "balance.kp", "balance.kd"] if of_biases else ["optim.lr"]
        advice = new_run(f"a lower {' and '.join(keys)}", *keys, checkpoint=last.path)
        if not of_biases:
            advice = f"look at the data, or {advice}"
        what = f"step {self.state.counters.step}: {result.problem}"
        return f"{what}; nothing was updated and {last.phrase}; {advice}"
