"""`longcat import`: a Hugging Face folder as a checkpoint at step 0, for any layout, in constant memory."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote

import torch
from torch import Tensor

from longcat.config import ModelConfig
from longcat.errors import ConfigError
from longcat.json_text import dumps
from parallel.state_store import MOMENTS
from train.balance import build_controller
from train.checkpoint.compatibility import TOKENIZER
from train.checkpoint.files import atomic_folder, file_hash
from train.checkpoint.manifest import check_name, check_target, write_manifest
from train.checkpoint.offline_reader import key_of, stored_shapes
from train.checkpoint.streamed import LazyTensor, write, zeros
from train.compose import compose
from train.config import Config
from train.data.corpus import TOKENIZER_NAME, file_sha256, tokenizer_sha256
from train.data.tokens import load_tokenizer, num_ids
from train.huggingface.config_json import CONFIG, read_config
from train.huggingface.layouts import PREDICTION
from train.huggingface.record import check_tokenizer, merge
from train.huggingface.safetensors_folder import SafetensorsFolder
from train.keys.dotted import flatten
from train.run_dir.folder import as_mapping
from train.state import Counters

BUDGET = "model.expected_ffn_experts"


@dataclass
class ImportOptions:
    """Options of `longcat import`. Any configuration key can be given beside them."""

    source: str = ""  # a folder of safetensors with config.json, in either layout
    target: str = ""  # the checkpoint's folder; it must not exist

    def validate(self) -> None:
        if not self.source or not self.target:
            raise ConfigError("say longcat import source=DIR target=CHECKPOINT")


def import_folder(options: ImportOptions, overrides: list[str]) -> tuple[Path, Config]:
    """Write the checkpoint ``options.target``; returns it and its configuration.

    The model's sizes are those of config.json, then of ``overrides``, which may set any key. Moments are zero, and the
    bias controller continues from the imported biases.

    Raises:
        ConfigError: a wrong option, names or shapes that do not fit, a target that exists or names another step.
    """
    options.validate()
    target = Path(options.target)
    check_target(target)
    check_name(target, Counters().step)
    source = SafetensorsFolder(Path(options.source))
    config = configuration_of(source, overrides)
    source.check(config.model)
    check_vocabulary(config)
    text = {
        "counters": asdict(Counters()),
        "configuration": as_mapping(config) | {TOKENIZER: configured_tokenizer_sha256(config)},
    }
    with atomic_folder(target) as partial:
        write(initial_state(config, source), partial)
        files = {path.name: file_hash(path) for path in sorted(partial.glob("*.distcp"))}
        write_manifest(partial, dumps(text), files)
    return target, config


def configuration_of(source: SafetensorsFolder, overrides: list[str], training: bool = True) -> Config:
    """The full configuration: the folder's sizes, then ``overrides``.

    Raises:
        ConfigError: as `read_config`; or ``training`` needs a compute budget that neither the folder nor the overrides
            have, or a tokenizer that is not the exported one. Without training any budget will do.
    """
    prefix = rf"{re.escape(PREDICTION)}layers\.(\d+)\."
    layers = {match[1] for name in source.files_by_tensor if (match := re.match(prefix, name))}
    overridden = {word.partition("=")[0].lstrip("+") for word in overrides}
    found = read_config(source.folder, len(layers), overridden)
    if source.record is not None:
        found = merge(source.folder / CONFIG, found, source.record, overridden)
    if "expected_ffn_experts" not in found and BUDGET not in overridden:
        if training:
            raise ConfigError(
                f"{source.folder / CONFIG} has no field for the compute budget K_e, the mean number of FFN experts per "
                f"token, and its sizes are of no released model; set {BUDGET} (at most {found['top_k']})"
            )
        found["expected_ffn_experts"] = float(min(found["top_k"], found["num_experts"]))
    positions = found.pop("positions")
    found["rope_scaling"] = asdict(found["rope_scaling"])
    sizes = [f"{key}={value}" for key, value in flatten({"model": found}).items()]
    if positions >= 2:
        sizes.append(f"train.sequence_length={positions}")
    config = compose([*sizes, *overrides])
    tokenizer = source.folder / TOKENIZER_NAME
    if training and config.data.tokenizer is None and tokenizer.is_file():
        check_tokenizer(source.folder, source.record)
        config.data.tokenizer = str(tokenizer.resolve())
    return config


def configured_tokenizer_sha256(config: Config) -> str | None:
    """SHA-256 of `data.tokenizer`, if that file exists."""
    path = config.data.tokenizer
    return file_sha256(Path(path)) if path and Path(path).is_file() else None


def check_vocabulary(config: Config) -> None:
    """Raise ConfigError where `data.tokenizer` is missing, no tokenizer, or has ids that the model has not."""
    path, size = config.data.tokenizer, config.model.vocab_size
    if path is not None and (count := num_ids(load_tokenizer(path))) > size:
        raise ConfigError(f"{path} has {count} ids and the model {size}; name the model's own with data.tokenizer=FILE")


def initial_state(config: Config, source: SafetensorsFolder) -> dict[str, Tensor]:
    """The full state at step 0, under a checkpoint's keys."""
    tensors: dict[str, Tensor] = {}
    biases = torch.zeros(config.model.num_layers, config.model.num_routed)
    for name, shape in stored_shapes(config.model):
        boxes = source.boxes(name, shape)
        if key_of(name).startswith("bias/"):
            biases[int(name.split(".")[1])] = source.read(name, shape, boxes[0])
            continue
        tensors[key_of(name)] = LazyTensor.of(shape, boxes, lambda box, n=name, s=shape: source.read(n, s, box))  # type: ignore[misc]
        for kind in MOMENTS:
            tensors[f"{kind}/{name}"] = LazyTensor.of(shape, boxes, zeros)
        tensors[f"optimizer_step/{name}"] = torch.zeros((), dtype=torch.float32)
    for number, bias in enumerate(biases):
        tensors[f"bias/layers.{number}.mlp.router.e_score_correction_bias"] = bias.clone()
    return tensors | {f"controller/{name}": value for name, value in controller_state(config, biases).items()}


def controller_state(config: Config, biases: Tensor) -> dict[str, Tensor]:
    """The state of a bias controller at step 0 that continues from ``biases`` [L, N + Z].

    Identity experts have the mean bias 0, as controllers that leave theirs at 0 need it: a constant for all experts
    changes no selection.
    """
    state = build_controller(config.balance, config.model).state()
    if config.model.num_zero_experts:
        biases = biases - biases[:, config.model.num_experts :].mean(1, keepdim=True)
    for name in ("integral", "bias"):
        if name in state:
            state[name].copy_(biases[:, : state[name].shape[1]])
    return state


def how_to_train(target: Path, config: Config) -> list[str]:
    """Commands that train an imported model: build a corpus with its tokenizer if there is none, and the run."""
    wanted, data = configured_tokenizer_sha256(config), config.data
    try:
        fits = wanted is None or tokenizer_sha256(data.paths) == wanted
    except ConfigError:  # a damaged corpus
        fits = False
    overrides = [quote(f"data.paths=[{','.join(data.paths)}]")]
    lines = []
    if wanted is None:
        lines.append("the folder has no tokenizer.json: the corpus must have the ids of the model's own tokenizer")
    if not fits:
        overrides = ["data.out=FOLDER"]
        lines.append("the corpus must have the model's tokenizer; if you have no such corpus, build it first:")
        lines.append(
            f"longcat data build data.source=TEXTS data.out=FOLDER {quote(f'data.tokenizer={data.tokenizer}')} "
            f"model.vocab_size={config.model.vocab_size}"
        )
    overrides = [*model_overrides(config.model), f"balance.method={config.balance.method}", *overrides]
    return [*lines, f"longcat train {quote(f'checkpoint.resume={target}')} run.name=… {' '.join(overrides)}"]


def model_overrides(model: ModelConfig) -> list[str]:
    """The overrides with which `longcat train` builds this model."""
    plain, wanted = (flatten({"model": asdict(one)}) for one in (compose([]).model, model))
    return [f"{key}={value}" for key, value in wanted.items() if value != plain[key] and key != "model.name"]
