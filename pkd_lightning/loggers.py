"""Experiment trackers: what one is, none, and TensorBoard's, which has a folder a stage (teacher, ..., summary)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import lightning as L
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only

from pkd_lightning import ranks
from pkd_lightning.errors import ConfigError


class About(Protocol):
    """What a run is called beside others."""

    @property
    def name(self) -> str:
        """The experiment, and what was set beside its defaults."""

    @property
    def group(self) -> str:
        """The sweep it is of, else the experiment."""

    @property
    def tags(self) -> tuple[str, ...]:
        """Experiment, data set, objective, combination, and the ladder where its name is known."""

    @property
    def swept(self) -> bool:
        """Whether its process was started for several runs."""


class Tracker(Protocol):
    """Where the curves of a run go."""

    def stage(self, name: str, attempt: int = 0) -> AbstractContextManager[Sequence[Logger | L.Callback]]:
        """Open the loggers of one fit, and callbacks that look on; close them whatever happens in it."""

    def progress(self, results: Mapping[str, Any]) -> None:
        """Log the rounds so far, of an unfinished run's results, whose accuracies are of the validation part."""

    def summarise(self, results: Mapping[str, Any]) -> None:
        """Log the final results, round by round."""

    def close(self, failed: bool) -> None:
        """End the tracking of a run, which is complete or not."""


SUMMARY = ("accuracy", "prefix_accuracy", "prefix_agreement", "prefix_nll", "prefix_ece", "params", "flops_published",
           "macs_total")  # fmt: skip


def summary_of(row: Mapping[str, Any]) -> dict[str, float]:
    """What a tracker shows of a round of results.json, each class's edge included; no cost that is missing."""
    edges: dict[str, float] = {}
    if row["edges"] is not None:  # there are none without a teacher
        edges = {f"edge/class_{j}": edge for j, edge in enumerate(row["edges"]["per_class"])}
        edges["edges_satisfied"] = row["edges"]["satisfied"]
    return {
        **{name: row[name] for name in SUMMARY if row.get(name) is not None},
        "rung": row["class_index"] + 1,
        "attempts": row["attempts"],
        **edges,
    }


@contextmanager
def rank_zero() -> Iterator[None]:
    """In the block, Lightning's loggers write by the rank within the run, whatever a launcher's variables say.

    Several runs of one process, of different seeds, may be the tasks of one allocation.
    """
    before = rank_zero_only.rank  # type: ignore[attr-defined]
    rank_zero_only.rank = ranks.rank()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        rank_zero_only.rank = before  # type: ignore[attr-defined]


class NoTracker:
    """Tracks nothing; metrics.jsonl and results.json are written all the same."""

    def __init__(self, directory: Path, about: About, config: Mapping[str, Any]) -> None:
        del directory, about, config

    @contextmanager
    def stage(self, name: str, attempt: int = 0) -> Iterator[Sequence[Logger]]:
        """No loggers."""
        yield ()

    def progress(self, results: Mapping[str, Any]) -> None:
        """Nothing."""

    def summarise(self, results: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self, failed: bool) -> None:
        """Nothing."""


class SilentTracker(NoTracker):
    """Of a rank that is not the first: its fits have a logger, which callbacks may need, and it keeps nothing."""

    @contextmanager
    def stage(self, name: str, attempt: int = 0) -> Iterator[Sequence[Logger]]:
        """A logger that keeps nothing."""
        yield (DummyLogger(),)


class TensorBoardTracker:
    """TensorBoard event files below the run directory's `tensorboard/`, one folder a stage."""

    def __init__(self, directory: Path, about: About, config: Mapping[str, Any]) -> None:
        del about, config
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

    def progress(self, results: Mapping[str, Any]) -> None:
        """Nothing: the summary has each round."""

    def summarise(self, results: Mapping[str, Any]) -> None:
        """The rounds' figures, a step a student."""
        with self.stage("summary") as loggers:
            for row in results["rounds"]:
                loggers[0].log_metrics(summary_of(row), step=row["round"] + 1)

    def close(self, failed: bool) -> None:
        """Nothing: each stage has closed its own."""
