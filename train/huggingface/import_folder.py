"""`longcat import`: a Hugging Face folder as a checkpoint at step 0, for any layout, in constant memory."""

from __future__ import annotations

import contextlib
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
from longcat.json_text import dumps
from longcat.names import Box
from parallel.state_store import MOMENTS
from train.balance import build_controller
from train.checkpoint.compatibility import TOKENIZER, flatten
from train.checkpoint.dcp_tensors import DcpTensor
from train.checkpoint.files import atomic_folder, check_absent, file_hash
from train.checkpoint.manifest import check_name, write_manifest
from train.checkpoint.offline_reader import key_of, stored_shapes
from train.compose import compose
from train.config import Config
from train.data.corpus import TOKENIZER_NAME, file_sha256, tokenizer_sha256
from train.huggingface.config_json import CONFIG, read_config
from train.huggingface.layouts import PREDICTION
from train.huggingface.record import check_tokenizer, merge
from train.huggingface.safetensors_folder import SafetensorsFolder
from train.run_dir import as_mapping
from train.state import Counters

BUDGET = "model.expected_ffn_experts"
FILE_BYTES = 1 << 30  # of a shard of the checkpoint; each writing thread has as much in memory
MAX_THREADS = 8


@dataclass
class ImportOptions:
    """Options of `longcat import`. Any configuration key can be given beside them."""

    source: str = ""  # a folder of safetensors with config.json, in either layout
    target: str = ""  # the checkpoint's folder; it must not exist

    def validate(self) -> None:
        if not self.source or not self.target:
            raise ConfigError("say longcat import source=DIR target=CHECKPOINT")


class LazyTensor(DcpTensor):
    """A tensor in boxes whose values are made when they are written, and freed afterwards."""

    make: Callable[[Box], Tensor]

    @staticmethod
    def of(shape: tuple[int, ...], boxes: list[Box], make: Callable[[Box], Tensor]) -> LazyTensor:
        empty = [(box, torch.empty([stop - start for start, stop in box], device="meta")) for box in boxes]
        made = DcpTensor.__new__(LazyTensor, shape, empty, torch.float32)
        assert isinstance(made, LazyTensor)
        made.make = make
        return made

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        sizes = self.boxes[index.offset][0]
        return self.make(tuple((start, start + size) for start, size in zip(index.offset, sizes, strict=True)))


def import_folder(options: ImportOptions, overrides: list[str]) -> tuple[Path, Config]:
    """Write the checkpoint ``options.target``; returns it and its configuration.

    The model's sizes are those of config.json, then of ``overrides``, which may set any key. Moments are zero, and the
    bias controller continues from the imported biases.

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


def zeros(box: Box) -> Tensor:
    return torch.zeros([stop - start for start, stop in box])


def controller_state(config: Config, biases: Tensor) -> dict[str, Tensor]:
    """The state of a bias controller at step 0 that continues from ``biases`` [L, N + Z]."""
    state = build_controller(config.balance, config.model).state()
    for name in ("integral", "bias"):
        if name in state:
            state[name].copy_(biases[:, : state[name].shape[1]])
    return state


def write(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write torch's shards and index.

    Raises:
        ConfigError: a tensor of the source is damaged.
        OSError: reading or writing failed.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    with warnings.catch_warnings(), first_error_of_threads(tensors) as errors:
        warnings.simplefilter("ignore")  # torch warns that there are no other ranks
        try:
            dcp.save(tensors, storage_writer=short_files(folder), no_dist=True)
        except CheckpointException as error:  # no Exception; it wraps the error of each rank
            if errors:
                raise errors[0] from error
            cause: BaseException = next(iter(error.failures.values()))[0]
            if not isinstance(cause, OSError) and isinstance(cause.__context__, OSError):
                cause = cause.__context__  # torch's writer hides the OSError of a full disk
            raise cause from error


@contextlib.contextmanager
def first_error_of_threads(tensors: dict[str, Tensor]) -> Iterator[list[Exception]]:
    """Collect what goes wrong while values are made: torch's writer loses the errors of its threads.

    After the first error all threads stop making values, and none prints a traceback.
    """
    errors: list[Exception] = []

    def guarded(make: Callable[[Box], Tensor]) -> Callable[[Box], Tensor]:
        def call(box: Box) -> Tensor:
            if errors:
                raise errors[0]
            try:
                return make(box)
            except Exception as error:
                errors.append(error)
                raise

        return call

    for tensor in tensors.values():
        if isinstance(tensor, LazyTensor):
            tensor.make = guarded(tensor.make)
    plain = threading.excepthook
    threading.excepthook = lambda args: None if args.exc_value in errors else plain(args)
    try:
        yield errors
    finally:
        threading.excepthook = plain


def short_files(folder: Path) -> Any:
    """Torch's writer with many small files, since it frees a file's tensors when the file is complete.

    Raises (when it writes):
        OSError: a thread failed, which torch does not report.
    """
    from torch.distributed.checkpoint import FileSystemWriter

    from parallel.torch_internals import write_checkpoint_files

    class Writer(FileSystemWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            files: queue.Queue[Any] = queue.Queue()
            for number, items in enumerate(by_size(plan.items)):
                name = f"{plan.storage_data.prefix}{number}.distcp"
                files.put((self.fs.concat_path(self.path, name), name, items))
            self.thread_count = max(1, min(MAX_THREADS, os.cpu_count() or 1, files.qsize()))
            before = set(threading.enumerate())
            try:
                written = write_checkpoint_files(self, planner, files)
            finally:  # after a failure, stop the other threads before the folder is removed
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
    """Groups of consecutive items with FILE_BYTES together, or a little more."""
    group: list[Any] = []
    size = 0
    for item in items:
        group.append(item)
        size += math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
        if size >= FILE_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def how_to_train(target: Path, config: Config) -> list[str]:
    """Commands that train an imported model: build a corpus with its tokenizer if there is none, and the run."""
    wanted, data = configured_tokenizer_sha256(config), config.data
    try:
        fits = wanted is None or tokenizer_sha256(data.paths) == wanted
    except ConfigError:  # a damaged corpus
        fits = False
    overrides = [f"data.paths=[{','.join(data.paths)}]"]
    lines = []
    if not fits:
        overrides = ["data.out=FOLDER"]
        lines.append("the corpus must have the model's tokenizer; if you have no such corpus, build it first:")
        lines.append(
            f"longcat data build data.source=TEXTS data.out=FOLDER data.tokenizer={data.tokenizer} "
            f"model.vocab_size={config.model.vocab_size}"
        )
    overrides = [*model_overrides(config.model), f"balance.method={config.balance.method}", *overrides]
    return [*lines, f"longcat train checkpoint.resume={target} run.name=… {' '.join(overrides)}"]


def model_overrides(model: ModelConfig) -> list[str]:
    """The overrides with which `longcat train` builds this model."""
    plain, wanted = (flatten({"model": asdict(one)}) for one in (compose([]).model, model))
    return [f"{key}={value}" for key, value in wanted.items() if value != plain[key] and key != "model.name"]
