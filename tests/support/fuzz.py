"""Random configurations of a short run: values of each key's type, extremes, wrong types, groups, unknown keys."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum
from typing import Any, get_type_hints

from longcat.counts import count_parameters, flops_per_token
from train.compose import GROUPS, leaf_keys
from train.config import Config

WHOLE = ["0", "1", "-1", "2", "3", "4", "5", "7", "8", "16", "33", "64"]
WHOLE_EXTREMES = [
    "1000", "65536", "1000000", "2147483647", "2147483648", "9223372036854775807", "9223372036854775808", "-2147483649",
    "1e9", "1e14", "1" * 30, "1" * 5000, "1e400", "0x10", "1_000", "1.0", "1.5",
]  # fmt: skip
REAL = ["0", "0.1", "0.25", "0.5", "0.9", "1", "1.5", "2", "10", "1e-3", "1e-6", "1e-12", "-0.1"]
REAL_EXTREMES = [
    "1e-46", "1e-40", "1.2e-38", "1e-30", "-0.0", "0.9999999999", "1e9", "1e18", "1e30", "3e38", "1e39", "1e300",
    "-1e300", "inf", "-inf", "nan", "9" * 400,
]  # fmt: skip
WRONG = [
    "null", "true", "x", "", "''", "[1]", "[]", "{a: 1}", "'1 2'", "???", "${nothing}", "${train.steps}",
    "${oc.env:NOTHING}", "[[1]]", "{}", "'${'", "a=b", "ü", "\udcff", "1,2",
]  # fmt: skip
TEXT = ["a", "a b", "ü", "x" * 300, "..", ".", "a/b", "/", "'a=b'", "a.b", "-", "0", "1e5", "null", "'null'", "~"]
LISTS = [
    "[]", "[1]", "[0.9,0.95]", "[0.5,0.5,0.5]", "[x]", "[1,2]", "[nan,0]", "[1e-46,0.5]", "[1,1]", "[0,0]", "[-1]",
    "[null]", "[[1]]", "[1e300]", "[{start_tokens: 5, weights: [1]}]", "[{start_tokens: 0, weights: [1]}]",
    "[{start_tokens: 9, weights: []}]", "[{a: 1}]",
]  # fmt: skip
CHOICES = ["null", "[]", "[debug,tiny]", "''", "", "debug", "tiny", "wsd", "cosine", "constant", "python_source", "x",
           "../model/tiny", "debug,tiny", "{a: 1}", "quickstart", "/", "debug.yaml"]  # fmt: skip
STRANGE = [
    "hydra=null", "hydra.run.dir=x", "hydra/launcher=basic", "hydra.searchpath=null", "hydra.searchpath=[nowhere]",
    "hydra.job.chdir=true", "hydra.output_subdir=x", "~model", "~optim", "~train.steps", "+model=tiny", "++model=tiny",
    "model@x=tiny", "/model=tiny", "+optim.x=1", "++optim.lr=1e-3", "+optim.lr=1e-3", "optim=null", "optim={}", "=1",
    "optim={lr: 1e-3}", "train={steps: x}", "optim.betas.0=0.5", "optim.betas.7=0.5", "optim.betas[0]=1", ".=1",
    "optim.=1", "optim..lr=1", "--help-me", "-x", "", "=", "learning_rate=1", "optim.learning_rate=1", "lr=1",
    "--config-dir=nowhere", "model.name.x=1", "data.stages.0.weights=[1]", "ü=1", "\udcff=1", "train.steps", "a=${",
]  # fmt: skip
# Not drawn: where the run and its data are, what would take minutes or need a network
FIXED = {
    "run.dir", "run.name", "data.paths", "parallel.compile", "parallel.timeout_seconds", "run.num_processes",
    "logging.wandb", "data.cache_dir",
}  # fmt: skip
TIMEOUTS = ["0", "-1", "1e-30", "0.5", "3600", "1e8", "1e9", "1e15", "1e300", "nan", "inf", "x", "null"]
PROCESSES = ["0", "-2", "1", "4097", "1000000", "x", "1.5", "null"]
MAX_FLOPS = 4e9  # of a run that is started: a second or two
MAX_PARAMETERS = 4_000_000
MAX_LAYERS = 12
MAX_MICRO_BATCHES = 64


@dataclass(frozen=True)
class Case:
    """The overrides of one run, beside those of the base, and its number."""

    number: int
    words: list[str]


def cases(count: int, seed: int, keys: list[str] | None = None) -> list[Case]:
    """``count`` configurations that depend only on ``seed``; of ``keys`` alone if given, and then plausible ones."""
    rng = random.Random(seed)
    known = keys or sorted(set(leaf_keys(Config)) - FIXED)
    found = []
    for number in range(count):
        words = [
            word(rng, rng.choice(known), wild=keys is None and rng.random() < 0.3)
            for _ in range(rng.choice([1, 1, 2, 3]))
        ]
        if keys is None and rng.random() < 0.2:
            words.append(strange(rng))
        found.append(Case(number, words))
    return found


def word(rng: random.Random, key: str, wild: bool) -> str:
    """One override of ``key``: a value of its type, or with ``wild`` an extreme or one of a wrong type."""
    kind, value = type_of(key), rng.choice(WRONG)
    if not wild or rng.random() < 0.6:
        value = rng.choice(of_type(kind, wild))
    return f"{key}={value}"


def of_type(kind: Any, wild: bool) -> list[str]:
    """Values of an annotated type."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [str(member.value) for member in kind] + (["x", "null"] if wild else [])
    if kind is bool:
        return ["true", "false", *(["yes", "1", "2"] if wild else [])]
    text = str(kind)
    if "list" in text:
        return LISTS
    if kind is int or "int" in text:
        return WHOLE_EXTREMES if wild else WHOLE
    if kind is float:
        return REAL_EXTREMES if wild else REAL
    return TEXT


def strange(rng: random.Random) -> str:
    """A group's choice, one of Hydra's settings, an unknown key, or a limit of the keys that are not drawn."""
    kind = rng.randrange(4)
    if kind == 0:
        return f"{rng.choice(GROUPS)}={rng.choice(CHOICES)}"
    if kind == 1:
        return f"parallel.timeout_seconds={rng.choice(TIMEOUTS)}"
    if kind == 2:
        return f"run.num_processes={rng.choice(PROCESSES)}"
    return rng.choice(STRANGE)


def type_of(key: str) -> Any:
    """The annotated type of a dotted key."""
    kind: Any = Config
    for part in key.split("."):
        kind = get_type_hints(kind)[part]
    return kind


def is_quick(config: Config) -> bool:
    """Whether a run of ``config`` takes about a second: large ones are composed and checked, but not started."""
    model, train = config.model, config.train
    steps = train.steps + (config.validation.batches if config.validation.every else 0)
    flops = flops_per_token(model, train.sequence_length, mtp=True) * train.global_batch_size * train.sequence_length
    return (
        count_parameters(model).total + count_parameters(model).mtp < MAX_PARAMETERS
        and model.num_layers + model.num_mtp_layers <= MAX_LAYERS
        and train.global_batch_size // train.micro_batch_size <= MAX_MICRO_BATCHES
        and flops * steps < MAX_FLOPS
    )
