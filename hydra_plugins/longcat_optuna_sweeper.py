"""`hydra/sweeper=optuna`: Hydra takes plug-ins from this package alone, and imports them at each start.

So this file is small; `launch/sweeps/optuna_search.py` has the rest. Hydra runs it before the module has a place in
`sys.modules`, where a dataclass would look its annotations up if they were text (`from __future__ import annotations`).
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class OptunaConfig:
    """`hydra.sweeper.…`: how values are proposed, and how many runs are started.

    Attributes:
        sampler: tpe, random or gp (which needs SciPy).
        n_trials: runs in all.
        n_jobs: runs that are proposed together; the launcher decides whether they train at the same time.
        n_startup_trials: runs with values drawn at random before the sampler learns from losses.
        seed: the same seed and losses give the same values.
        params: key: values, as on the command line, which goes first.
    """

    _target_: str = "hydra_plugins.longcat_optuna_sweeper.OptunaSweeper"
    sampler: str = "tpe"
    n_trials: int = 20
    n_jobs: int = 1
    n_startup_trials: int = 10
    seed: int = 0
    params: dict[str, str] = field(default_factory=dict)


class OptunaSweeper(Sweeper):
    """Starts the runs of a search. Arguments: see `OptunaConfig`."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from launch.sweeps.optuna_search import Settings, search

        search(self, Settings(**self.settings), arguments)


ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=OptunaConfig, provider="longcat")
