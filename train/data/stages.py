"""Stages of a training run by tokens: mixtures, sequence lengths, rotary positions and the weight of MTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any

from longcat.config_limits import check_at_most
from longcat.errors import ConfigError
from longcat.rope import RopeScaling

MAX_RAMP = 2**28  # samples; each takes two bytes of memory


@dataclass
class TrainingStage:
    """What changes from `start_tokens` on; whatever a stage leaves out stays as it was before.

    A stage that changes the mixture alone begins with a sample, any other with a step: both at the first one that
    starts at `start_tokens` or later. Tokens count from the data's first sample.
    """

    start_tokens: int  # where it begins
    weights: list[float] = field(default_factory=list)  # shares of the corpora in data.paths; empty = as before
    ramp_tokens: int = 0  # tokens over which the shares move linearly from the old ones to `weights`; 0 = at once
    # tokens per sequence; a step and, as far as that goes, a micro-batch keep their tokens
    sequence_length: int | None = None
    rope_theta: float | None = None  # base of the rotary frequencies
    rope_scaling: RopeScaling | None = None  # YaRN: the keys of model.rope_scaling, all of them anew
    mtp_weight: float | None = None  # weight of the MTP cross-entropy; 0 = MTP is off

    @property
    def changes_training(self) -> bool:
        """Whether it changes more than the mixture."""
        return any(getattr(self, name) is not None for name in TRAINING_KEYS)

    @staticmethod
    def from_mapping(values: Any) -> TrainingStage:
        """A stage from a stored configuration, in which keys that were added later are missing.

        Raises:
            TypeError: it is no mapping, lacks `start_tokens` or has a key that is not known.
        """
        if not isinstance(values, dict):
            raise TypeError(f"{values!r} is no stage")
        scaling = values.get("rope_scaling")
        return TrainingStage(**{**values, "rope_scaling": None if scaling is None else RopeScaling(**scaling)})

    def given(self) -> dict[str, Any]:
        """The keys that differ from their defaults, so that stages stored by older versions compare equal."""
        defaults = asdict(TrainingStage(self.start_tokens))
        return {
            key: value for key, value in asdict(self).items() if key == "start_tokens" or value != defaults.get(key)
        }


MIXTURE_KEYS = ("start_tokens", "weights", "ramp_tokens")
TRAINING_KEYS = tuple(key.name for key in fields(TrainingStage) if key.name not in MIXTURE_KEYS)


@dataclass(frozen=True)
class Segment:
    """Samples that follow one another under one stage. Sample numbers go on from segment to segment."""

    number: int  # of the stage in data.stages, from 1; 0 = before the first
    start: int  # number of the first sample
    tokens: int  # of the data, before it
    length: int  # tokens of a sample
    batch: int  # samples of a step
    stage: TrainingStage | None = None

    @property
    def ramp(self) -> int:
        """Samples over which the mixture moves."""
        return 0 if self.stage is None else -(-self.stage.ramp_tokens // self.length)

    def tokens_at(self, sample: int) -> int:
        """Tokens of the data before a sample of this segment."""
        return self.tokens + (sample - self.start) * self.length


def segments(stages: Sequence[TrainingStage], sequence_length: int, global_batch_size: int) -> list[Segment]:
    """The run's samples in order, cut where stages begin; the tokens of a step stay.

    ``sequence_length`` and ``global_batch_size`` hold before the first stage.
    """
    base = Segment(0, 0, 0, sequence_length, global_batch_size)  # the last one that began with a step
    step_tokens = sequence_length * global_batch_size
    found = [base]
    for number, stage in enumerate(stages, start=1):
        further = max(0, stage.start_tokens - base.tokens)
        if not stage.changes_training:
            sample = base.start + -(-further // base.length)
            found.append(Segment(number, sample, base.tokens_at(sample), base.length, base.batch, stage))
            continue
        steps = -(-further // step_tokens)
        sample, length = base.start + steps * base.batch, stage.sequence_length or base.length
        batch = base.batch if length == base.length else max(1, step_tokens // length)
        base = Segment(number, sample, base.tokens + steps * step_tokens, length, batch, stage)
        found.append(base)
    return found


def segment_of(found: Sequence[Segment], sample: int) -> Segment:
    """The segment that a sample belongs to."""
    return next(segment for segment in reversed(found) if segment.start <= sample)


def check_segments(found: Sequence[Segment]) -> None:
    """Raise ConfigError where a stage's steps cannot keep their tokens, or stages overlap."""
    step_tokens = found[0].length * found[0].batch
    stepwise = found[0]
    for last, segment in pairwise(found):
        assert segment.stage is not None
        key = f"data.stages[{segment.number - 1}]"
        if segment.length * segment.batch != step_tokens:
            raise ConfigError(
                f"{key}.sequence_length={segment.length} does not divide the {step_tokens} tokens of a step "
                f"(train.global_batch_size × train.sequence_length), which stay the same; change either"
            )
        if segment.stage.changes_training:
            if segment.start == stepwise.start:
                raise ConfigError(
                    f"{key}.start_tokens={segment.stage.start_tokens} begins with the same step as what is before it: "
                    f"a step has {step_tokens} tokens; start it a step later"
                )
            stepwise = segment
        check_at_most(f"{key}.ramp_tokens in samples", segment.ramp, MAX_RAMP, "each is kept in memory")
        if last.ramp and last.start + last.ramp > segment.start:
            raise ConfigError(
                f"data.stages[{last.number - 1}].ramp_tokens={last.stage and last.stage.ramp_tokens} goes on when "
                f"{key} begins; shorten it, or start that stage later"
            )


def check_stage(key: str, stage: TrainingStage) -> None:
    """Raise ConfigError for numbers of one stage that cannot be, or that change nothing."""
    if stage.ramp_tokens < 0:
        raise ConfigError(f"{key}.ramp_tokens={stage.ramp_tokens} must not be negative")
    if stage.ramp_tokens and not stage.weights:
        raise ConfigError(f"{key}.ramp_tokens={stage.ramp_tokens} needs {key}.weights, the shares that it leads to")
    if stage.sequence_length is not None and stage.sequence_length < 2:
        raise ConfigError(f"{key}.sequence_length={stage.sequence_length} must be at least 2")
    if not stage.weights and not stage.changes_training:
        raise ConfigError(f"{key} changes nothing; give weights or one of {', '.join(TRAINING_KEYS)}")
