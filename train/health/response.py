"""What a run does about a spike: go back to a checkpoint and leave samples out, or end; and who is told."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from longcat.errors import UnhealthyError
from parallel.mesh import Topology
from parallel.watchdog import watchdog
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import work_span
from train.checkpoint.find import find_together, last_committed
from train.checkpoint.load import load
from train.checkpoint.manifest import Check, list_checkpoints, step_of, verify
from train.checkpoint.retention import cleanup
from train.config import Config
from train.data.stages import segment_of
from train.health.config import OnSpike
from train.health.events import EventKind, EventLog, HealthEvent, Spike
from train.health.monitor import HealthMonitor
from train.new_run import new_run
from train.run_dir.files import Note
from train.stages.configs import segments_of
from train.state import TrainState
from train.step import StepResult

GOOD_NEWS = (
    EventKind.expert_revived,
    EventKind.gradient_recovered,
    EventKind.corpus_recovered,
)  # in health.jsonl alone
QUIET_STEPS = 20  # a spike that is only reported is not said again within so many steps of the last one
SHOWN = 3  # events of a step that the terminal shows; health.jsonl has all


def go_back(
    state: TrainState,
    spike: Spike,
    config: Config,
    configuration: dict[str, Any],
    topology: Topology,
    others: Collection[Path] = (),
) -> tuple[int, int] | None:
    """Load the last checkpoint of this run and leave out the samples that led to the spike; a collective.

    Returns the range of those samples, or None (and changes nothing) if the run has no checkpoint yet. Steps, samples
    and tokens are those of the checkpoint; the samples that are left out, and the actions taken, are those of now.

    Args:
        others: checkpoints in the run's folder that the state does not come from.
    """
    folder = config.run.folder / "checkpoints"
    with watchdog.slow_timeout():  # they read all of a checkpoint
        path = find_together(
            lambda check: newest_scheduled(folder, spike.step, config.checkpoint.every, check, others), topology
        )
    if path is None:
        return None
    strikes, ranges = list(state.health.strikes), list(state.health.skipped.ranges)
    place, parts = state.health.skipped.place, segments_of(config)
    end = spike.first_sample + segment_of(parts, place(spike.first_sample)).batch
    with watchdog.slow_timeout():
        load(state, path, configuration, config.data.from_start, own=True)
    start, batches = state.counters.position, config.health.rollback_batches
    state.health.strikes[:] = strikes
    state.health.skipped.replace(ranges)
    if batches is not None:
        start, earliest = end, start
        for _ in range(min(batches, end - earliest)):  # a step of an earlier stage may have other samples
            start = max(earliest, start - segment_of(parts, place(start - 1)).batch)
    first, last = place(start), place(end - 1)
    state.health.skipped.add(first, last + 1)
    if topology.is_first:
        with work_span(Event(SpanKind.CHECKPOINT_CLEANUP), slow=True):
            cleanup(folder, path, state.counters.step, [])
    return first, last + 1


def newest_scheduled(folder: Path, before: int, every: int, check: Check, others: Collection[Path] = ()) -> Path | None:
    """The newest valid checkpoint of a step below ``before`` but for ``others``, of `checkpoint.every` if there is one.

    Checkpoints that a signal or the clock caused come last: a run that was stopped and resumed then goes back to where
    an uninterrupted one does.
    """
    earlier = [path for path in list_checkpoints(folder) if step_of(path) < before and path not in others]
    scheduled = [path for path in earlier if every and step_of(path) % every == 0]
    others = [path for path in earlier if path not in scheduled]
    return next((path for path in (*scheduled[::-1], *others[::-1]) if verify(path, check).problem is None), None)


class SpikeResponse:
    """Acts on the spikes of a run, writes all events and says the first ones.

    Args:
        configuration: what checkpoints store of it.
        settle: waits for the checkpoint being written; a collective.
        rewind: tells the loggers that the steps after this one are trained again.
    """

    def __init__(
        self,
        state: TrainState,
        monitor: HealthMonitor,
        config: Config,
        configuration: dict[str, Any],
        topology: Topology,
        settle: Callable[[], None],
        rewind: Callable[[int], None],
        note: Note,
    ) -> None:
        self.state, self.monitor, self.config = state, monitor, config
        self.configuration, self.topology = configuration, topology
        self.settle, self.rewind, self.note = settle, rewind, note
        self.log = EventLog(config.run.folder, state.counters.step, note) if topology.is_first else None
        self.last_spike = -QUIET_STEPS

    def act(self, result: StepResult) -> bool:
        """Do what a step's spike asks for, and report what was found; True if the run has gone back to a checkpoint.

        Raises:
            UnhealthyError: the spike ends the run.
        """
        self.report(self.monitor.take_events())
        if (spike := result.spike) is None:
            return False
        limit = self.config.health.max_actions
        count = f"action {spike.num_actions} of at most {limit}"
        if spike.action == OnSpike.report:
            is_new = spike.step - self.last_spike > QUIET_STEPS
            self.last_spike = spike.step
            self.report([spike.event("trained on (health.on_spike=report)")], say=is_new)
        elif spike.action == OnSpike.skip:
            self.report([spike.event(f"the batch is skipped: weights, moments and biases stay ({count})")])
        elif spike.action == OnSpike.stop:
            self._stop(spike)
        elif self._roll_back(spike, count):
            return True
        else:
            result.metrics["spike_action"] = str(OnSpike.skip)
        return False

    def _stop(self, spike: Spike) -> None:
        self.settle()  # the checkpoint being written may be the last one
        last = last_committed(self.config.run.folder / "checkpoints", self.topology)
        why = "health.on_spike=stop"
        if self.config.health.on_spike != OnSpike.stop:
            within = f" of the last {self.config.health.forget_after} steps" if self.config.health.forget_after else ""
            why = f"the skips and rollbacks{within} have reached health.max_actions={self.config.health.max_actions}"
        event = spike.event(
            f"{why}; nothing was updated and {last.phrase}; change health.on_spike, look at the data, or "
            f"{new_run('a lower optim.lr', 'optim.lr', checkpoint=last.path)}"
        )
        self.report([event], say=False)
        raise UnhealthyError(event.text)

    def _roll_back(self, spike: Spike, count: str) -> bool:
        self.settle()
        left_out = go_back(self.state, spike, self.config, self.configuration, self.topology)
        if left_out is None:
            text = f"the run has no checkpoint to go back to, so the batch is skipped ({count})"
            self.report([spike.event(text, action=str(OnSpike.skip))])
            return False
        step, (first, end) = self.state.counters.step, left_out
        text = f"back to step {step}, without the samples {first} to {end - 1} ({count})"
        self.report([spike.event(text, to_step=step, first_sample=first, last_sample=end - 1)])
        with work_span(Event(SpanKind.REPORT), slow=True):
            self.rewind(step)
        return True

    def report(self, found: list[HealthEvent], say: bool = True) -> None:
        """Write events to health.jsonl and, with ``say``, the first of them to the terminal."""
        if self.log is None:
            return
        for event in found:
            self.log.write(event)
        if say:
            told = [event for event in found if event.kind not in GOOD_NEWS]
            for event in told[:SHOWN]:
                self.note(event.text if event.kind != EventKind.spike else f"SPIKE at {event.text}")
            if len(told) > SHOWN:
                self.note(f"and {len(told) - SHOWN} more of this step in {self.log.file.path}")

    def close(self) -> None:
        """Close health.jsonl."""
        if self.log is not None:
            self.log.close()
