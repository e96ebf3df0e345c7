"""The verbs of `longcat`; the docstring of each is its help."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from launch import checkpoint_verbs
from longcat.errors import CORRUPT, OK, ConfigError
from longcat.garbage import import_without_collections

if TYPE_CHECKING:
    from train.config import Config

MULTIRUN = ("-m", "--multirun")


def train(arguments: list[str]) -> int:
    """train key=value …            train a model; -m key=a,b,… trains once for each choice (a Hydra multirun)

    longcat train experiment=quickstart
    longcat train model=small train.steps=2000 run.name=first run.num_processes=2
    longcat train -m optim.lr=1e-3,3e-3 model=debug
    longcat train model=small plan=true                      trains nothing: prints what longcat plan prints

    The keys are those of the dataclasses in train/config.py; the choices of a group are the files in
    configs/<group>, and in <group> of a folder conf/ here or of --config-dir DIR. --cfg job prints the composed
    configuration and ends. The run folder runs/<run.name> is made or resumed. Under torchrun:
    torchrun --nproc-per-node 2 --no-python longcat-rank key=value …
    """
    from train.compose import compose, with_search_path

    if "plan=true" in arguments:
        return plan([argument for argument in arguments if argument != "plan=true"])
    arguments = [argument for argument in arguments if argument != "plan=false"]
    shows, arguments = split_cfg(arguments)
    multirun = any(argument in MULTIRUN for argument in arguments)
    if multirun and not shows:
        from launch.sweeps.sweep import run_sweep

        return run_sweep(with_search_path([argument for argument in arguments if argument not in MULTIRUN]))
    if multirun:
        raise ConfigError("--cfg job prints the configuration of one run; leave out -m")
    config = compose(arguments)
    if shows:
        print(as_yaml(config), end="")
        return 0
    from launch.local import run_ranks

    return run_ranks(with_search_path(arguments), config)


def slurm(arguments: list[str]) -> int:
    """slurm key=value … [--submit] write, or also submit, an sbatch script that trains and keeps the job alive

    longcat slurm model=small run.name=first slurm.nodes=2 slurm.gpus_per_node=8 slurm.time=24:00:00
    longcat slurm model=small run.name=first slurm.nodes=2 slurm.spares=1 slurm.partition=gpu slurm.account=me --submit

    The keys are those of longcat train, and slurm.*: nodes, spares, time, partition, account, qos, gpus_per_node,
    cpus_per_node, signal_seconds, container, mounts, venv, setup, mail, env.NAME, sbatch.NAME and others
    (docs/reference/keys.md). Prints the path of the script, runs/<run.name>/slurm.sh. The job saves before the time
    limit and is queued again, survives a lost node, and says in runs/<run.name>/slurm-JOB.log what it does and why.
    """
    from launch.slurm.submit import slurm as write

    return write(arguments)


def split_cfg(arguments: list[str]) -> tuple[bool, list[str]]:
    """Whether `--cfg job` (or -c job) is among the arguments, and the other arguments."""
    rest, shows = [], False
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag not in ("--cfg", "-c"):
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if value != "job":
            raise ConfigError(f"--cfg {value} is not known; say --cfg job, which prints the composed configuration")
        shows = True
    return shows, rest


def as_yaml(config: Config) -> str:
    """The composed configuration as YAML."""
    import yaml

    from train.run_dir.folder import as_mapping

    return yaml.safe_dump(as_mapping(config), sort_keys=False, allow_unicode=True)


def check(arguments: list[str]) -> int:
    """check key=value …            check sizes, memory and data of a run; trains nothing

    longcat check model=small run.num_processes=2 data.paths=[data/mine/corpus]

    Takes the keys of longcat train. Ends with exit code 2 and one line where the run would be refused: a wrong value or
    layout, less memory than the formula asks for, a corpus that is missing or has too many token ids, or a run folder
    of another configuration.
    """
    from train.compose import compose

    config = compose(arguments)
    from launch.check import check as check_run

    for name, value in check_run(config):
        print(f"{name:18} {value}")
    return 0


def completion(arguments: list[str]) -> int:
    """completion bash|zsh|fish     print a script that completes verbs, keys and choices

    source <(longcat completion bash)
    """
    from launch.completion import script

    if len(arguments) != 1:
        raise ConfigError("longcat completion needs the name of a shell: bash, zsh or fish")
    print(script(arguments[0], VERBS), end="")
    return 0


def data(arguments: list[str]) -> int:
    """data build key=value …       build a tokenizer and a .bin/.idx corpus from any source of the `datasets` package

    longcat data build                                        default: Python sources of this machine
    longcat data build data.source=my/folder data.out=data/mine
    longcat data build data.source=owner/name data.subset=default data.text_field=text data.out=data/hub

    A source is a hub id, a folder, a file or a glob of parquet, JSON lines or text files. The vocabulary has
    model.vocab_size entries; data.tokenizer=FILE uses a tokenizer instead of training one.
    """
    from train.compose import compose
    from train.data.build import build

    if not arguments or arguments[0] != "build":
        raise ConfigError("longcat data has one command: longcat data build key=value …")
    config = compose(arguments[1:])
    build(config.data, config.model.vocab_size)
    return 0


def report(arguments: list[str]) -> int:
    """report RUN [RUN …]           write report.html for a run or a sweep, or a comparison of several runs

    longcat report runs/quickstart
    longcat report runs/rates-sweep a sweep's folder, finished or not: one table and one picture
    longcat report runs/a runs/b    writes comparison.html beside the first
    """
    from train.report import write_comparison, write_report, write_sweep_report
    from train.sweeps.results import is_sweep

    if not arguments:
        raise ConfigError("longcat report needs a run folder, for instance runs/quickstart")
    folders = [Path(argument) for argument in arguments]
    if len(folders) == 1:
        print(write_sweep_report(folders[0]) if is_sweep(folders[0]) else write_report(folders[0]))
    else:
        print(write_comparison(folders, folders[0].parent / "comparison.html"))
    return 0


def diff(arguments: list[str]) -> int:
    """diff RUN RUN                 find the first step, layer and tensor in which two runs or checkpoints differ

    longcat diff runs/a runs/b
    longcat diff runs/a/checkpoints/step-00000100 runs/b/checkpoints/step-00000100

    Compares metrics.jsonl, routing.jsonl and the checkpoints of the same steps bit by bit, whatever the layouts;
    metrics of the clock (step_seconds, mfu, …) are left out. The exit code is 0 if they are the same, 1 if they differ.
    """
    from train.diff import compare_runs, describe

    if len(arguments) != 2:
        raise ConfigError("longcat diff compares two folders: longcat diff runs/a runs/b")
    found = compare_runs(*(Path(argument) for argument in arguments))
    print("\n".join(describe(found)))
    return 0 if found.same else 1


def replay(arguments: list[str]) -> int:
    """replay BUNDLE                repeat an operator call in which a run found silent data corruption

    longcat replay runs/a/sdc/step-00000120-rank-3.pt

    A run that ends with exit code 5 in an operator writes such a file. Repeated here, the call shows whether this
    machine computes what the run computed. The exit code is 0 if nothing differs, 5 if something does.
    """
    from parallel.sdc.bundle import describe
    from parallel.sdc.bundle import replay as repeat

    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ConfigError("longcat replay repeats the call of one file: longcat replay runs/a/sdc/step-….pt")
    found = repeat(Path(arguments[0]))
    print("\n".join(describe(found)))
    return CORRUPT if found.shows else OK


def checkpoint(arguments: list[str]) -> int:
    """checkpoint list|verify DIR   list the checkpoints of a run folder, or verify their hashes

    longcat checkpoint list runs/quickstart
    longcat checkpoint verify runs/quickstart/checkpoints/step-00000100
    """
    from parallel.memory import mib
    from train.checkpoint.manifest import MANIFEST, NAME, list_checkpoints, size, verify

    if len(arguments) != 2 or arguments[0] not in ("list", "verify"):
        raise ConfigError("say longcat checkpoint list DIR or longcat checkpoint verify DIR")
    folder = Path(arguments[1])
    inside = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    is_one = inside.is_dir() and (NAME.search(inside.name) or (inside / MANIFEST).is_file())
    found = [inside] if is_one else list_checkpoints(inside)
    if not found:
        raise ConfigError(f"{folder} has no checkpoint; give a run folder or a step-… folder")
    broken = 0
    for path in found:
        problem = verify(path).problem if arguments[0] == "verify" else None
        print(f"{path}  {mib(size(path))}" + ("" if arguments[0] == "list" else f"  {problem or 'valid'}"))
        broken += problem is not None
    if broken:
        raise ConfigError(
            f"{broken} of {len(found)} checkpoints in {folder} not valid; restore their files, or resume the run, "
            f"which skips them"
        )
    return 0


def transfer(arguments: list[str]) -> int:
    """transfer proxy=RUN model=…   carry the rates and initial scales of a narrow run to a wider model

    longcat transfer proxy=runs/narrow model=flash
    longcat transfer proxy=runs/rates-sweep model=flash target=conf/experiment/wide.yaml parallel.ep=32

    proxy is a finished run, or a sweep's folder for its best run (lowest loss, averaged over seeds). Writes
    conf/experiment/MODEL-from-RUN.yaml, or target=DIR/experiment/NAME.yaml: a configuration for
    `longcat train experiment=NAME` in which each value says where it comes from. Table 1 of the report carries rates
    over widths alone: other differences are refused, unless transfer.allow=depth,sparsity,batch,shape,vocabulary
    names them. Other arguments are keys of the target.
    """
    from launch.options import split_options
    from train.compose import OWN_FOLDER
    from train.transfer import TransferConfig
    from train.transfer import transfer as write

    options, overrides = split_options(TransferConfig, arguments)
    choice = ""
    if options.proxy and not (Path(options.proxy) / "config.yaml").is_file():
        from launch.sweeps.sweep import best_run, describe_choice

        sweep = Path(options.proxy)
        if (best := best_run(sweep)) is not None:
            options.proxy, choice = str(best), describe_choice(sweep)
            print(f"proxy {best}: {choice}")
    path, width = write(options, overrides, choice)
    folder = "" if str(path.parent.parent) == OWN_FOLDER else f" --config-dir {quote(str(path.parent.parent))}"
    print(f"{path}: {options.proxy} carried to s = {width:g} times its width")
    print(f"train it with longcat train {quote(f'experiment={path.stem}')}{folder}")
    return 0


def plan(arguments: list[str]) -> int:
    """plan key=value … [--json]    say whether a run fits, how fast it would be and what to change; trains nothing

    longcat plan model=small parallel.ep=2 plan.ranks=2
    longcat plan model=flash plan.ranks=256 plan.cluster=h800 parallel.ep=32 parallel.cp=8 train.sequence_length=8192
    longcat plan search model=small plan.ranks=8 plan.cluster=h100      the fastest layouts that fit

    The keys are those of longcat train, and plan.ranks (GPUs), plan.cluster (h100, h800, h200, b200 or a YAML file),
    plan.exact, plan.faults_per_gpu_year, plan.save_seconds and plan.restart_seconds. Nothing is allocated: the models
    of a rank for each place in the pipeline are built, and a step's forward and backward run, on tensors without
    memory, in a world of ranks that do not exist. Prints memory, FLOPs, messages, step time and availability.
    """
    with import_without_collections("launch.plan.plan"):
        from launch.plan.nearest import fitting_near, plan_or_nearest
        from launch.plan.plan import read
        from launch.plan.show import as_json, table

    words = [argument for argument in arguments if argument != "--json"]
    if words[:1] == ["search"]:
        from launch.plan.cluster import find_cluster
        from launch.plan.search import lines, search
        from launch.plan.show import search_as_json

        config, options = read(words[1:])
        found, cluster, nearest = search(config, options), find_cluster(options.cluster), ""
        if found.refusal or not found.fitting:
            nearest = fitting_near(config, options, cluster) or "No layout near it fits, nor on 16 times as many GPUs."
        if "--json" in arguments:
            print(search_as_json(found, nearest))
        else:
            print("\n".join([*lines(found, options, cluster.capacity), *([nearest] if nearest else [])]))
        return OK
    planned = plan_or_nearest(*read(words))
    print(as_json(planned) if "--json" in arguments else "\n".join(table(planned)))
    return OK


def counts(arguments: list[str]) -> int:
    """counts model=PRESET …        print parameters, active parameters and FLOPs per token; builds nothing

    longcat counts model=flash      560.66B, active 18.69B / 27.15B / 31.38B
    """
    from longcat.counts import describe, flops_row
    from train.compose import compose

    config = compose(arguments)
    length, masks = config.train.sequence_length, config.data.mask_documents
    for name, value in [*describe(config.model), flops_row(config.model, length, masks)]:
        print(f"{name:18} {value}")
    return 0


def export(arguments: list[str]) -> int:
    """export source=… target=DIR   write a checkpoint as a Hugging Face folder

    longcat export source=runs/quickstart target=exports/quickstart
    longcat export source=runs/quickstart target=exports/loadable export.layout=transformers

    export.layout=released (default) is what serving engines read, export.layout=transformers what transformers 5.23
    loads; export.dtype=bfloat16|float32; export.shard_gib=5; export.tokenizer=FILE if the corpus has moved.
    """
    from launch.options import read_options
    from train.huggingface.export import ExportOptions
    from train.huggingface.export import export as write

    target, notes = write(read_options(ExportOptions, arguments))
    print(target)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


def import_(arguments: list[str]) -> int:
    """import source=DIR target=…   write a Hugging Face folder as a checkpoint at step 0, for any layout

    longcat import source=exports/quickstart target=checkpoints/quickstart
    longcat import source=LongCat-Flash-Chat target=checkpoints/flash model.num_mtp_layers=0

    Other arguments are keys of the configuration, for instance model.expected_ffn_experts, which config.json does
    not have and which is asked for unless the model is a released one, or balance.method, whose state the checkpoint
    contains.
    """
    from launch.options import split_options
    from train.huggingface.import_folder import ImportOptions, how_to_train, import_folder

    options, overrides = split_options(ImportOptions, arguments)
    target, config = import_folder(options, overrides)
    print(target)
    print("\n".join(how_to_train(target, config)))
    return 0


def generate(arguments: list[str]) -> int:
    """generate source=… prompt=…   generate text from a checkpoint or an export; reports accepted MTP drafts

    longcat generate source=runs/quickstart prompt="def main(" max_tokens=64
    longcat generate source=exports/quickstart prompt="import " temperature=0.8 top_p=0.95 seed=1

    temperature=0 (default) takes the most likely token; drafts=false leaves MTP out; dtype=auto|bfloat16|float32;
    tokenizer=FILE if the corpus has moved.
    """
    from launch.generate import GenerateOptions, generate_text, summary
    from launch.options import read_options

    options = read_options(GenerateOptions, arguments)
    text, made, seconds = generate_text(options)
    print(options.prompt + text)
    print(f"\n{summary(made, seconds)}")
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "slurm": slurm,
    "plan": plan,
    "check": check,
    "data": data,
    "report": report,
    "diff": diff,
    "replay": replay,
    "checkpoint": checkpoint,
    "grow": checkpoint_verbs.grow,
    "merge": checkpoint_verbs.merge,
    "transfer": transfer,
    "counts": counts,
    "export": export,
    "import": import_,
    "generate": generate,
    "completion": completion,
}
