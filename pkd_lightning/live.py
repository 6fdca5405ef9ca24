"""The page of a run while it goes on: report.html, rewritten after its stages and epochs."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger

from pkd_lightning.errors import RunError
from pkd_lightning.loggers import Tracker

SHARE = 50  # the page is drawn again when the run took so many times what drawing it took: 2%

logger = logging.getLogger(__name__)


class LivePage:
    """A tracker that passes everything on, and has the page written as the run goes on.

    The first page, without figures, takes milliseconds. After that it is drawn whole, where that is 2% of the time.

    Args:
        tracker: where the curves go.
        write: writes the page, with figures or without.
        clock: gives seconds.
    """

    def __init__(
        self, tracker: Tracker, write: Callable[[bool], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.tracker, self.write, self.clock = tracker, write, clock
        self.last: float | None = None  # when it was written
        self.cost = 1.0  # seconds, until it is measured

    @contextmanager
    def stage(self, name: str, attempt: int = 0) -> Iterator[Sequence[Logger | L.Callback]]:
        """The loggers of one fit, and a callback that looks after the page."""
        with self.tracker.stage(name, attempt) as loggers:
            yield (*loggers, Looks(self))
        self.look()

    def progress(self, results: Mapping[str, Any]) -> None:
        """Log the rounds so far."""
        self.tracker.progress(results)
        self.look()

    def summarise(self, results: Mapping[str, Any]) -> None:
        """Log the final results."""
        self.tracker.summarise(results)

    def close(self, failed: bool) -> None:
        """End the tracking."""
        self.tracker.close(failed)

    def look(self) -> None:
        """Write the page, where it is time. Trouble with it is one line, and ends no run."""
        now, figures = self.clock(), self.last is not None
        if self.last is not None and now - self.last < SHARE * self.cost:
            return
        try:
            self.write(figures)
        except RunError as error:
            logger.warning("no report while the run goes on: %s", error)
        self.last = self.clock()
        if figures:
            self.cost = self.last - now


class Looks(L.Callback):
    """Looks after the page at the start of a fit and at the end of each of its epochs."""

    def __init__(self, page: LivePage) -> None:
        self.page = page

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look, for the first page to be there."""
        self.page.look()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look, now that the epoch's line is written."""
        self.page.look()
