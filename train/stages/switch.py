"""Going over to a stage of `data.stages` in mid-run: the same weights and moments under another configuration."""

from __future__ import annotations

from longcat.errors import ConfigError
from parallel.mesh import Topology
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import work_span
from train.batches import BatchReader
from train.check import batch_shape
from train.config import Config
from train.data.samples import TokenSamples
from train.data.stages import Segment, segment_of
from train.stages.configs import describe, segments_of, stage_config
from train.state import TrainState
from train.step import Stepper
from train.validation import Validator


class StageSwitch:
    """Keeps model, engine, batches and validation at the stage that the next sample belongs to.

    A run is built with the configuration of before the first stage and goes from there to any other stage in one way,
    whether it comes from the step before, from a checkpoint or from a rollback. So it computes the same in all cases.
    """

    def __init__(
        self,
        config: Config,
        state: TrainState,
        stepper: Stepper,
        validator: Validator,
        samples: TokenSamples,
        topology: Topology,
    ) -> None:
        self.config, self.state, self.topology = config, state, topology
        self.stepper, self.validator, self.samples = stepper, validator, samples
        self.mixtures = segments_of(config)
        # Those that begin with a step and change more than the mixture
        self.segments = [one for one in self.mixtures if one.stage is None or one.stage.changes_training]
        self.present = self.segments[0]
        self.announced = self.mixtures[0]

    def enter(self) -> str | None:
        """Go over to the next sample's stage → a line on a stage that begins with the next step; None if none does.

        A stage that changes the mixture alone may begin inside the step; the readers know when.

        Raises:
            ConfigError: a step would reach over the beginning of the next stage, or begin inside one of its stage.
        """
        skipped, position = self.state.health.skipped, self.state.counters.position
        if len(self.segments) > 1:
            segment = segment_of(self.segments, sample := skipped.place(position))
            self._check_steps(segment, sample)
            if segment is not self.present:
                self._enter(segment, sample)
        last = segment_of(self.mixtures, skipped.place(position + self.present.batch - 1))
        if last is self.announced:
            return None
        self.announced = last
        return f"stage {last.number} from step {self.state.counters.step + 1:,}: {describe(self.config, last)}"

    def _check_steps(self, segment: Segment, sample: int) -> None:
        """Raise ConfigError unless whole steps lead from ``sample`` to the next stage, or from the last one's start."""
        border, batch, skipped = self._end(segment), segment.batch, self.state.health.skipped
        first, last = (segment.start, sample) if border is None else (sample, border)
        distance = last - first - skipped.count(first, last)
        if not distance % batch:
            return
        where = (
            f"inside a step of {batch} samples of data.stages[{segment.number - 1}], which began at sample {first}"
            if border is None
            else f"{distance} samples before data.stages[{self._following(segment)[0].number - 1}], which begins at "
            f"sample {border}: no whole number of steps of {batch} samples"
        )
        raise ConfigError(
            f"the run is at sample {sample} of its data, {where}; resume from a checkpoint of the same "
            f"train.global_batch_size, or read the data from the first sample (data.from_start=true)"
        )

    def _following(self, segment: Segment) -> list[Segment]:
        return self.segments[self.segments.index(segment) + 1 :]

    def _end(self, segment: Segment) -> int | None:
        """The sample with which the next segment begins; None for the last one."""
        following = self._following(segment)
        return following[0].start if following else None

    def _enter(self, segment: Segment, sample: int) -> None:
        config = stage_config(self.config, segment.number)
        for model in self.state.models:
            model.use_config(config.model)
        self.state.engine.reshape(batch_shape(config, self.topology.sizes))
        self.stepper.reader.close()
        with work_span(Event(SpanKind.CORPUS_INDEX), slow=True):
            self.samples.open_indexes(sample, segment.batch)
        self.stepper.use(
            config,
            BatchReader(
                self.samples,
                config,
                self.topology,
                reads_ahead=self.stepper.reader.reads_ahead,
                end=self._end(segment),
            ),
        )
        self.validator.use(config)
        self.present = segment
