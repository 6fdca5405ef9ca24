"""What a fit shows of its progress: a bar on a terminal, else a line now and then."""

import logging
import sys
import time
from collections.abc import Callable, Iterable

import lightning as L
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)
EVERY = 30.0  # seconds between two lines, at least


class FitBar(Progress):
    """A progress bar that asks the trainer for its step whenever rich's own thread draws it, so a step costs nothing.

    Args:
        trainer: of the fit.
        description: shown in front.
        total: steps of the whole fit.
    """

    def __init__(self, trainer: L.Trainer, description: str, total: int) -> None:
        self.trainer = trainer
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            transient=True,
            disable=not sys.stdout.isatty(),
        )
        self.task = self.add_task(description, total=total, loss="")

    def get_renderables(self) -> Iterable[RenderableType]:
        """What rich draws."""
        for task in self.task_ids:
            self.update(task, completed=self.trainer.global_step)
        yield from super().get_renderables()


class FitProgress(L.Callback):
    """One progress bar for a whole fit of `total` steps."""

    def __init__(self, description: str, total: int) -> None:
        self.description, self.total = description, total
        self.progress: FitBar | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the bar."""
        self.progress = FitBar(trainer, self.description, self.total)
        self.progress.start()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the epoch's validation figures."""
        if self.progress is not None:
            metrics = trainer.callback_metrics
            text = f"validation {metrics['validation_accuracy']:.1%}, loss {metrics['validation_loss']:.3f}"
            self.progress.update(self.progress.task, loss=text)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Remove the bar: Lightning does not call `teardown` after an error."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remove the bar."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


class FitLines(L.Callback):
    """Where there is no terminal: a line at the first epoch, and then at most one in `EVERY` seconds.

    Args:
        description: shown in front.
        clock: gives seconds.
    """

    def __init__(self, description: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.description, self.clock = description, clock
        self.last = -float("inf")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the epoch's line, where it is time."""
        now = self.clock()
        if now - self.last < EVERY:
            return
        self.last, metrics = now, trainer.callback_metrics
        logger.info(
            "  %s: epoch %d of at most %d, validation %.1f%%, loss %.3f",
            self.description, trainer.current_epoch + 1, trainer.max_epochs,
            100 * metrics["validation_accuracy"], metrics["validation_loss"],
        )  # fmt: skip


def progress_of(description: str, steps: int) -> L.Callback:
    """The bar of a fit of so many steps where stdout is a terminal, else lines."""
    return FitProgress(description, steps) if sys.stdout.isatty() else FitLines(description)
