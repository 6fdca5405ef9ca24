"""Options of `hydra/sweeper=optuna`: what a search is for, how long it is, and how it draws. Without Optuna itself."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pkd_lightning.checks import Faults, build, collect, suggest
from pkd_lightning.errors import ConfigError
from pkd_lightning.reporting.values import count, decimal, number, percent

LEAST_OPTUNA = 5
SAMPLERS, PRUNERS = ("tpe", "random", "nsga2"), ("median", "none")
OF_HYDRA = ("_target_", "_recursive_", "trial")


@dataclass(frozen=True)
class Goal:
    """What trials are compared by. None of the test part's.

    Attributes:
        name: as it is chosen.
        direction: `maximize` or `minimize`.
        key: of a round in results.json, of the ensemble's part where it is not known by round.
        by_round: whether it is known after each round.
    """

    name: str
    direction: str
    key: str
    by_round: bool

    def of_round(self, record: Mapping[str, Any]) -> float:
        """Its value after a round; NaN where it is missing."""
        return number(record, self.key)

    def of(self, results: Mapping[str, Any]) -> float:
        """Its value of a finished run; NaN where it is missing."""
        rounds = results["rounds"]
        if self.by_round:
            return self.of_round(rounds[-1]) if rounds else math.nan
        return number(results, "ensemble", self.key)

    def words(self, value: float) -> str:
        """`validation accuracy 97.10%`."""
        text = {"validation_accuracy": percent(value, 2), "validation_loss": decimal(value, 4)}
        return f"{self.name.replace('_', ' ')} {text.get(self.name, count(value))}"


GOALS = {
    goal.name: goal
    for goal in (
        Goal("validation_accuracy", "maximize", "prefix_validation_accuracy", True),
        Goal("validation_loss", "minimize", "validation_loss", True),
        Goal("macs", "minimize", "macs_total", False),
        Goal("params", "minimize", "params", False),
    )
}


@dataclass(frozen=True)
class Options:
    """Of a search, as conf/hydra/sweeper/optuna.yaml describes them."""

    n_trials: int = 20
    n_jobs: int = 1
    goals: list[str] = field(default_factory=lambda: ["validation_accuracy"])
    sampler: Any = "tpe"
    pruner: Any = "median"
    seed: int | None = 0
    params: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        faults = Faults(self)
        faults.whole("n_trials", 1)
        faults.whole("n_jobs", 1)
        faults.whole("seed", 0, optional=True)
        for name, offered in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
            if not (isinstance(getattr(self, name), dict) and "_target_" in getattr(self, name)):
                faults.choice(name, (*offered, "a `_target_`"))
        if not isinstance(self.goals, list) or not self.goals:
            faults.found.append(f"goals={self.goals!r}: must be a list of {', '.join(GOALS)}")
        else:
            faults.found += [
                f"goals={goal}: must be one of {', '.join(GOALS)}.{suggest(str(goal), GOALS)}"
                for goal in self.goals
                if str(goal) not in GOALS
            ]
            if len(set(map(str, self.goals))) < len(self.goals):
                faults.found.append(f"goals={self.goals}: names a goal twice")
        faults.raise_if_any()

    @classmethod
    def of(cls, sweeper: DictConfig) -> "Options":
        """Those of a sweeper's configuration.

        Raises:
            ConfigError: for each that is at fault.
        """
        given: Any = OmegaConf.to_container(sweeper, resolve=True)
        given = {key: value for key, value in given.items() if key not in OF_HYDRA}
        if isinstance(given.get("goals"), str):
            given["goals"] = [given["goals"]]
        if given.get("pruner", "") is None:
            given["pruner"] = "none"
        faults: list[str] = []
        made = collect(faults, "hydra.sweeper", lambda: build(cls, given))
        if made is None:
            raise ConfigError(faults)
        return made

    @property
    def purposes(self) -> list[Goal]:
        """The goals."""
        return [GOALS[name] for name in self.goals]

    @property
    def watched(self) -> Goal | None:
        """The goal that trials may be pruned by after a round: the only one, where it is known by then."""
        (first, *others) = self.purposes
        return first if first.by_round and not others and self.pruner != "none" else None

    @property
    def unpruned(self) -> str | None:
        """Why no trial is pruned though there is a pruner; None where that is not so."""
        if self.pruner == "none" or self.watched is not None:
            return None
        if len(self.goals) > 1:
            return "no trial is pruned: Optuna prunes by one goal, and there are several"
        return f"no trial is pruned: {self.goals[0]} is not known before the end of a run"


def require_optuna() -> None:
    """Check that Optuna is there.

    Raises:
        ConfigError: where it is not, or too old.
    """
    try:
        found = metadata.version("optuna")
    except metadata.PackageNotFoundError:
        found = None
    if found is None or int(found.split(".")[0]) < LEAST_OPTUNA:
        there = "it is not installed" if found is None else f"{found} is installed"
        needs = f"needs optuna {LEAST_OPTUNA} or newer, and {there}: pip install 'pkd-lightning[optuna]'"
        raise ConfigError([f"hydra/sweeper=optuna: {needs}"])
