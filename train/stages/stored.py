"""The stages of a configuration that a checkpoint or a run's config.yaml stores."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from train.data.stages import Segment, TrainingStage, segment_of, segments
from train.health.ranges import SampleRanges


def stored_segments(configuration: dict[str, Any]) -> list[Segment]:
    """The run's samples in order, cut where stages begin, as `train.stages.configs.segments_of`.

    Raises:
        KeyError, TypeError: it is not one of this version.
    """
    train = configuration["train"]
    stages = [TrainingStage.from_mapping(stage) for stage in configuration["data"].get("stages", [])]
    return segments(stages, train["sequence_length"], train["global_batch_size"])


def stored_lengths(configuration: dict[str, Any]) -> list[tuple[int, int]]:
    """(first sample, tokens per sample) wherever the length of a sample changes, as of `stored_segments`."""
    found: list[tuple[int, int]] = []
    for segment in stored_segments(configuration):
        if not found or found[-1][1] != segment.length:
            found.append((segment.start, segment.length))
    return found


def stored_stage(stored: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """(section `model`, sequence length) of the stage of a checkpoint's last sample, from its state.json.

    Raises:
        KeyError, TypeError: it is not one of this version.
    """
    configuration, counters = stored["configuration"], stored["counters"]
    model, parts = dict(configuration["model"]), stored_segments(configuration)
    position = counters["samples"] - counters.get("data_start", 0)
    skipped = SampleRanges((start, stop) for start, stop in (stored.get("health") or {}).get("skipped", []))
    last = segment_of(parts, skipped.place(position - 1) if position else 0)
    for segment in parts[: last.number + 1]:
        for key in ("rope_theta", "rope_scaling"):
            if segment.stage is not None and (value := getattr(segment.stage, key)) is not None:
                model[key] = value if key == "rope_theta" else asdict(value)
    return model, last.length
