"""A sweep whose values Optuna proposes from the losses of earlier runs (`hydra/sweeper=optuna`)."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.sweeps.folder import STOPPED_MARK
from launch.sweeps.sweep import final_loss
from longcat.errors import OK, UNHEALTHY, ConfigError
from train.sweeps.results import MULTIRUN, Result, read_result, result_file

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from hydra.plugins.sweeper import Sweeper
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution

SAMPLERS = ("tpe", "random", "gp")


@dataclass(frozen=True)
class Settings:
    """`hydra.sweeper.…` (docs/guide/sweeps.md)."""

    sampler: str
    n_trials: int
    n_jobs: int
    n_startup_trials: int
    seed: int
    params: dict[str, str]

    def validate(self) -> None:
        """Raise ConfigError for a value that no search can have."""
        if self.sampler not in SAMPLERS:
            raise ConfigError(f"hydra.sweeper.sampler={self.sampler} is no sampler; use {', '.join(SAMPLERS)}")
        for name, least in (("n_trials", 1), ("n_jobs", 1), ("n_startup_trials", 0), ("seed", 0)):
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"hydra.sweeper.{name}={value} must be at least {least}")


def search(sweeper: Sweeper, settings: Settings, arguments: list[str]) -> None:
    """Start `settings.n_trials` runs, each batch with values that are proposed from the losses so far.

    A sweep that goes on proposes each run of its earlier starts again with the values it had: `run_job` returns the
    loss of those that have ended.

    Raises:
        ConfigError: no key has several values, one has values that cannot be searched, or Optuna is missing.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    settings.validate()
    assert sweeper.hydra_context is not None and sweeper.config is not None and sweeper.launcher is not None
    parser = OverridesParser.create(config_loader=sweeper.hydra_context.config_loader)
    given = parser.parse_overrides([*(f"{key}={values}" for key, values in settings.params.items()), *arguments])
    study = open_study(settings)
    space, fixed = search_space(given)
    sweeper.validate_batch_is_legal([[*fixed, *corner] for corner in corners(space)])
    folder = Path(sweeper.config.hydra.sweep.dir)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(sweeper.config, folder / MULTIRUN)
    failure: Exception | None = None
    for first in range(0, settings.n_trials, settings.n_jobs):
        if (folder / STOPPED_MARK).exists():
            break
        numbers = range(first, min(first + settings.n_jobs, settings.n_trials))
        trials = [propose(study, settings, space, folder, number) for number in numbers]
        batch = [[*fixed, *(f"{key}={value}" for key, value in trial.params.items())] for trial in trials]
        sweeper.validate_batch_is_legal(batch)
        try:
            for job in sweeper.launcher.launch(batch, initial_job_idx=first):
                job.return_value  # noqa: B018  (raises what ended the job, if anything did)
        except Exception as error:  # a cluster has lost a job: the others have results, and the search goes on
            failure = failure or error
            if not any(result_file(folder, number).is_file() for number in numbers):  # it starts none
                break
        for number, trial in zip(numbers, trials, strict=True):
            result = read_result(result_file(folder, number))
            tell(study, trial, result, final_loss(result.folder(folder)))
    say_best(study, folder)
    if failure is not None:
        raise failure


def corners(space: dict[str, BaseDistribution]) -> list[list[str]]:
    """Overrides in which each value that a key may have stands once: choices, and both ends of a range."""
    from optuna.distributions import CategoricalDistribution

    values = {
        key: list(one.choices) if isinstance(one, CategoricalDistribution) else [one.low, one.high]  # type: ignore[attr-defined]
        for key, one in space.items()
    }
    most = max(map(len, values.values()))
    return [[f"{key}={own[place % len(own)]}" for key, own in values.items()] for place in range(most)]


def search_space(overrides: list[Override]) -> tuple[dict[str, BaseDistribution], list[str]]:
    """The distribution of each key with several values, and the overrides of one value; a key's last one counts."""
    space: dict[str, BaseDistribution] = {}
    fixed: dict[str, str] = {}
    for override in overrides:
        key = override.get_key_element()
        for other in [other for other in (*space, *fixed) if other.lstrip("+") == key.lstrip("+")]:
            space.pop(other, None)
            fixed.pop(other, None)
        if override.is_sweep_override():
            space[key] = distribution(key, override)
        else:
            fixed[key] = f"{key}={override.get_value_element_as_str()}"
    if not space:
        raise ConfigError(
            "hydra/sweeper=optuna has nothing to search: give a key several values, for instance "
            "'optim.lr=tag(log,interval(1e-4,1e-2))'"
        )
    return space, list(fixed.values())


def distribution(key: str, override: Override) -> BaseDistribution:
    """`interval` (its end included), `range`, and their int and tag(log, …); the others are choices."""
    from hydra.core.override_parser.types import IntervalSweep, RangeSweep
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    values = override.value()
    known = {"log"} if isinstance(values, IntervalSweep) else set()
    unknown: set[str] = getattr(values, "tags", set()) - known
    if unknown:
        raise ConfigError(
            f"{override.input_line}: tag({min(unknown)},…) means nothing here; write tag(log,interval(low,high))"
        )
    if not isinstance(values, IntervalSweep):
        choices = list(dict.fromkeys(override.sweep_string_iterator()))
        numbers = list(values.range()) if isinstance(values, RangeSweep) else []
        if len(numbers) > 1 and all(isinstance(number, int) for number in numbers):
            return IntDistribution(min(numbers), max(numbers), step=abs(numbers[1] - numbers[0]))
        if not choices:
            raise ConfigError(f"{override.input_line} has no values; give some")
        return CategoricalDistribution(choices)
    low, high = values.start, values.end
    assert low is not None and high is not None
    log = "log" in values.tags
    if not (low < high and math.isfinite(low) and math.isfinite(high)) or (log and low <= 0):
        need = "two numbers above 0, the smaller one first" if log else "two numbers, the smaller one first"
        raise ConfigError(f"{override.input_line}: write {need}")
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log)
    return FloatDistribution(low, high, log=log)


def open_study(settings: Settings) -> Study:
    """A study in memory: what it knows of earlier starts is in the results of the sweep's folder."""
    if settings.sampler == "gp" and importlib.util.find_spec("scipy") is None:
        raise ConfigError("hydra.sweeper.sampler=gp needs the package scipy; pip install scipy, or use tpe")
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("hydra/sweeper=optuna needs the package optuna; pip install -e '.[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study()


def propose(study: Study, settings: Settings, space: dict[str, BaseDistribution], folder: Path, number: int) -> Trial:
    """The values of run ``number``: those of an earlier start, or new ones from the losses of the runs before it."""
    path = result_file(folder, number)
    if path.is_file() and (values := earlier_values(space, read_result(path))):
        study.enqueue_trial(values)
    # A seed for each run, so that a sweep that goes on draws what it would have drawn
    study.sampler = make_sampler(settings, int(np.random.SeedSequence([settings.seed, number]).generate_state(1)[0]))
    return study.ask(space)


def make_sampler(settings: Settings, seed: int) -> Any:
    """One of `SAMPLERS`."""
    from optuna.samplers import GPSampler, RandomSampler, TPESampler

    if settings.sampler == "gp":
        return GPSampler(seed=seed, n_startup_trials=settings.n_startup_trials)
    if settings.sampler == "random":
        return RandomSampler(seed=seed)
    return TPESampler(seed=seed, n_startup_trials=settings.n_startup_trials)


def earlier_values(space: dict[str, BaseDistribution], result: Result) -> dict[str, Any]:
    """The values that a run of an earlier start had; none if its overrides do not fit the space."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    texts = dict(override.split("=", 1) for override in result.overrides if "=" in override)
    values: dict[str, Any] = {}
    try:
        for key, values_of_key in space.items():
            text = texts[key]
            if isinstance(values_of_key, CategoricalDistribution):
                fits, values[key] = text in values_of_key.choices, text
            else:
                assert isinstance(values_of_key, (IntDistribution, FloatDistribution))
                values[key] = int(text) if isinstance(values_of_key, IntDistribution) else float(text)
                fits = values_of_key.low <= values[key] <= values_of_key.high
            if not fits:
                return {}
    except (KeyError, ValueError):
        return {}
    return values


def tell(study: Study, trial: Trial, result: Result, loss: float) -> None:
    """Give a run's loss to the sampler: infinite after numbers that were not finite, none where other things failed."""
    from optuna.trial import TrialState

    if result.code in (OK, UNHEALTHY):
        study.tell(trial, loss if result.code == OK and math.isfinite(loss) else math.inf)
    else:
        study.tell(trial, state=TrialState.FAIL)


def say_best(study: Study, folder: Path) -> None:
    """One line: the lowest loss so far, its run and its values."""
    from optuna.trial import TrialState

    ended = [trial for trial in study.trials if trial.state == TrialState.COMPLETE and np.isfinite(trial.values[0])]
    if ended:
        best = min(ended, key=lambda trial: trial.values[0])
        run = read_result(result_file(folder, best.number)).run
        chosen = " ".join(f"{key}={value}" for key, value in best.params.items())
        print(f"lowest of {len(ended)} losses: {best.values[0]:.4f} in {run}, {chosen}")
