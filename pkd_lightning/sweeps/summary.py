"""What the jobs of a sweep found: a row a job, a setting for jobs that differ by their seed only, the best of them.

Settings are compared by validation accuracy alone. That of the test part is of what was chosen, and chooses nothing.
"""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from pkd_lightning.errors import RunError
from pkd_lightning.reporting.load import Row as Results
from pkd_lightning.reporting.load import results_so_far
from pkd_lightning.reporting.values import (
    duration,
    number,
    percent,
    prefix_cost,
    test_of,
    validation_of,
)
from pkd_lightning.results import PROGRESS
from pkd_lightning.sweeps.records import Job, Sweep, words

SEED = "seed"
DIGITS = 6  # of an accuracy: means of float32 that stand for the same fraction differ in the eighth


@dataclass(frozen=True)
class JobRow:
    """A job with what its run directory holds.

    Attributes:
        job: as it stands.
        values: what was swept, by key.
        run: the run directory.
        results: of results.json, of an unfinished run of progress.json; None where there is neither.
    """

    job: Job
    values: dict[str, str]
    run: Path | None
    results: Results | None

    @property
    def finished(self) -> bool:
        """Whether its accuracies count."""
        return self.job.state == "finished" and self.results is not None

    @property
    def validation(self) -> float:
        """Validation accuracy of the ensemble so far, NaN where there is none."""
        return math.nan if self.results is None else validation_of(self.results)

    @property
    def test(self) -> float:
        """Test accuracy of the finished ensemble."""
        return math.nan if self.results is None or not self.finished else test_of(self.results)

    @property
    def macs(self) -> float:
        """Total multiply-accumulates of the finished ensemble."""
        return number(self.results or {}, "ensemble", "macs_total") if self.finished else math.nan

    @property
    def seconds(self) -> float:
        """Wall time of the run, or since it was started."""
        if self.finished:
            return number(self.results or {}, "wall_seconds", "total")
        if self.job.started is None:
            return math.nan
        end = time.time() if self.job.state == "running" else self.job.ended
        return math.nan if end is None else end - self.job.started

    @property
    def state(self) -> str:
        """The job's state, with the number of rounds done where that says more."""
        if self.results is None or self.finished:
            return self.job.state
        return f"{self.job.state}, {len(self.results['rounds'])} of {self.results.get('planned_rounds', '?')} rounds"


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of some values; NaN of none."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of values none of which is NaN."""
        known = [value for value in values if not math.isnan(value)]
        return cls(mean(known) if known else math.nan, stdev(known) if len(known) > 1 else math.nan)

    def percent(self, digits: int = 2) -> str:
        """`97.12% ± 0.30`."""
        spread = "" if math.isnan(self.deviation) else f" ± {100 * self.deviation:.{digits}f}"
        return percent(self.mean, digits) + spread


@dataclass(frozen=True)
class Setting:
    """Jobs that differ by their seed only.

    Attributes:
        values: what was swept, by key, without the seed.
        rows: the jobs.
    """

    values: dict[str, str]
    rows: list[JobRow]

    @property
    def finished(self) -> list[JobRow]:
        """Its finished jobs."""
        return [row for row in self.rows if row.finished]

    @property
    def validation(self) -> Spread:
        """Over seeds."""
        return Spread.of([row.validation for row in self.finished])

    @property
    def test(self) -> Spread:
        """Over seeds."""
        return Spread.of([row.test for row in self.finished])

    @property
    def macs(self) -> float:
        """Mean over seeds."""
        return Spread.of([row.macs for row in self.finished]).mean

    @property
    def seconds(self) -> float:
        """Mean over seeds."""
        return Spread.of([row.seconds for row in self.finished]).mean

    @property
    def label(self) -> str:
        """`boosting=paper lr=0.1`."""
        return words(self.values) or "all jobs"


@dataclass(frozen=True)
class Point:
    """An ensemble of a setting, or its first students, mean over the setting's finished seeds.

    Attributes:
        setting: whose.
        students: how many, `2 to 3` where seeds ended with different numbers.
        whole: whether these are all.
        macs: total multiply-accumulates.
        validation: accuracy.
        test: accuracy.
    """

    setting: Setting
    students: str
    whole: bool
    macs: float
    validation: float
    test: float


@dataclass(frozen=True)
class Summary:
    """All of a sweep.

    Attributes:
        sweep: its directory.
        keys: what was swept.
        rows: the jobs.
        settings: the jobs by what was swept besides the seed; the best by validation first, unfinished ones last.
        notes: what a reader must know.
    """

    sweep: Sweep
    keys: list[str]
    rows: list[JobRow]
    settings: list[Setting]
    notes: list[str]

    @property
    def comparable(self) -> bool:
        """Whether the finished jobs are measured on the same data."""
        return len({(row.results["dataset"], row.results["split"]) for row in self.rows if row.results}) < 2

    @property
    def best(self) -> Setting | None:
        """The setting of highest validation accuracy, the cheaper of equal ones."""
        found = [setting for setting in self.settings if not math.isnan(setting.validation.mean)]
        return found[0] if found and self.comparable else None

    @property
    def points(self) -> list[Point]:
        """Every prefix of every setting."""
        return [point for setting in self.settings for point in _points(setting)] if self.comparable else []

    @property
    def front(self) -> list[Point]:
        """The prefixes that no other one beats in validation accuracy with as few MACs, from the cheapest."""
        found: list[Point] = []
        for point in sorted(self.points, key=lambda point: (point.macs, -round(point.validation, DIGITS))):
            if not found or round(point.validation, DIGITS) > round(found[-1].validation, DIGITS):
                found.append(point)
        return found

    def in_state(self, *states: str) -> list[JobRow]:
        """The jobs in any of some states."""
        return [row for row in self.rows if row.job.state in states]

    @property
    def counts(self) -> str:
        """`7 finished, 1 failed, 1 running of 9 jobs`, those that were pruned as such."""
        states = ("finished", "pruned", "failed", "running", "stopped", "removed", "waiting")
        parts = [f"{len(self.in_state(state))} {state}" for state in states if self.in_state(state)]
        return f"{', '.join(parts) or 'none started'} of {self.sweep.total or len(self.rows)} jobs"


def summarise(sweep: Sweep) -> Summary:
    """Read the jobs of a sweep and their run directories; it may still be running."""
    jobs, notes = sweep.jobs()
    rows = [_row(sweep, job, notes) for job in jobs]
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    members: dict[tuple[tuple[str, str], ...], list[JobRow]] = {}
    for row in rows:
        values = tuple((key, value) for key, value in row.values.items() if key != SEED)
        members.setdefault(values, []).append(row)
    settings = [Setting(dict(values), members[values]) for values in members]
    settings.sort(key=_rank)
    summary = Summary(sweep, keys, rows, settings, notes)
    if not summary.comparable:
        notes.append(
            "the jobs use different data sets or splits, and their accuracies do not compare: none is called the best"
        )
    counts = {len(setting.finished) for setting in settings if setting.finished}
    if len(counts) > 1:
        notes.append("the settings have different numbers of finished seeds: their means are not equally certain")
    return summary


def _rank(setting: Setting) -> tuple[float, float]:
    """Best by validation first, of equal ones the one of fewer MACs; those without a figure last."""

    def known(value: float) -> float:
        return math.inf if math.isnan(value) else value

    return known(round(-setting.validation.mean, DIGITS)), known(setting.macs)


def _row(sweep: Sweep, job: Job, notes: list[str]) -> JobRow:
    run, results = sweep.run_of(job), None
    if run is not None and any((run / name).is_file() for name in ("results.json", PROGRESS)):
        try:
            results = results_so_far(run)
        except RunError as error:
            notes.append(str(error))
    return JobRow(job, sweep.swept(job), run, results)


def _points(setting: Setting) -> Iterable[Point]:
    runs = [row.results for row in setting.finished if row.results is not None]
    lengths = sorted({len(run["rounds"]) for run in runs}) or [0]
    for t in range(lengths[0] - (len(lengths) == 1)):
        macs = mean(prefix_cost(run, "macs_total")[t] for run in runs)
        validation, test = (
            mean(number(run["rounds"][t], key) for run in runs)
            for key in ("prefix_validation_accuracy", "prefix_accuracy")
        )
        if macs > 0 and not math.isnan(validation):
            yield Point(setting, str(t + 1), False, macs, validation, test)
    if setting.macs > 0 and not math.isnan(setting.validation.mean):
        students = " to ".join(map(str, dict.fromkeys((lengths[0], lengths[-1]))))
        yield Point(setting, students, True, setting.macs, setting.validation.mean, setting.test.mean)


def accuracy_words(results: Results) -> str:
    """`validation 96.8%, test 95.1%, 28.0 s`."""
    seconds = duration(number(results, "wall_seconds", "total"))
    return f"validation {percent(validation_of(results))}, test {percent(test_of(results))}, {seconds}"
