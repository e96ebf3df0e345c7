"""Reading a run folder: metrics, configuration, routing, baselines and text, each of them optional."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longcat.errors import ConfigError
from train.checkpoint.files import read_bytes, regular
from train.health.events import HEALTH
from train.launch_config import JOURNAL
from train.loggers.jsonl import missing_steps
from train.run_dir.exit_file import EXIT
from train.run_dir.folder import is_config_changed
from train.run_dir.sealed import DamagedError, unseal_line

Array = NDArray[np.float64]
LARGEST = 1e100  # beyond it a number is spoilt: a chart could not even scale it
MAX_ROUTING_LINES = 480  # read evenly out of any number of them: one line of a large model is 100 kB


@dataclass(frozen=True)
class RoutingHistory:
    """Selections and biases over time. S rows read, L layers, E = FFN experts then identity experts."""

    steps: Array  # [S]
    counts: Array  # [S, L, E]
    bias: Array  # [S, L, E]


@dataclass
class RunData:
    """The content of a run folder's files. `notes` lists what could not be read, for the page."""

    path: Path
    config: dict[str, Any]
    columns: dict[str, Array]  # one value for each step, NaN where the key was absent
    routing: RoutingHistory | None = None
    baselines: dict[str, float] = field(default_factory=dict)
    documents: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] | None = None  # of health.jsonl, without those of undone steps; None without a file
    starts: list[dict[str, Any]] = field(default_factory=list)  # of launch.jsonl, where something restarts the ranks
    notes: list[str] = field(default_factory=list)
    total_seconds: float = math.nan
    last_written: datetime | None = None

    @property
    def name(self) -> str:
        """The run's name from the configuration, or the folder's."""
        return str(self.setting("run.name") or self.path.resolve().name)

    def setting(self, dotted: str) -> Any:
        """Return a configuration value by its dotted key, None when it is absent."""
        value: Any = self.config
        for part in dotted.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def number(self, dotted: str) -> float | None:
        """Return a configuration value when it is a finite number, else None."""
        value = self.setting(dotted)
        return number(value) if math.isfinite(number(value)) else None

    def series(self, key: str) -> tuple[Array, Array]:
        """Return (x, y) of one metric where both are finite; x is tokens seen, or steps without tokens."""
        if key not in self.columns:
            return np.empty(0), np.empty(0)
        x, y = self.axis, self.columns[key]
        keep = np.isfinite(x) & np.isfinite(y)
        return x[keep], y[keep]

    def points(self, key: str) -> tuple[Array, Array]:
        """Return (steps, y) of one metric where y is finite."""
        if key not in self.columns:
            return np.empty(0), np.empty(0)
        keep = np.isfinite(self.columns[key])
        return self.columns["step"][keep], self.columns[key][keep]

    def position(self, axis: str) -> Array:
        """Return each row's position on an axis: `step`, `tokens`, `flops` or `seconds` since the first row.

        FLOPs of runs that did not record them follow from the configuration's FLOPs per token.
        """
        absent = np.full(len(self.columns["step"]), math.nan)
        if axis == "seconds":
            return _total(self.columns.get("step_seconds", absent))
        if axis != "flops" or "flops" in self.columns:
            values = self.columns.get(axis, absent)
            return _total(values) if axis == "flops" else values
        per_token = self.number("derived.flops_per_token")
        return absent if per_token is None else self.columns.get("tokens", absent) * per_token

    @property
    def axis(self) -> Array:
        """The horizontal axis of every curve."""
        return self.columns[self.axis_name] if self.columns else np.empty(0)

    @property
    def axis_name(self) -> str:
        """`tokens` where the metrics carry it, else `step`."""
        return "tokens" if np.isfinite(self.columns.get("tokens", np.empty(0))).any() else "step"

    def final(self, key: str) -> float:
        """Return the mean of a metric's last finite values (2 %, at most 50 of them); NaN without any."""
        values = self.series(key)[1]
        return float(values[-tail_length(len(values)) :].mean()) if len(values) else math.nan

    def last(self, key: str) -> float:
        """Return the last finite value of a metric, NaN without any."""
        values = self.series(key)[1]
        return float(values[-1]) if len(values) else math.nan


def _total(values: Array) -> Array:
    """Sums up to each row, where rows without a value count as the mean of the others."""
    known = np.isfinite(values) & (values >= 0)
    return np.cumsum(np.where(known, values, values[known].mean())) if known.any() else np.full(len(values), math.nan)


def tail_length(count: int) -> int:
    """Return over how many last steps a final figure is averaged."""
    return max(1, min(50, count // 50))


def read_run(run_dir: Path) -> RunData:
    """Read a run folder. Raises ConfigError where `run_dir` holds neither config.yaml nor metrics.jsonl."""
    run_dir = Path(run_dir)
    metrics = run_dir / "metrics.jsonl"
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir} is no folder; give the folder of a run, such as runs/quickstart")
    if not metrics.is_file() and not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir} is no run: it has no config.yaml and no metrics.jsonl; give runs/<name>")
    run = RunData(run_dir, _read_config(run_dir / "config.yaml"), {})
    if (run_dir / "config.yaml").is_file() and is_config_changed(run_dir):
        run.notes.append("config.yaml has changed since the run wrote it")
    if metrics.is_file():
        _read_metrics(metrics, run)
    _read_routing(run_dir / "routing.jsonl", run)
    if (run_dir / HEALTH).is_file():
        run.events = events_in_force(_json_lines(run_dir / HEALTH, run))
    if (run_dir / JOURNAL).is_file():
        run.starts = list(_json_lines(run_dir / JOURNAL, run))
    baselines = _read_json(run_dir / "baselines.json", run)
    run.baselines = {k: float(v) for k, v in baselines.items() if is_number(v)}
    documents = _read_json(run_dir / "text.json", run).get("documents")
    run.documents = [d for d in documents if _is_document(d)] if isinstance(documents, list) else []
    return run


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OmegaConfBaseException, ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {_one_line(error)}; restore or remove it") from error
    except Exception as error:  # PyYAML's own errors, by name: it is no direct dependency
        if type(error).__module__.startswith("yaml"):
            raise ConfigError(f"{path} is not YAML: {_one_line(error)}; restore or remove it") from error
        raise
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds a list, not a mapping; restore or remove it")
    return {str(key): value for key, value in config.items()}


def _read_metrics(path: Path, run: RunData) -> None:
    rows: dict[int, dict[str, Any]] = {}
    seconds, broken = 0.0, 0
    for row in _json_lines(path, run):
        if not math.isfinite(number(row.get("step"))):
            broken += 1
            continue
        rows[int(row["step"])] = row  # a step repeated after a restart replaces the lost one
        spent = number(row.get("step_seconds"))
        seconds += spent if math.isfinite(spent) else 0.0
    if broken:
        run.notes.append(f"{path.name}: {broken} lines without a step are left out")
    if gaps := missing_steps(sorted(rows)):
        run.notes.append(f"{path.name}: the lines of steps {gaps} are missing")
    run.last_written = datetime.fromtimestamp(path.stat().st_mtime, tz=UTC)
    if not rows:
        return
    ordered = [rows[step] for step in sorted(rows)]
    keys: set[str] = set().union(*ordered)
    run.columns = {key: np.array([number(row.get(key)) for row in ordered]) for key in sorted(keys)}
    run.total_seconds = seconds or math.nan


def events_in_force(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events of health.jsonl that still hold, in their order.

    A start at a step and a rollback to one take back what was found after it, since those steps are trained again. A
    rollback itself holds from the step on to which it went back; one that is repeated after a start counts once.
    """
    kept: list[tuple[float, dict[str, Any]]] = []  # since which step, event
    for row in rows:
        step, back = number(row.get("step")), number(row.get("to_step"))
        if not math.isfinite(step) or not isinstance(row.get("event"), str):
            continue
        if row["event"] == "start" or math.isfinite(back):
            start = back if math.isfinite(back) else step
            kept = [(since, event) for since, event in kept if since <= start]
            step = start
        if row["event"] != "start" and row not in (event for _, event in kept):
            kept.append((step, row))
    return [event for _, event in kept]


def number(value: Any) -> float:
    """A number of a file; NaN for everything else, such as null, "NaN" or a number beyond `LARGEST`."""
    return float(value) if is_number(value) else math.nan


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and not abs(value) > LARGEST


def _is_document(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    pieces, counts = value.get("pieces"), value.get("ffn_experts")
    return isinstance(pieces, list) and isinstance(counts, list) and 0 < len(pieces) == len(counts)


def _json_lines(path: Path, run: RunData, every: int = 1) -> Iterator[dict[str, Any]]:
    """Yield the objects of a .jsonl file, and note the lines that are left out.

    The last line of a run that has not ended may be cut off: it is being written, or the run was killed.
    """
    broken = changed = 0
    pending = False
    with open(path, "rb", opener=regular) as file:
        for number, line in enumerate(file):
            if number % every or not line.strip():
                continue
            broken += pending
            pending = False
            try:
                yield unseal_line(line)
            except DamagedError:
                changed += 1
            except ValueError:
                pending = True
    broken += pending and (line.endswith(b"\n") or (path.parent / EXIT).exists())
    for count, what in ((broken, "could not be read"), (changed, "changed since they were written")):
        if count:
            run.notes.append(f"{path.name}: {'1 line' if count == 1 else f'{count} lines'} {what} and left out")


def _read_routing(path: Path, run: RunData) -> None:
    if not path.is_file():
        return
    with open(path, "rb", opener=regular) as file:
        lines = sum(1 for _ in file)
    shape: tuple[int, ...] | None = None
    steps, counts, biases, odd = [], [], [], 0
    for row in _json_lines(path, run, every=max(1, math.ceil(lines / MAX_ROUTING_LINES))):
        count, bias = _matrix(row.get("counts")), _matrix(row.get("bias"))
        shape = shape or (count.shape if count is not None else None)
        if (
            count is None
            or bias is None
            or not count.shape == bias.shape == shape
            or not math.isfinite(number(row.get("step")))
        ):
            odd += 1
            continue
        steps.append(float(row["step"]))
        counts.append(count)
        biases.append(bias)
    if odd:
        run.notes.append(f"{path.name}: {odd} rows are of another shape or not finite and are left out")
    if len(steps) >= 2:
        order = np.argsort(np.array(steps), kind="stable")
        run.routing = RoutingHistory(np.array(steps)[order], np.array(counts)[order], np.array(biases)[order])


def _matrix(value: Any) -> Array | None:
    try:
        matrix = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    return matrix if matrix.ndim == 2 and matrix.size and np.isfinite(matrix).all() else None


def _read_json(path: Path, run: RunData) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return unseal_line(read_bytes(path))
    except ValueError as error:
        run.notes.append(f"{path.name} is left out: {_one_line(error)}")
        return {}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
