"""What terms of knowledge did in the fits of one run: their shares of the gradient, and their losses."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from statistics import mean
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pkd_lightning.reporting import style
from pkd_lightning.reporting.load import Row
from pkd_lightning.reporting.values import number, percent, share
from pkd_lightning.results import OBJECTIVE, SHARE, VALUE

NOTHING, EVERYTHING = 0.01, 0.9  # mean shares of the gradient's norm below and above which a term is remarked on
NAME = 28  # characters of a term's name in a legend
CAPTION = (
    "Above, the share of each term in the sum of the norms of all gradients, of the first batch of each epoch; the "
    "objective's is dashed. Below, its weighted loss, a mean over the epoch. Shares compare between students, losses "
    "within a panel only. Earlier attempts of a round are drawn faint."
)


class Look(NamedTuple):
    """How a term's lines are drawn."""

    color: str
    dash: str


OBJECTIVES_LOOK = Look(style.GREY, "--")


def taught(stages: Mapping[str, Sequence[Row]]) -> dict[int, list[Row]]:
    """By student, counted from 1, its metric rows that hold anything of a term."""
    found = {}
    for stage, rows in stages.items():
        place = re.fullmatch(r"round-(\d+)", stage)
        kept = [row for row in rows if terms_of([row])]
        if place and kept:
            found[int(place[1]) + 1] = kept
    return found


def terms_of(rows: Iterable[Row]) -> list[str]:
    """Names of the terms in metric rows."""
    names = (key.removeprefix(head) for row in rows for key in row for head in (VALUE, SHARE) if key.startswith(head))
    return [name for name in dict.fromkeys(names) if name != OBJECTIVE]


def knowledge_caption(students: Mapping[int, Sequence[Row]]) -> str:
    """What is drawn, and which terms do next to nothing, or nearly everything."""
    return " ".join([CAPTION, *_remarks(students)])


def _remarks(students: Mapping[int, Sequence[Row]]) -> list[str]:
    """A sentence on each term with such a mean share in some student's last attempt."""
    said = []
    for name in terms_of(row for rows in students.values() for row in rows):
        means = {student: _mean_share(_last(rows), name) for student, rows in students.items()}
        idle = {student: value for student, value in means.items() if value < NOTHING}
        alone = {student: value for student, value in means.items() if value > EVERYTHING}
        if idle:
            most = share(max(idle.values()))
            bound = most if len(idle) == 1 or most.startswith("<") else f"at most {most}"
            said.append(f"{name} does next to nothing in {_students(list(idle))}: its mean share is {bound}.")
        if alone:
            bound = f"{'at least ' if len(alone) > 1 else ''}{percent(min(alone.values()))}"
            said.append(f"{name} does nearly everything in {_students(list(alone))}: its mean share is {bound}.")
    return said


def _last(rows: Sequence[Row]) -> list[Row]:
    attempt = max(_attempt(row) for row in rows)
    return [row for row in rows if _attempt(row) == attempt]


def _attempt(row: Row) -> int:
    return int(row.get("attempt") or 0)


def _mean_share(rows: Sequence[Row], name: str) -> float:
    known = [value for row in rows if not math.isnan(value := number(row, f"{SHARE}{name}"))]
    return mean(known) if known else math.nan


def _students(numbers: Sequence[int]) -> str:
    """Students in words: student 2; students 1 to 3, 5 and 6."""
    runs = [[number for _, number in group] for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    words = [word for run in runs for word in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run))]
    listed = " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
    return f"student{'s' if len(numbers) > 1 else ''} {listed}"


def knowledge_panels(students: Mapping[int, Sequence[Row]], names: Sequence[str], width: float, columns: int) -> Figure:
    """Small multiples, `columns` wide: of each student the terms' shares, and below them their losses.

    Args:
        students: from `taught`.
        names: of the terms of all students, which decide on colours.
        width: of a column, in inches.
        columns: at most.
    """
    columns = min(columns, len(students))
    lines = math.ceil(len(students) / columns)
    looks = {name: _look(index) for index, name in enumerate(names)}
    handles = [
        Line2D([], [], label=name if len(name) <= NAME else f"{name[: NAME - 1]}…", color=look.color, ls=look.dash)
        for name, look in looks.items()
    ]
    handles.append(Line2D([], [], label="the objective", color=OBJECTIVES_LOOK.color, ls=OBJECTIVES_LOOK.dash))
    longest = max(len(str(handle.get_label())) for handle in handles)
    entries = max(1, int(width * columns / (0.5 + 0.065 * longest)))  # inches of a legend's entry
    figure = style.new_figure(3.7 * lines + 0.17 * math.ceil(len(handles) / entries), width * columns)
    panels = figure.subplots(2 * lines, columns, squeeze=False)
    for place in range(lines * columns):
        line, column = divmod(place, columns)
        above, below = panels[2 * line, column], panels[2 * line + 1, column]
        if place >= len(students):
            above.set_visible(False)
            below.set_visible(False)
            continue
        student = list(students)[place]
        _shares(above, students[student], looks)
        _losses(below, students[student], looks)
        tries = len({_attempt(row) for row in students[student]})
        above.set_title(
            f"student {student}{f', {tries} attempts' if tries > 1 else ''}",
            loc="left", fontweight="bold", fontsize=8.5,
        )  # fmt: skip
    figure.legend(handles=handles, loc="outside lower left", ncols=entries, fontsize=7, handlelength=2.2)
    return figure


def _look(index: int) -> Look:
    colors = style.CYCLE[:-1]  # ink is near to the objective's grey
    return Look(colors[index % len(colors)], ("-", "-.", ":")[index // len(colors) % 3])


def _shares(axes: Axes, rows: Sequence[Row], looks: Mapping[str, Look]) -> None:
    for name, look in {OBJECTIVE: OBJECTIVES_LOOK, **looks}.items():
        _curves(axes, rows, f"{SHARE}{name}", look, 100.0)
    axes.use_sticky_edges = False
    axes.set_ylim(-4, 104)
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.set_ylabel("share of gradient (%)", fontsize=8)
    axes.set_xlabel("")  # it is that of the losses


def _losses(axes: Axes, rows: Sequence[Row], looks: Mapping[str, Look]) -> None:
    drawn: list[float] = []
    for name, look in looks.items():
        drawn += _curves(axes, rows, f"{VALUE}{name}", look)
    if drawn:
        style.loss_axis(axes, drawn, "weighted loss")
    axes.yaxis.label.set_fontsize(8)


def _curves(axes: Axes, rows: Sequence[Row], key: str, look: Look, scale: float = 1.0) -> list[float]:
    """A line for each attempt, the last one full; the values drawn."""
    last, drawn = max(_attempt(row) for row in rows), []
    for attempt in sorted({_attempt(row) for row in rows}):
        chosen = [row for row in rows if _attempt(row) == attempt]
        values = [scale * number(row, key) for row in chosen]
        known = [value for value in values if not math.isnan(value)]
        drawn += known
        epochs = [int(row["epoch"]) + 1 for row in chosen]
        alpha = 1.0 if attempt == last else 0.35
        axes.plot(
            epochs, values, marker=".", markevery=_alone(values), lw=1.4, alpha=alpha, color=look.color, ls=look.dash
        )
    style.epoch_axis(axes)
    return drawn


def _alone(values: Sequence[float]) -> list[int]:
    """Places of values between two gaps, which a line does not show."""
    known = [False, *(not math.isnan(value) for value in values), False]
    return [place for place in range(len(values)) if known[place + 1] and not known[place] and not known[place + 2]]
