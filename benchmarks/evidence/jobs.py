"""The runs that claims ask for: one per configuration, whichever claims share it; their folders and stored results."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from benchmarks.evidence import routing
from benchmarks.evidence.claims import FOLDER, Arm, Claim
from longcat.errors import OK
from longcat.json_text import dumps
from train.checkpoint.grow import GrowConfig, GrowthOptions, grow
from train.checkpoint.manifest import list_checkpoints
from train.compose import compose
from train.config import Config
from train.keys.dotted import flatten
from train.process.git import git_commit
from train.run_dir.folder import describe_corpora
from train.run_dir.sealed import intact_lines

RESULTS = FOLDER / "runs"
WITHOUT_EFFECT = ("run", "logging", "launch", "profile", "checkpoint")  # sections that change no number of a run
WINDOW = 25  # steps that one row of a result's curve covers
COLUMNS = (
    "step", "tokens", "flops", "val_loss", "loss", "grad_norm", "hidden_norm_max", "ffn_experts", "ffn_experts_std",
    "load_max_over_mean",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What a finished run left: its exit code, and a row per `WINDOW` steps, FLOPs and tokens from the first step."""

    key: str
    code: int
    overrides: list[str]
    variant: str
    seed: int
    grown_from: str  # key of the run that it was grown from, or empty
    commit: str
    corpus: str  # hash of the fingerprints of corpus and tokenizer
    seconds: float
    curve: list[list[float | None]]
    routing: dict[str, float] = field(default_factory=dict)  # of the last checkpoint, see benchmarks.evidence.routing

    def column(self, name: str) -> list[float]:
        """The numbers of one of COLUMNS, without missing ones."""
        return [row[COLUMNS.index(name)] for row in self.curve if row[COLUMNS.index(name)] is not None]  # type: ignore[misc]


@dataclass(frozen=True)
class Job:
    """One run: an arm of a claim with a seed, and with a value of the tuned key where the claim tunes one."""

    claim: Claim
    arm: Arm
    seed: int
    value: float | None = None

    @property
    def label(self) -> str:
        tuned = f" {self.claim.tuning.key}={self.value:g}" if self.claim.tuning and self.value is not None else ""
        return f"{self.claim.name}: {self.arm.name}, seed {self.seed}{tuned}"

    @property
    def source(self) -> Job | None:
        """The run that this one is grown from."""
        grown = self.arm.grown
        return Job(self.claim, self.claim.arms[grown.arm], self.seed) if grown else None

    @cached_property
    def overrides(self) -> list[str]:
        tuned = [f"{self.claim.tuning.key}={self.value!r}"] if self.claim.tuning and self.value is not None else []
        own = [*self.claim.overrides, *self.arm.overrides, *tuned]
        return [f"experiment={self.claim.experiment}", *own, f"train.seed={self.seed}"]

    @property
    def config(self) -> Config:
        return composed(tuple(self.overrides))

    @cached_property
    def key(self) -> str:
        grown = [self.source.key, self.arm.grown.step, self.arm.grown.factor] if self.source and self.arm.grown else []
        return key_of(self.config, self.arm.variant, grown)

    @property
    def folder(self) -> Path:
        return self.config.run.folder.parent / self.key

    @property
    def result(self) -> Result | None:
        """The stored result; None where the claim compares what older runs' checkpoints were not measured for."""
        found = stored(RESULTS / f"{self.key}.json")
        return None if found and found.code == OK and not found.routing and self.claim.compares_routing else found

    def command(self, seconds: float) -> list[str]:
        """Arguments of benchmarks.evidence.train_arm; it stops and saves after ``seconds``."""
        run = [f"run.name={self.key}", f"train.stop_after_seconds={max(1.0, seconds):.0f}"]
        return [self.arm.variant or "-", *self.overrides, *run]

    def prepare(self) -> None:
        """Put the grown checkpoint into the run's folder, where the run resumes from it."""
        if self.source and self.arm.grown:
            name = f"step-{self.arm.grown.step:08d}"
            target = self.folder / "checkpoints" / name
            if not list_checkpoints(target.parent):
                source = self.source.folder / "checkpoints" / name
                grow(GrowConfig(str(source), str(target), GrowthOptions(self.arm.grown.factor)))

    def store(self, code: int) -> None:
        """Write the result of a run that has ended, from its metrics.

        Where the run was made again for what its last checkpoint is measured for, the curve of the first one stays: it
        has been judged, and a repeated run on another machine or version differs in its rounding.
        """
        lines = intact_lines(self.folder / "metrics.jsonl")
        before: list[list[float | None]] = []
        if self.source and self.arm.grown:
            source = self.source.result
            assert source is not None
            before = [row for row in source.curve if float(row[0] or 0) <= self.arm.grown.step]
        offset = float(before[-1][COLUMNS.index("flops")] or 0) if before else 0.0
        corpora = describe_corpora(self.config)
        result = Result(
            self.key,
            code,
            self.overrides,
            self.arm.variant,
            self.seed,
            self.source.key if self.source else "",
            git_commit()[:12],
            hashlib.sha256(dumps(corpora, sort_keys=True).encode()).hexdigest()[:16],
            round(sum(line["step_seconds"] for line in lines), 1),
            [*before, *thinned(lines, offset)],
            routing.measured(self.folder),
        )
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{self.key}.json"
        first = stored(path)
        if first and first.code == code == OK and first.corpus == result.corpus:
            result = replace(first, routing=result.routing)
        part = path.with_suffix(".partial")
        rows = ",\n  ".join(dumps(row) for row in result.curve)
        head = dumps({name: value for name, value in asdict(result).items() if name != "curve"}, indent=1)
        part.write_text(f'{head[:-2]},\n "curve": [\n  {rows}\n ]\n}}\n', encoding="utf-8")
        part.replace(path)
        stored.cache_clear()


DEFAULTS = flatten(asdict(Config()))


def key_of(config: Config, variant: str, grown: list[Any]) -> str:
    """Hash of all that decides a run's numbers: claims that ask for the same run share it.

    Values at their defaults are left out, so that a new configuration key does not make stored runs unknown.
    """
    tree = {
        name: value
        for name, value in flatten(asdict(config)).items()
        if name.partition(".")[0] not in WITHOUT_EFFECT and DEFAULTS.get(name) != value
    }
    return hashlib.sha256(dumps([tree, variant, grown], sort_keys=True).encode()).hexdigest()[:16]


@cache
def composed(overrides: tuple[str, ...]) -> Config:
    """The configuration of a run. Those that differ in seed and rate alone are composed once: it takes 0.2 s."""
    key, _, value = overrides[-1].partition("=")
    if key not in ("train.seed", "optim.lr"):
        return compose(list(overrides))
    config = copy.deepcopy(composed(overrides[:-1]))
    if key == "train.seed":
        config.train.seed = int(value)
    else:
        config.optim.lr = float(value)
    return config


@cache
def stored(path: Path) -> Result | None:
    """A stored result, or None."""
    return Result(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def thinned(lines: list[dict[str, Any]], flops: float) -> list[list[float | None]]:
    """One row of COLUMNS per window of steps: means, the largest hidden norm, and the window's last validation."""
    rows: list[list[float | None]] = []
    for start in range(0, len(lines), WINDOW):
        window = lines[start : start + WINDOW]
        flops += sum(line["flops"] for line in window)
        used = values(window, "ffn_experts_per_token")
        mean_used = mean(used)
        spread = None if mean_used is None else (sum((one - mean_used) ** 2 for one in used) / len(used)) ** 0.5
        validations = values(window, "val_loss")
        numbers = [
            validations[-1] if validations else None,
            mean(values(window, "loss")),
            mean(values(window, "grad_norm")),
            max(values(window, "hidden_norm"), default=None),
            mean_used,
            spread,
            mean(values(window, "expert_load_max_over_mean")),
        ]
        rounded = [None if one is None else float(f"{one:.6g}") for one in numbers]
        rows.append([window[-1]["step"], window[-1]["tokens"], float(f"{flops:.8g}"), *rounded])
    return rows


def values(lines: list[dict[str, Any]], key: str) -> list[float]:
    return [float(line[key]) for line in lines if isinstance(line.get(key), int | float)]


def mean(numbers: list[float]) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None
