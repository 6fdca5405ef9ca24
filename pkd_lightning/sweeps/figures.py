"""The figures of a sweep: accuracy against compute with its Pareto front, and against each thing that was swept."""

import math
from statistics import mean
from textwrap import fill

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pkd_lightning.reporting import style
from pkd_lightning.reporting.grouping import short_keys
from pkd_lightning.reporting.values import engineering
from pkd_lightning.sweeps.records import brief
from pkd_lightning.sweeps.summary import SEED, JobRow, Summary

MOST_LABELS = 12  # of words along an axis
LONG = 16  # characters of a word along an axis


def front_figure(summary: Summary) -> Figure:
    """Validation accuracy against total MACs: whole ensembles, their first students, and the front of all.

    Settings have colours as long as there are enough.
    """
    settings = [setting for setting in summary.settings if any(point.setting is setting for point in summary.points)]
    colored = 1 < len(settings) <= len(style.CYCLE)
    figure = style.new_figure(4.2 + 0.19 * len(settings) * colored)
    axes = figure.add_subplot()
    handles = []
    for index, setting in enumerate(settings):
        color, marker = style.CYCLE[index * colored], style.MARKERS[index * colored]
        for point in (point for point in summary.points if point.setting is setting):
            # hollow, so that equal ones are seen through one another
            look = {"ms": 7.0, "mfc": "none", "mew": 1.8} if point.whole else {"ms": 3.5, "alpha": 0.5, "mew": 0.0}
            axes.plot(point.macs, 100 * point.validation, marker, color=color, **look)
        if colored:
            label = fill(setting.label, 60)
            handles.append(Line2D([], [], ls="none", color=color, marker=marker, mfc="none", mew=1.8, label=label))
    front = summary.front
    xs, ys = [point.macs for point in front], [100 * point.validation for point in front]
    axes.plot(xs, ys, "-", color=style.GREY, lw=1.2, drawstyle="steps-post", zorder=0)
    style.mac_axis(axes, [point.macs for point in summary.points])
    style.accuracy_axis(axes, "validation accuracy (%)")
    if handles:
        figure.legend(handles=handles, loc="outside lower left", ncols=1)
    style.label_points(axes, xs, ys, [str(place) for place in range(1, len(front) + 1)], style.INK)
    return figure


def swept_figures(summary: Summary) -> list[tuple[str, Figure]]:
    """Validation accuracy against each key that was swept, numbers as numbers, one small figure each."""
    rows = [row for row in summary.rows if row.finished and not math.isnan(row.validation)]
    keys = [key for key in summary.keys if key != SEED and len({row.values.get(key) for row in rows}) > 1]
    short = short_keys(summary.keys)
    return [(key, _swept(rows, key, short[key])) for key in keys] if summary.comparable else []


def _swept(rows: list[JobRow], key: str, label: str) -> Figure:
    figure = style.new_figure(2.6, 3.2)
    axes = figure.add_subplot()
    values = list(dict.fromkeys(row.values.get(key, "") for row in rows))
    numbers = [_number(value) for value in values]
    places = [float(index) for index in range(len(values))]
    if all(number is not None for number in numbers):
        values = sorted(values, key=float)
        known = [float(value) for value in values]
        if min(known) > 0 and max(known) >= 20 * min(known):
            places = [math.log10(value) for value in known]
        elif len(known) > MOST_LABELS or max(known) - min(known) > 0:
            places = known
    width = (max(places) - min(places)) / max(len(places), 2)
    for place, value in zip(places, values, strict=True):
        accuracies = [100 * row.validation for row in rows if row.values.get(key, "") == value]
        axes.plot([place] * len(accuracies), accuracies, "o", color=style.BLUE, alpha=0.55, ms=4, ls="none")
        center = mean(accuracies)
        axes.plot([place - 0.28 * width, place + 0.28 * width], [center, center], color=style.VERMILLION, lw=2)
    if len(values) <= MOST_LABELS:
        axes.set_xticks(places, [_short(value) for value in values])
        if sum(len(_short(value)) for value in values) > 30:
            axes.tick_params(axis="x", labelrotation=35)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(lambda place, _: engineering(place))
    axes.margins(x=0.12)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel(label)
    style.accuracy_axis(axes, "validation (%)")
    return figure


def _short(value: str) -> str:
    value = brief(value)
    return value if len(value) <= LONG else value[: LONG - 1] + "…"


def _number(value: str) -> float | None:
    try:
        found = float(value)
    except ValueError:
        return None
    return found if math.isfinite(found) else None
