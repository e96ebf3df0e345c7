"""The configuration that holds in each stage of `data.stages`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from longcat.errors import ConfigError
from train.data.stages import Segment, check_segments, segment_of, segments
from train.health.ranges import SampleRanges

if TYPE_CHECKING:
    from train.config import Config

T = TypeVar("T")


def segments_of(config: Config) -> list[Segment]:
    """The run's samples in order, cut where stages begin."""
    train = config.train
    return segments(config.data.stages, train.sequence_length, train.global_batch_size)


def stage_config(config: Config, number: int) -> Config:
    """The configuration from the beginning of stage ``number`` (from 1) on; 0 = before the first stage.

    Tokens of a step stay. A micro-batch has the largest number of sequences that divides the step's and has no more
    tokens than before, but at least one. Sections that no stage changes are those of ``config`` itself, but for
    data.stages, which is empty.
    """
    if not number:
        return config
    train, model, loss = config.train, config.model, config.loss
    first = train.sequence_length, train.micro_batch_size
    for segment in segments_of(config)[1 : number + 1]:
        stage = segment.stage
        assert stage is not None
        if segment.length != train.sequence_length:
            micro = largest_divisor(segment.batch, first[0] * first[1] // segment.length)
            train = replace(
                train, sequence_length=segment.length, global_batch_size=segment.batch, micro_batch_size=micro
            )
        theta, scaling = stage.rope_theta, stage.rope_scaling
        if theta is not None or scaling is not None:
            model = replace(
                model,
                rope_theta=model.rope_theta if theta is None else theta,
                rope_scaling=model.rope_scaling if scaling is None else scaling,
            )
        if stage.mtp_weight is not None:
            loss = replace(loss, mtp_weight=stage.mtp_weight)
    data = replace(config.data, stages=[])  # which would be read as later stages of this one
    return replace(config, train=train, model=model, loss=loss, data=data)


def configs_of_stages(config: Config) -> Iterator[tuple[str, Config]]:
    """(name for messages, configuration) before the first stage, and of each stage that changes more than the mixture.

    The name of the first is empty.
    """
    yield "", config
    for number, stage in enumerate(config.data.stages, start=1):
        if stage.changes_training:
            yield f"data.stages[{number - 1}]", stage_config(config, number)


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of ``number`` that is at most ``most``, or 1."""
    return next((size for size in range(min(number, most), 0, -1) if number % size == 0), 1)


def check_stages(config: Config) -> None:
    """Check stages together with the other sections, and the configuration of each.

    Raises:
        ConfigError: a stage overlaps another one, changes nothing, or has a configuration that would be refused.
    """
    check_segments(segments_of(config))
    for number, stage in enumerate(config.data.stages):
        if stage.given().keys() == {"start_tokens", "mtp_weight"} and not config.model.num_mtp_layers:
            raise ConfigError(
                f"data.stages[{number}].mtp_weight={stage.mtp_weight} changes nothing: model.num_mtp_layers=0; leave "
                f"this stage out, or give the model MTP layers"
            )
    check_each_stage(config, lambda resolved: resolved.validate_sizes())


def check_each_stage(config: Config, check: Callable[[Config], T]) -> list[T]:
    """What ``check`` returns for each configuration of `configs_of_stages`.

    Raises:
        ConfigError: that of ``check``, after the stage's name and the sizes that follow from its length.
    """
    found = []
    for name, resolved in configs_of_stages(config):
        try:
            found.append(check(resolved))
        except ConfigError as error:
            raise ConfigError(f"{name}{_derived(config, resolved)}: {error}" if name else str(error)) from error
    return found


def _derived(config: Config, resolved: Config) -> str:
    """What train.global_batch_size and train.micro_batch_size are in a stage of another length, in brackets."""
    old, new = config.train, resolved.train
    if old.sequence_length == new.sequence_length:
        return ""
    return (
        f" (with sequence_length={new.sequence_length}, train.global_batch_size={old.global_batch_size} becomes "
        f"{new.global_batch_size} and train.micro_batch_size={old.micro_batch_size} becomes {new.micro_batch_size})"
    )


def tokens_seen(parts: list[Segment], position: int, skipped: SampleRanges) -> int:
    """Tokens of the first ``position`` samples that are not left out."""

    def tokens_before(sample: int) -> int:
        return segment_of(parts, sample).tokens_at(sample)

    end = skipped.place(position)
    left_out = ((start, stop) for start, stop in skipped.ranges if start < end)
    return tokens_before(end) - sum(tokens_before(stop) - tokens_before(start) for start, stop in left_out)


def list_stages(config: Config) -> list[tuple[str, str]]:
    """Rows (name, value) for people: each stage, and the step with which it begins, counted from the data's first."""
    train = config.train
    step_tokens = train.global_batch_size * train.sequence_length
    rows = []
    for segment in segments_of(config)[1:]:
        step = segment.tokens // step_tokens + 1
        text = f"from step {step:,}: {describe(config, segment)}"
        if step > train.steps:
            text += f" (not in this run, which ends with step {train.steps:,})"
        rows.append(("stages" if segment.number == 1 else "", text))
    return rows


def describe(config: Config, segment: Segment) -> str:
    """What holds in a segment, for people: `8 × 256 tokens a step; RoPE base 1e+06`."""
    resolved = stage_config(config, segment.number)
    train, model = resolved.train, resolved.model
    parts = [f"{train.global_batch_size:,} × {train.sequence_length:,} tokens a step"]
    parts.append(f"RoPE base {model.rope_theta:g}")
    if model.rope_scaling.factor != 1:
        parts.append(f"YaRN factor {model.rope_scaling.factor:g}")
    if model.num_mtp_layers:
        weight = resolved.loss.mtp_weight
        parts.append(f"MTP weight {weight:g}" if weight else "MTP off")
    if segment.stage is not None and segment.stage.weights:
        shares = ", ".join(f"{weight:g}" for weight in segment.stage.weights)
        ramp = segment.stage.ramp_tokens
        parts.append(f"weights {shares}" + (f" over {ramp:,} tokens" if ramp else ""))
    return "; ".join(parts)
