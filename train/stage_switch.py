"""Going over to a stage of `data.stages` in mid-run: the same weights and moments under another configuration."""

from __future__ import annotations

from longcat.errors import ConfigError
from parallel.mesh import Topology
from train.batches import BatchReader
from train.check import batch_shape
from train.config import Config
from train.data.samples import TokenSamples
from train.data.stages import Segment, segment_of
from train.stages import describe, segments_of, stage_config
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
        # Those that begin with a step and change more than the mixture
        self.segments = [one for one in segments_of(config) if one.stage is None or one.stage.changes_training]
        self.present = self.segments[0]

    def enter(self) -> str | None:
        """Go over to the next sample's stage → a line on it; None if the run is there already.

        Raises:
            ConfigError: the next sample is inside a step of its stage.
        """
        if len(self.segments) == 1:
            return None
        sample = self.state.health.skipped.place(self.state.counters.position)
        segment = segment_of(self.segments, sample)
        if segment is self.present:
            return None
        if (sample - segment.start) % segment.batch:
            raise ConfigError(
                f"the run is at sample {sample} of its data, inside a step of {segment.batch} samples of "
                f"data.stages[{segment.number - 1}], which began at sample {segment.start}; resume from a checkpoint "
                f"of the same train.global_batch_size, or read the data from the first sample (data.from_start=true)"
            )
        self._enter(segment)
        step = self.state.counters.step + 1
        return f"stage {segment.number} from step {step:,}: {describe(self.config, segment)}"

    def _enter(self, segment: Segment) -> None:
        config = stage_config(self.config, segment.number)
        for model in self.state.models:
            model.use_config(config.model)
        self.state.engine.reshape(batch_shape(config, self.topology.sizes))
        self.stepper.reader.close()
        following = self.segments[self.segments.index(segment) + 1 :]
        self.stepper.use(
            config,
            BatchReader(
                self.samples,
                config,
                self.topology,
                reads_ahead=self.stepper.reader.reads_ahead,
                end=following[0].start if following else None,
            ),
        )
        self.validator.use(config)
        self.present = segment
