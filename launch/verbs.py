"""What each verb of `longcat` does; its docstring is its help."""

from __future__ import annotations

from pathlib import Path

from longcat.errors import ConfigError


def train(words: list[str]) -> int:
    """train key=value …            train a model; -m key=a,b,… trains once for each choice (a Hydra multirun)

    longcat train experiment=quickstart
    longcat train model=small train.steps=2000 run.name=first run.num_processes=2
    longcat train -m optim.lr=1e-3,3e-3 model=debug

    The keys are those of the dataclasses in train/config.py; choices of a group stand in configs/<group>. One
    run folder, runs/<run.name>, is made or continued. Under torchrun: torchrun --nproc-per-node 2 -m train
    key=value …
    """
    from launch.local import run_ranks
    from launch.sweep import run_sweep
    from train.compose import compose

    if any(word in ("-m", "--multirun") for word in words):
        return run_sweep([word for word in words if word not in ("-m", "--multirun")])
    return run_ranks(words, compose(words))


def data(words: list[str]) -> int:
    """data build key=value …       make a tokenizer and a .bin/.idx corpus from any source of the `datasets` package

    longcat data build                                        the default: Python sources of this machine
    longcat data build data.source=my/folder data.out=data/mine
    longcat data build data.source=owner/name data.subset=default data.text_field=text data.out=data/hub

    A source is a hub id, a folder, a file or a glob of parquet, JSON lines or text files. The vocabulary's size is
    model.vocab_size; data.tokenizer=FILE takes a tokenizer instead of training one.
    """
    from train.compose import compose
    from train.data.build import build

    if not words or words[0] != "build":
        raise ConfigError("longcat data knows one word: longcat data build key=value …")
    config = compose(words[1:])
    build(config.data, config.model.vocab_size)
    return 0


def report(words: list[str]) -> int:
    """report RUN [RUN …]           write report.html for a run folder, or a comparison of several

    longcat report runs/quickstart
    longcat report runs/a runs/b    writes comparison.html beside the first
    """
    from train.report import write_comparison, write_report

    if not words:
        raise ConfigError("longcat report needs a run folder, for instance runs/quickstart")
    folders = [Path(word) for word in words]
    if len(folders) == 1:
        print(write_report(folders[0]))
    else:
        print(write_comparison(folders, folders[0].parent / "comparison.html"))
    return 0


def checkpoint(words: list[str]) -> int:
    """checkpoint list|verify DIR   the checkpoints of a run folder, and whether their hashes hold

    longcat checkpoint list runs/quickstart
    longcat checkpoint verify runs/quickstart/checkpoints/step-00000100
    """
    from train.checkpoint.find import MANIFEST, NAME, list_checkpoints, size, verify

    if len(words) != 2 or words[0] not in ("list", "verify"):
        raise ConfigError("say longcat checkpoint list DIR or longcat checkpoint verify DIR")
    folder = Path(words[1])
    inside = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    is_one = inside.is_dir() and (NAME.search(inside.name) or (inside / MANIFEST).is_file())
    found = [inside] if is_one else list_checkpoints(inside)
    if not found:
        raise ConfigError(f"{folder} holds no checkpoint; give a run folder or a step-… folder")
    broken = 0
    for path in found:
        problem = verify(path).problem if words[0] == "verify" else None
        print(f"{path}  {size(path) / 2**20:.1f} MiB" + ("" if words[0] == "list" else f"  {problem or 'whole'}"))
        broken += problem is not None
    if broken:
        raise ConfigError(
            f"{broken} of {len(found)} checkpoints in {folder} not whole; restore their files, "
            f"or leave them to a resume, which passes them over"
        )
    return 0


def grow(words: list[str]) -> int:
    """grow source=DIR target=DIR   a checkpoint of half depth → one of full depth, with moments and counters

    longcat grow source=runs/half target=runs/half-grown
    longcat grow source=runs/half/checkpoints/step-00000400 target=grown growth.factor=3 growth.method=interpose

    source is a checkpoint, or a run whose newest whole checkpoint is taken. growth.method=stack repeats the whole
    stack of layers (0 1 0 1), interpose each layer in place (0 0 1 1), growth.factor times (2). The memory it takes
    does not depend on the model. The grown model is trained on with the old run's settings, model.num_layers times
    the factor, checkpoint.resume=TARGET and another run.name.
    """
    from train.checkpoint.grow import GrowConfig
    from train.checkpoint.grow import grow as grow_checkpoint
    from train.options import compose_options

    config = compose_options(GrowConfig, words)
    source, growth = grow_checkpoint(config)
    layers = growth.num_layers * growth.factor
    print(f"{source}: {growth.num_layers} layers → {config.target}: {layers} layers as {growth.sources}")
    print(f"train it with model.num_layers={layers} checkpoint.resume={config.target} and another run.name")
    return 0


def counts(words: list[str]) -> int:
    """counts model=PRESET …        parameters, active parameters and FLOPs a token; builds nothing

    longcat counts model=flash      560.66B, active 18.69B / 27.15B / 31.38B
    """
    from longcat.counts import describe, flops_per_token, human
    from train.compose import compose

    config = compose(words)
    rows = describe(config.model)
    flops = flops_per_token(config.model, config.train.sequence_length)
    rows.append(
        (
            "FLOPs a token",
            f"{human(flops)} forward and backward at train.sequence_length={config.train.sequence_length}",
        )
    )
    for name, value in rows:
        print(f"{name:18} {value}")
    return 0


def export(words: list[str]) -> int:
    """export source=… target=DIR   a checkpoint as a Hugging Face folder

    longcat export source=runs/quickstart target=exports/quickstart
    longcat export source=runs/quickstart target=exports/loadable export.layout=transformers

    export.layout=released (default) is what serving engines read, transformers what transformers 5.23 loads;
    export.dtype=bfloat16|float32; export.shard_gib=5; export.tokenizer=FILE where the corpus has moved.
    """
    from launch.options import read_options
    from train.huggingface.export import ExportOptions
    from train.huggingface.export import export as write

    print(write(read_options(ExportOptions, words)))
    return 0


def import_(words: list[str]) -> int:
    """import source=DIR target=…   a Hugging Face folder as a checkpoint at step 0, for any layout

    longcat import source=exports/quickstart target=checkpoints/quickstart
    longcat import source=LongCat-Flash-Chat target=checkpoints/flash model.num_mtp_layers=0

    Other words are keys of the configuration: model.expected_ffn_experts, which config.json does not know, or
    balance.method, whose state the checkpoint holds.
    """
    from launch.options import split_options
    from train.huggingface.import_folder import ImportOptions, how_to_train, import_folder

    options, overrides = split_options(ImportOptions, words)
    target, config = import_folder(options, overrides)
    print(target)
    print("\n".join(how_to_train(target, config)))
    return 0


def generate(words: list[str]) -> int:
    """generate source=… prompt=…   text from a checkpoint or an export, and how many MTP drafts stood

    longcat generate source=runs/quickstart prompt="def main(" max_tokens=64
    longcat generate source=exports/quickstart prompt="import " temperature=0.8 top_p=0.95 seed=1

    temperature=0 (default) takes the likeliest token; drafts=false leaves MTP out; dtype=auto|bfloat16|float32;
    tokenizer=FILE where the corpus has moved.
    """
    from launch.generate import GenerateOptions, generate_text, summary
    from launch.options import read_options

    options = read_options(GenerateOptions, words)
    text, made, seconds = generate_text(options)
    print(options.prompt + text)
    print(f"\n{summary(made, seconds)}")
    return 0
