"""A Hugging Face folder → a checkpoint at step 0 that any layout starts from, in a stream."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from longcat.config import ModelConfig
from longcat.errors import ConfigError
from longcat.names import Box
from parallel.store import MOMENTS
from train.balance import build_controller
from train.checkpoint.compatibility import TOKENIZER
from train.checkpoint.dcp_tensors import DcpTensor
from train.checkpoint.find import check_name, file_hash
from train.checkpoint.read import key_of, stored_shapes
from train.checkpoint.retention import lock_folder
from train.checkpoint.save import commit
from train.compose import compose
from train.config import Config
from train.data.corpus import TOKENIZER_NAME, file_sha256, tokenizer_sha256
from train.huggingface.config_json import from_folder
from train.huggingface.export import appearing, check_absent
from train.huggingface.layouts import PREDICTION
from train.huggingface.safetensors_folder import SafetensorsFolder
from train.run_dir import as_mapping
from train.state import Counters

FILE_BYTES = 1 << 30  # of a shard of the checkpoint; each thread that writes has as much in memory
MAX_THREADS = 8


@dataclass
class ImportOptions:
    """Options of `longcat import`. Any configuration key can be given beside them."""

    source: str = ""  # a folder of safetensors with config.json, in either layout
    target: str = ""  # the checkpoint's folder; it must not exist

    def validate(self) -> None:
        if not self.source or not self.target:
            raise ConfigError("say longcat import source=DIR target=CHECKPOINT")


class Promised(DcpTensor):
    """A tensor in boxes whose values are made when they are written, and let go then."""

    make: Callable[[Box], Tensor]

    @staticmethod
    def of(shape: tuple[int, ...], boxes: list[Box], make: Callable[[Box], Tensor]) -> Promised:
        empty = [(box, torch.empty([stop - start for start, stop in box], device="meta")) for box in boxes]
        made = DcpTensor.__new__(Promised, shape, empty, torch.float32)
        assert isinstance(made, Promised)
        made.make = make
        return made

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        sizes = self.boxes[index.offset][0]
        return self.make(tuple((start, start + size) for start, size in zip(index.offset, sizes, strict=True)))


def import_folder(options: ImportOptions, overrides: list[str]) -> tuple[Path, Config]:
    """Write the checkpoint ``options.target``; → it, and the configuration that it holds.

    The model's sizes are those of config.json, then of ``overrides``, which may set any key. Moments are zero, and the
    bias controller goes on from the imported biases.

    Raises:
        ConfigError: a wrong option, names or shapes that do not fit, a target that exists or names another step.
    """
    options.validate()
    target = Path(options.target)
    check_absent(target)
    check_name(target, Counters().step)
    source = SafetensorsFolder(Path(options.source))
    config = configuration_of(source, overrides)
    source.check(config.model)
    text = {"counters": asdict(Counters()), "configuration": as_mapping(config) | {TOKENIZER: tokenizer_of(config)}}
    with appearing(target) as partial, lock_folder(partial):
        write(promised(config, source), partial)
        files = {path.name: file_hash(path) for path in sorted(partial.glob("*.distcp"))}
        commit(partial, target, json.dumps(text), files)  # gives the folder its name
    return target, config


def configuration_of(source: SafetensorsFolder, overrides: list[str]) -> Config:
    """The whole configuration: the folder's sizes, then what is given."""
    prefix = rf"{re.escape(PREDICTION)}layers\.(\d+)\."
    layers = {match[1] for name in source.places if (match := re.match(prefix, name))}
    found = from_folder(source.folder, len(layers))
    positions = found.pop("positions")
    words = [f"model.{name}={value}" for name, value in found.items()]
    if positions >= 2:
        words.append(f"train.sequence_length={positions}")
    config = compose([*words, *overrides])
    tokenizer = source.folder / TOKENIZER_NAME
    if config.data.tokenizer is None and tokenizer.is_file():
        config.data.tokenizer = str(tokenizer.resolve())
    return config


def tokenizer_of(config: Config) -> str | None:
    """SHA-256 of the tokenizer of an import, if there is one."""
    path = config.data.tokenizer
    return file_sha256(Path(path)) if path and Path(path).is_file() else None


def promised(config: Config, source: SafetensorsFolder) -> dict[str, Tensor]:
    """Everything of a state at step 0, under a checkpoint's keys."""
    tensors: dict[str, Tensor] = {}
    biases = torch.zeros(config.model.num_layers, config.model.num_routed)
    for name, shape in stored_shapes(config.model):
        boxes = source.boxes(name, shape)
        if key_of(name).startswith("bias/"):
            biases[int(name.split(".")[1])] = source.read(name, shape, boxes[0])
            continue
        tensors[key_of(name)] = Promised.of(shape, boxes, lambda box, n=name, s=shape: source.read(n, s, box))  # type: ignore[misc]
        for kind in MOMENTS:
            tensors[f"{kind}/{name}"] = Promised.of(shape, boxes, zeros)
        tensors[f"optimizer_step/{name}"] = torch.zeros((), dtype=torch.float32)
    for number, bias in enumerate(biases):
        tensors[f"bias/layers.{number}.mlp.router.e_score_correction_bias"] = bias.clone()
    return tensors | {f"controller/{name}": value for name, value in controller_state(config, biases).items()}


def zeros(box: Box) -> Tensor:
    return torch.zeros([stop - start for start, stop in box])


def controller_state(config: Config, biases: Tensor) -> dict[str, Tensor]:
    """Of a bias controller that has not stepped yet and whose memory are ``biases`` [L, N + Z]."""
    state = build_controller(config.balance, config.model).state()
    for name in ("integral", "bias"):
        if name in state:
            state[name].copy_(biases[:, : state[name].shape[1]])
    return state


def write(tensors: dict[str, Tensor], folder: Path) -> None:
    """Torch's shards of what has been promised."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    with warnings.catch_warnings():  # torch says that there are no other ranks
        warnings.simplefilter("ignore")
        try:
            dcp.save(tensors, storage_writer=short_files(folder), no_dist=True)
        except CheckpointException as error:  # it is no Exception, and wraps what happened for each rank
            cause: BaseException = next(iter(error.failures.values()))[0]
            if not isinstance(cause, OSError) and isinstance(cause.__context__, OSError):
                cause = cause.__context__  # torch's writer puts a riddle in the place of a full disk
            raise cause from error


def short_files(folder: Path) -> Any:
    """Torch's writer with many files, written by a few threads: it keeps what it has put into a file until that ends.

    Raises (when it writes):
        OSError: a thread failed, which torch would not say.
    """
    from torch.distributed.checkpoint import FileSystemWriter

    class Writer(FileSystemWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            files: queue.Queue[Any] = queue.Queue()
            for number, items in enumerate(by_size(plan.items)):
                name = f"{plan.storage_data.prefix}{number}.distcp"
                files.put((self.fs.concat_path(self.path, name), name, items))
            self.thread_count = max(1, min(MAX_THREADS, os.cpu_count() or 1, files.qsize()))
            before = set(threading.enumerate())
            try:
                written = self._write_data(planner, files)
            finally:  # after a failure the other threads would go on, in a folder that is removed
                with contextlib.suppress(queue.Empty):
                    while True:
                        files.get_nowait()
                for thread in set(threading.enumerate()) - before:
                    thread.join()
            if len(written.value()) != len(plan.items):
                raise OSError(f"{len(plan.items) - len(written.value())} parts of the checkpoint were not written")
            return written

    return Writer(folder)


def by_size(items: list[Any]) -> Iterator[list[Any]]:
    """Consecutive items of FILE_BYTES together, or a little more."""
    held: list[Any] = []
    size = 0
    for item in items:
        held.append(item)
        size += math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
        if size >= FILE_BYTES:
            yield held
            held, size = [], 0
    if held:
        yield held


def how_to_train(target: Path, config: Config) -> list[str]:
    """Commands that train on from an import: to build a corpus of its tokenizer where there is none, and the run."""
    wanted, data = tokenizer_of(config), config.data
    try:
        fits = wanted is None or tokenizer_sha256(data.paths) == wanted
    except ConfigError:  # a damaged one
        fits = False
    words = [f"data.paths=[{','.join(data.paths)}]"]
    lines = []
    if not fits:
        words = ["data.out=FOLDER"]
        lines.append("the corpus must have the model's tokenizer; if you have none that has, build it first:")
        lines.append(
            f"longcat data build data.source=TEXTS data.out=FOLDER data.tokenizer={data.tokenizer} "
            f"model.vocab_size={config.model.vocab_size}"
        )
    words = [*model_words(config.model), f"balance.method={config.balance.method}", *words]
    return [*lines, f"longcat train checkpoint.resume={target} run.name=… {' '.join(words)}"]


def model_words(model: ModelConfig) -> list[str]:
    """The overrides with which `longcat train` builds this model."""
    plain = asdict(compose([]).model)
    return [f"model.{name}={value}" for name, value in asdict(model).items() if value != plain[name] and name != "name"]
