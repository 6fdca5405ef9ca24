"""Experiment trackers. One tracker run per stage (teacher, round-00, ..., summary), all of a run in one group."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from pkd_lightning.errors import ConfigError

logger = logging.getLogger(__name__)
logging.getLogger("wandb").setLevel(logging.ERROR)


class Tracker(Protocol):
    """Where the curves of a run go."""

    def stage(self, name: str, attempt: int = 0) -> AbstractContextManager[Sequence[Logger]]:
        """Open the loggers of one fit, and close them whatever happens in it."""

    def summarise(self, results: Mapping[str, Any]) -> None:
        """Log the final results, round by round."""


SUMMARY = ("accuracy", "prefix_accuracy", "prefix_agreement", "prefix_nll", "prefix_ece", "params", "flops_published",
           "macs_total")  # fmt: skip


def summary_of(row: Mapping[str, Any]) -> dict[str, float]:
    """What a tracker shows of a round of results.json, each class's edge included; no cost that is missing."""
    edges = {f"edge/class_{j}": edge for j, edge in enumerate(row["edges"]["per_class"])}
    return {
        **{name: row[name] for name in SUMMARY if row[name] is not None},
        "rung": row["class_index"] + 1,
        "attempts": row["attempts"],
        "edges_satisfied": row["edges"]["satisfied"],
        **edges,
    }


@contextmanager
def rank_zero() -> Iterator[None]:
    """Lightning's loggers write in the block, whatever rank a launcher's variables give this process.

    A run is one process. Several of them, of different seeds, may be the tasks of one allocation.
    """
    before = rank_zero_only.rank  # type: ignore[attr-defined]
    rank_zero_only.rank = 0  # type: ignore[attr-defined]
    try:
        yield
    finally:
        rank_zero_only.rank = before  # type: ignore[attr-defined]


class NoTracker:
    """Tracks nothing; metrics.jsonl and results.json are written all the same."""

    def __init__(self, directory: Path, group: str, config: Mapping[str, Any]) -> None:
        del directory, group, config

    @contextmanager
    def stage(self, name: str, attempt: int = 0) -> Iterator[Sequence[Logger]]:
        """No loggers."""
        yield ()

    def summarise(self, results: Mapping[str, Any]) -> None:
        """Nothing."""


# settings of a W&B session that name one run, as an agent's variables WANDB_RUN_ID and WANDB_SWEEP_ID do
ONE_RUN = ("run_id", "resume", "resume_from", "fork_from", "sweep_id", "sweep_param_path")


@contextmanager
def any_run(settings: Any) -> Iterator[list[str]]:
    """Within the block a session's settings name no run; yields those that were set.

    `wandb.init` cannot do it: what is None there does not count, and in a sweep it takes no id.
    """
    before = {name: getattr(settings, name) for name in ONE_RUN}
    for name in ONE_RUN:
        setattr(settings, name, None)
    try:
        yield [name for name, value in before.items() if value is not None]
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


class WandbTracker:
    """Weights & Biases: a run per stage, grouped by the run directory's name, whatever W&B's own variables say.

    Args:
        directory: the run directory; offline files go below its `wandb/`.
        group: common group of the stages.
        config: the resolved configuration.
        project: W&B project.
        mode: `offline` (upload later with `wandb sync`) or `online`.
    """

    def __init__(
        self,
        directory: Path,
        group: str,
        config: Mapping[str, Any],
        project: str = "pkd-lightning",
        mode: str = "offline",
    ) -> None:
        if mode not in ("offline", "online"):
            raise ConfigError([f"logger.mode={mode!r}: must be one of offline, online"])
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise ConfigError([f"logger=wandb: {error}; pip install wandb, or logger=none"]) from error
        self.options: dict[str, Any] = {
            "project": project, "group": group, "mode": mode, "dir": str(directory), "config": dict(config)
        }  # fmt: skip
        self.said = False
        directory.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def stage(self, name: str, attempt: int = 0) -> Iterator[Sequence[Logger]]:
        """A W&B run named after the stage, finished even where the fit fails, so that no other stage writes into it."""
        from lightning.pytorch.loggers import WandbLogger

        with self._run(name, attempt) as run:
            yield (WandbLogger(experiment=run),)

    def summarise(self, results: Mapping[str, Any]) -> None:
        """One W&B run `summary`: a step a round, and the ensemble's and the teacher's figures."""
        with self._run("summary") as run:
            run.define_metric("students")
            names = {name for row in results["rounds"] for name in summary_of(row)}
            for name in sorted(names):  # exact names: overlapping globs resolve at random
                run.define_metric(name, step_metric="students")
            for row in results["rounds"]:
                run.log({"students": row["round"] + 1, **summary_of(row)})
            for part in ("teacher", "ensemble"):
                for name, value in results[part].items():
                    if isinstance(value, (int, float)):
                        run.summary[f"{part}/{name}"] = value

    @contextmanager
    def _run(self, name: str, attempt: int = 0) -> Iterator[Any]:
        import wandb

        label = name if attempt == 0 else f"{name}-attempt-{attempt}"
        with any_run(wandb.setup().settings) as unused:
            run = wandb.init(
                **self.options, name=label, job_type=name.split("-")[0], reinit="finish_previous",
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, sagemaker_disable=True),
            )  # fmt: skip
        if unused and not self.said:
            names = ", ".join(f"WANDB_{setting.upper()}" for setting in unused)
            logger.info("%s: not used, because each stage is a W&B run of its own, in the group %s", names, run.group)
            self.said = True
        code = 1
        try:
            yield run
            code = 0
        finally:
            run.finish(exit_code=code)


class TensorBoardTracker:
    """TensorBoard event files below the run directory's `tensorboard/`, one folder a stage."""

    def __init__(self, directory: Path, group: str, config: Mapping[str, Any]) -> None:
        del group, config
        try:
            import tensorboard  # noqa: F401
        except ImportError as error:
            raise ConfigError(["tensorboard is not installed: pip install 'pkd-lightning[tensorboard]'"]) from error
        self.directory = directory / "tensorboard"

    @contextmanager
    def stage(self, name: str, attempt: int = 0) -> Iterator[Sequence[Logger]]:
        """An event file in the stage's folder."""
        from lightning.pytorch.loggers import TensorBoardLogger

        logger = TensorBoardLogger(str(self.directory), name=name, version=f"attempt-{attempt}")
        with rank_zero():
            try:
                yield (logger,)
            finally:
                logger.experiment.close()

    def summarise(self, results: Mapping[str, Any]) -> None:
        """The rounds' figures, a step a student."""
        with self.stage("summary") as loggers:
            for row in results["rounds"]:
                loggers[0].log_metrics(summary_of(row), step=row["round"] + 1)
