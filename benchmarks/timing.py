"""Timings, the rows that report them, and their targets.

Everything compared in a row is timed in turn, round by round, in one process, so that other load on the machine meets
all of it. Reported are the median over the rounds and, as the spread, the interquartile range in percent of it.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Row = dict[str, Any]
Times = Mapping[str, Sequence[float]]

SAMPLE = 0.005  # seconds one timing takes at least: shorter calls are repeated
SHORT = 0.05  # seconds below which what ran before, in the caches and the allocator, would show: warmed up again
LONG = 1.0  # seconds above which one call is warm-up enough
FEWEST = 2  # rounds of a call, however slow


@dataclass(frozen=True)
class Target:
    """A limit that a figure has to keep; `least` says on which side."""

    limit: float
    least: bool

    def met(self, figure: float) -> bool:
        """Whether `figure` keeps it."""
        return figure >= self.limit if self.least else figure <= self.limit

    def __str__(self) -> str:
        return f"at {'least' if self.least else 'most'} {shown(self.limit)}"


def at_least(limit: float) -> Target:
    return Target(limit, least=True)


def at_most(limit: float) -> Target:
    return Target(limit, least=False)


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    seconds: float = math.inf,
    threads: Mapping[str, int] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, after a warm-up and, where it is short, another in each round.

    Args:
        calls: what to time, in this order in every round.
        rounds: how often.
        seconds: a call that takes longer in all rounds together is timed in fewer of them, spread evenly.
        threads: torch threads of single calls; the others get those that are set.
    """
    default, threads = torch.get_num_threads(), threads or {}
    repeats, counts, again = {}, {}, {}
    for name, call in calls.items():
        torch.set_num_threads(threads.get(name, default))
        took = _seconds(call, 1)  # with what happens once: compilation, buffers, threads
        if took < LONG:
            took = _seconds(call, 1)
        repeats[name] = max(1, math.ceil(SAMPLE / took))
        again[name] = repeats[name] if took < SHORT else 0
        affordable = int(min(rounds, seconds / (took * (repeats[name] + again[name])))) if took > 0 else rounds
        counts[name] = min(rounds, max(FEWEST, affordable))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds):
        for name, call in calls.items():
            if (round_ + 1) * counts[name] // rounds > round_ * counts[name] // rounds:
                torch.set_num_threads(threads.get(name, default))
                for _ in range(again[name]):
                    call()
                times[name].append(1000 * _seconds(call, repeats[name]))
    torch.set_num_threads(default)
    return times


def _seconds(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def summary(times: Sequence[float]) -> dict[str, Any]:
    first, median, third = statistics.quantiles(times, n=4, method="inclusive")
    return {"median_ms": median, "spread_percent": 100 * (third - first) / median, "rounds": len(times)}


def compared(what: str, times: Times, name: str, against: str, target: Target | None = None, cost: bool = False) -> Row:
    """A row of the call `name`: how many times as fast it is as `against`, or with `cost` how many times its time."""
    ours, theirs = summary(times[name]), summary(times[against])
    ratio = theirs["median_ms"] / ours["median_ms"]
    row = {"what": what, **ours, "against": against}
    row |= {f"against_{key}": value for key, value in theirs.items()}
    return judged(row, 1 / ratio if cost else ratio, "x its time" if cost else "x as fast", target)


def measured(what: str, times: Sequence[float], figure: float, unit: str, target: Target | None = None) -> Row:
    """A row of a figure that follows from the times of one call."""
    return judged({"what": what, **summary(times)}, figure, unit, target)


def judged(row: Row, figure: float, unit: str, target: Target | None = None) -> Row:
    """`row` with its figure, and the target if there is one."""
    row = {**row, "figure": figure, "unit": unit}
    return row if target is None else {**row, "target": str(target), "met": target.met(figure)}


def missed(rows: Sequence[Row]) -> list[Row]:
    """The rows whose target falls short."""
    return [row for row in rows if row.get("met") is False]


def shown(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
