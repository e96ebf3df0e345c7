"""The data group: which settings are refused, and that the choices in configs/data fit the dataclass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from longcat.errors import ConfigError
from train.data.config import DataConfig
from train.data.stages import TrainingStage

CHOICES = sorted((Path(__file__).parents[3] / "configs" / "data").glob("*.yaml"))


@pytest.mark.parametrize("path", CHOICES, ids=lambda path: path.stem)
def test_choice_fits_the_dataclass_and_is_valid(path: Path) -> None:
    schema = OmegaConf.create({"data": OmegaConf.structured(DataConfig)})
    config = OmegaConf.to_object(OmegaConf.merge(schema, {"data": OmegaConf.load(path)}).data)
    assert isinstance(config, DataConfig)
    config.validate()
    assert config.name == path.stem
    assert all("$" not in prefix for prefix in config.paths)


def test_paths_follow_out_and_out_follows_name() -> None:
    assert DataConfig("mine", "x").paths == ["data/mine/corpus"]
    assert DataConfig("mine", "x", out="else/where").paths == ["else/where/corpus"]
    assert DataConfig("mine", "x", paths=["a/b"]).paths == ["a/b"]


TWO = ["a", "b"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": " "}, "data.name"),
        ({"source": ""}, "data.source"),
        ({"text_field": ""}, "data.text_field"),
        ({"max_bytes": -1}, "data.max_bytes=-1"),
        ({"tokenizer_bytes": -5}, "data.tokenizer_bytes=-5"),
        ({"validation_fraction": 0.0}, "data.validation_fraction=0.0"),
        ({"validation_fraction": 1.0}, "data.validation_fraction=1.0"),
        ({"validation_fraction": float("nan")}, "data.validation_fraction=nan"),
        ({"paths": ["a", ""]}, "data.paths"),
        ({"paths": TWO, "weights": [1.0]}, "1 entries for 2"),
        ({"paths": TWO, "weights": [1.0, -0.5]}, "not negative"),
        ({"paths": TWO, "weights": [1.0, float("inf")]}, "finite"),
        ({"paths": TWO, "weights": [0.0, 0.0]}, "all zero"),
        ({"paths": TWO, "stages": [TrainingStage(0, [1.0, 1.0])]}, r"data.stages\[0\].start_tokens"),
        (
            {"paths": TWO, "stages": [TrainingStage(9, [1.0, 1.0]), TrainingStage(9, [1.0, 2.0])]},
            r"data.stages\[1\].start_tokens=9",
        ),
        ({"paths": TWO, "stages": [TrainingStage(9, [1.0])]}, r"data.stages\[0\].weights"),
        ({"stages": [TrainingStage(9)]}, r"data.stages\[0\] changes nothing; give weights or one of sequence_length"),
        ({"stages": [TrainingStage(9, ramp_tokens=8)]}, r"data.stages\[0\].ramp_tokens=8 needs"),
        ({"stages": [TrainingStage(9, [1.0], ramp_tokens=-1)]}, r"data.stages\[0\].ramp_tokens=-1"),
        ({"stages": [TrainingStage(9, sequence_length=1)]}, r"data.stages\[0\].sequence_length=1"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(change: dict[str, Any], words: str) -> None:
    config = DataConfig(**({"name": "n", "source": "s"} | change))
    with pytest.raises(ConfigError, match=words) as caught:
        config.validate()
    assert "\n" not in str(caught.value)
