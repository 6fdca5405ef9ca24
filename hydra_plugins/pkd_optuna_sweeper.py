"""`hydra/sweeper=optuna`. Hydra takes sweepers from packages `hydra_plugins` only; all else is in the package."""

import sys
from collections.abc import Mapping, Sequence

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OptunaSweeper(Sweeper):
    """Draws trials by Optuna. Its options, see conf/hydra/sweeper/optuna.yaml, are read where they are checked."""

    def __init__(
        self,
        n_trials: int,
        n_jobs: int,
        goals: Sequence[str],
        sampler: str | Mapping[str, object],
        pruner: str | Mapping[str, object] | None,
        seed: int | None,
        params: Mapping[str, object] | None,
    ) -> None:
        del n_trials, n_jobs, goals, sampler, pruner, seed, params

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Make the launcher."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run trials until there are as many as there should be; an error is one message."""
        from pkd_lightning.errors import PKDError
        from pkd_lightning.sweeps.options import require_optuna

        assert self.config is not None
        assert self.launcher is not None
        try:
            require_optuna()
            from pkd_lightning.sweeps.search import search

            search(self.config, self.launcher, arguments, self.validate_batch_is_legal)
        except PKDError as error:
            sys.exit(f"error: {error}")
