"""A run that is a trial of a search reports its rounds to the study, which may end it. It runs in any process."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from pkd_lightning.errors import Pruned
from pkd_lightning.process import in_multirun
from pkd_lightning.results import Observer


def this_trial() -> Observer | None:
    """What observes the run of this process, where it is a trial that may be pruned; else None."""
    if not in_multirun():
        return None
    hydra = HydraConfig.get()
    number = hydra.sweeper.get("trial")  # the sweeper sets it for each job
    if number is None:
        return None
    from pkd_lightning.sweeps.options import Options
    from pkd_lightning.sweeps.study import trial_of  # Optuna, an extra

    options = Options.of(hydra.sweeper)
    goal, trial, reported = options.watched, trial_of(Path(hydra.sweep.dir), options, number), set[int]()
    assert goal is not None

    def observe(results: Mapping[str, Any]) -> None:
        rounds = results["rounds"]
        for record in rounds:
            if record["round"] not in reported:
                trial.report(goal.of_round(record), record["round"])
                reported.add(record["round"])
        if rounds and results["stop_reason"] is None and trial.should_prune():
            raise Pruned(f"pruned after {len(rounds)} of {results['planned_rounds']} rounds")

    return observe
