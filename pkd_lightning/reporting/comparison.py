"""The page that compares several runs."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pkd_lightning.reporting import page, style
from pkd_lightning.reporting.grouping import Group, curve, grouped
from pkd_lightning.reporting.load import RunRecord
from pkd_lightning.reporting.values import (
    LATENCY,
    MISSING,
    condition_counts,
    decimal,
    distilled,
    duration,
    ensemble_shares,
    latency,
    number,
    percent,
    prefix_cost,
    share,
    test_of,
    validation_of,
)

ACCURACY_HEAD = (
    "seed",
    "students",
    "teacher accuracy",
    "validation accuracy",
    "ensemble accuracy",
    "points to teacher",
    "agrees with teacher",
    "condition met after the first",
    "stopped",
)
COST_HEAD = (
    "seed",
    "parameters / teacher",
    "total MACs / teacher",
    "published FLOPs / teacher",
    "latency (ms)",
    "teacher's latency (ms)",
    "time",
    "directory",
)
TEXT = ("seed", "stopped", "directory")
SHARE_HEADS = {"parameters / teacher": "params", "total MACs / teacher": "macs_total"}
SHARE_HEADS |= {"published FLOPs / teacher": "flops_published"}
ACCURACY = "ensemble test accuracy (%)"


def comparison_page(runs: Sequence[RunRecord], absent: Sequence[str] = ()) -> str:
    """One section a data set and split: accuracies on different test parts are never drawn together.

    Args:
        runs: finished ones.
        absent: a line on each of the jobs that have no results.
    """
    sections: dict[tuple[str, str], list[RunRecord]] = {}
    for run in runs:
        sections.setdefault((str(run.results["dataset"]), str(run.results["split"])), []).append(run)
    names = [f"{dataset} (split {split})" for dataset, split in sections]
    body = [page.heading("Comparison of runs", f"{len(runs)} runs on {', '.join(names)}")]
    body.append(page.notes(absent, "Jobs without results"))
    if len(sections) > 1:
        warning = (
            f"The runs use {len(sections)} different data sets or splits. Their accuracies are measured on different "
            "test images and do not compare: each has its own section."
        )
        body.append(page.notes([warning], "Not one comparison"))
    with style.styled():
        for index, ((dataset, split), members) in enumerate(sections.items(), start=1):
            body += _section(f"section{index}", f"{dataset}, split {split}", members)
    return page.page("Comparison of runs", body)


def _section(name: str, title: str, runs: list[RunRecord]) -> list[str]:
    groups, remarks = grouped(runs)
    remarks += [f"{run.path}: {note}" for run in runs for note in run.notes]
    sizes = [number(run.results, "sizes", "test") for run in runs]
    if len({size for size in sizes if not math.isnan(size)}) > 1:
        remarks.append("the runs have test parts of different sizes, although data set and split have one name")
    seeds = "A line with a band is the mean over seeds, the band one sample standard deviation. "
    band = seeds if any(len(group.runs) > 1 for group in groups) else ""
    graphics = []
    if any(run.results["rounds"] for run in runs):
        graphics = [
            page.figure(
                "Ensemble accuracy against number of students",
                f"{band}Short dashes at the right edge: the teacher (mean over seeds) of each setting, "
                "dark where several share it.",
                [style.svg(students_figure(groups), f"{name}-students", "Ensemble accuracy against students")],
            ),
            page.figure(
                "Ensemble accuracy against compute",
                f"{band}Total MACs count everything the first t students compute for one image; stars are the "
                "teachers (mean over seeds). "
                "Published FLOPs are in the table.",
                [style.svg(macs_figure(groups), f"{name}-macs", "Ensemble accuracy against total MACs")],
            ),
        ]
    return [
        f"<section>{page.section_heading(title)}",
        page.paragraphs([_chosen(groups)]),
        page.notes(remarks),
        f'<div class="figures">{"".join(graphics)}</div>' if graphics else "",
        *_tables(groups),
        "</section>",
    ]


def _chosen(groups: Sequence[Group]) -> str:
    """The best group by validation, and its test accuracy; nothing where validation was not recorded."""
    known = {index: _mean([validation_of(run.results) for run in group.runs]) for index, group in enumerate(groups)}
    if len(groups) < 2 or any(math.isnan(value) for value in known.values()):
        return ""
    best = max(known, key=lambda index: known[index])
    test = percent(_mean([test_of(run.results) for run in groups[best].runs]), 2)
    return (
        f"Best by validation of {len(groups)}: {groups[best].label}, validation {percent(known[best], 2)}. Its test "
        f"accuracy: {test}. Choose by validation: all other accuracies here are of the test part, which is to choose "
        "nothing."
    )


def students_figure(groups: Sequence[Group]) -> Figure:
    """Prefix accuracy against the number of students, a colour for each group."""
    figure, axes = _canvas(groups)
    teachers = [_teacher(group) for group in groups]
    most = max(len(run.results["rounds"]) for group in groups for run in group.runs)
    for index, group in enumerate(groups):
        _lines(axes, group, index, lambda run: [float(t) for t in range(1, len(run.results["rounds"]) + 1)])
        line = curve(group)
        _band(axes, group, index, [float(t) for t in range(1, len(line.center) + 1)])
        height, color = teachers[index][1], _teacher_color(teachers, index)
        axes.plot([0.965, 1.0], [height] * 2, color=color, lw=2, transform=axes.get_yaxis_transform())
    style.student_axis(axes, most, "number of students t")
    axes.set_xlim(0.5, most + 0.7)
    style.accuracy_axis(axes, ACCURACY)
    return figure


def macs_figure(groups: Sequence[Group]) -> Figure:
    """Prefix accuracy against total MACs, a colour for each group, the teachers as stars."""
    figure, axes = _canvas(groups)
    teachers = [_teacher(group) for group in groups]
    known: list[float] = []
    for index, group in enumerate(groups):
        _lines(axes, group, index, lambda run: prefix_cost(run.results, "macs_total"))
        _band(axes, group, index, curve(group).macs)
        axes.plot(*teachers[index], "*", color=_teacher_color(teachers, index), ms=10, mec="white", mew=0.6, zorder=3)
        known += [cost for run in group.runs for cost in prefix_cost(run.results, "macs_total") if cost > 0]
        known += [cost for cost in teachers[index][:1] if cost > 0]
    if known:
        style.mac_axis(axes, known)
    style.accuracy_axis(axes, ACCURACY)
    return figure


def _teacher(group: Group) -> tuple[float, float]:
    """Total MACs and accuracy (%) of the teachers of a group, means over its seeds."""
    teachers = [run.results["teacher"] for run in group.runs]
    return _mean([number(one, "macs_total") for one in teachers]), 100 * _mean(
        [number(one, "accuracy") for one in teachers]
    )


def _teacher_color(teachers: Sequence[tuple[float, float]], index: int) -> str:
    """The group's colour; dark where another group has the same teachers, which would cover one another."""
    return style.INK if teachers.count(teachers[index]) > 1 else _color(index)


def _canvas(groups: Sequence[Group]) -> tuple[Figure, Axes]:
    """Axes with the legend of the groups below them; the figure grows with the legend."""
    labels = [fill(_legend(group), 66, subsequent_indent="    ") for group in groups]
    lines = sum(label.count("\n") + 1 for label in labels)
    figure = style.new_figure(3.3 + 0.19 * lines)
    axes = figure.add_subplot()
    handles = [
        Line2D([], [], color=_color(index), marker=_marker(index), ls=_dash(index), label=label)
        for index, label in enumerate(labels)
    ]
    figure.legend(handles=handles, labels=labels, loc="outside lower left", ncols=1)
    return figure, axes


def _legend(group: Group) -> str:
    if len(group.runs) == 1:
        return f" {group.label} · seed {group.seeds[0]}"
    return f" {group.label} · mean of {len(group.runs)} seeds"


def _lines(axes: Axes, group: Group, index: int, places: Callable[[RunRecord], list[float]]) -> None:
    """Each run's own line: full for a single run, faint behind the mean of several."""
    single = len(group.runs) == 1
    for run in group.runs:
        ys = [100 * number(entry, "prefix_accuracy") for entry in run.results["rounds"]]
        marker = _marker(index) if single else ""
        width, alpha = (1.8, 1.0) if single else (0.7, 0.35)
        axes.plot(places(run), ys, ls=_dash(index), color=_color(index), marker=marker, lw=width, alpha=alpha)


def _band(axes: Axes, group: Group, index: int, xs: Sequence[float]) -> None:
    if len(group.runs) == 1:
        return
    line = curve(group)
    low = [center - spread for center, spread in zip(line.center, line.spread, strict=True)]
    high = [center + spread for center, spread in zip(line.center, line.spread, strict=True)]
    axes.fill_between(xs, low, high, color=_color(index), alpha=0.18, lw=0)
    axes.plot(xs, line.center, ls=_dash(index), color=_color(index), marker=_marker(index))


def _color(index: int) -> str:
    return style.CYCLE[index % len(style.CYCLE)]


def _marker(index: int) -> str:
    return style.MARKERS[index % len(style.MARKERS)]


def _dash(index: int) -> str:
    return ("-", "--", "-.", ":")[index // len(style.CYCLE) % 4]


def _mean(values: Sequence[float]) -> float:
    return mean(values) if values else math.nan


def _row(run: RunRecord, place: Path) -> dict[str, str]:
    """The cells of one run by heading; its directory relative to `place`."""
    results = run.results
    ensemble, teacher = results.get("ensemble") or {}, results["teacher"]
    shares = ensemble_shares(results)
    gap = 100 * (number(ensemble, "accuracy") - number(teacher, "accuracy"))
    met, later = condition_counts(results)
    return {
        "seed": str(results.get("seed")),
        "students": str(len(results["rounds"])),
        "validation accuracy": percent(validation_of(results), 2),
        "teacher accuracy": percent(number(teacher, "accuracy"), 2),
        "ensemble accuracy": percent(number(ensemble, "accuracy"), 2),
        "points to teacher": MISSING if math.isnan(gap) else f"{gap:+.2f}",
        "agrees with teacher": percent(number(ensemble, "agreement"), 2),
        "condition met after the first": f"{met} of {later}" if distilled(results) else MISSING,
        "latency (ms)": latency(ensemble),
        "teacher's latency (ms)": latency(teacher or {}),
        "time": duration(number(results, "wall_seconds", "total")),
        "stopped": str(results.get("stop_reason") or ""),
        "directory": str(run.path.relative_to(place)),
    } | {heading: share(shares[key]) for heading, key in SHARE_HEADS.items()}


def _mean_row(group: Group) -> dict[str, str]:
    """Mean over the seeds of a group, with the sample standard deviation where it says something on the spread."""

    def spread(values: list[float], sign: str = "", unit: str = "%") -> str:
        if any(math.isnan(value) for value in values):
            return MISSING
        return f"{100 * mean(values):{sign}.2f} ± {100 * stdev(values):.2f}{unit}"

    teachers = [run.results["teacher"] for run in group.runs]
    ensembles = [run.results.get("ensemble") or {} for run in group.runs]
    teacher = [number(part, "accuracy") for part in teachers]
    ensemble = [number(part, "accuracy") for part in ensembles]
    shares = [ensemble_shares(run.results) for run in group.runs]
    return {
        "seed": f"mean ± SD of {len(group.runs)}",
        "students": f"{_mean([float(len(run.results['rounds'])) for run in group.runs]):.3g}",
        "validation accuracy": spread([validation_of(run.results) for run in group.runs]),
        "teacher accuracy": spread(teacher),
        "ensemble accuracy": spread(ensemble),
        "points to teacher": spread([own - other for own, other in zip(ensemble, teacher, strict=True)], "+", ""),
        "agrees with teacher": spread([number(part, "agreement") for part in ensembles]),
        "latency (ms)": decimal(_mean([number(part, "latency_ms") for part in ensembles]), 2),
        "teacher's latency (ms)": decimal(_mean([number(part, "latency_ms") for part in teachers]), 2),
        "time": duration(_mean([number(run.results, "wall_seconds", "total") for run in group.runs])),
    } | {heading: share(_mean([one[key] for one in shares])) for heading, key in SHARE_HEADS.items()}


def _tables(groups: Sequence[Group]) -> list[str]:
    """Accuracies and costs: for each group a heading row, its runs, and where it has several seeds their mean."""
    place = Path(os.path.commonpath([run.path.parent for group in groups for run in group.runs]))
    parts = []
    for title, head in (("Accuracy", ACCURACY_HEAD), ("Cost of the ensemble", COST_HEAD)):
        rows: list[list[str]] = []
        strong: list[int] = []
        for group in groups:
            rows.append([group.label])
            cells = [_row(run, place) for run in group.runs]
            if len(group.runs) > 1:
                strong.append(len(rows) + len(cells))
                cells.append(_mean_row(group))
            rows += [[row.get(heading, "") for heading in head] for row in cells]
        text = [index for index, heading in enumerate(head) if heading in TEXT]
        parts += [page.section_heading(title, 3), page.table(head, rows, text, strong)]
    note = "A group: experiment · objective + terms of knowledge · combination [settings that set it apart]. "
    note += f"Latency: {LATENCY} Directories are below {place}."
    return [*parts, page.paragraphs([note])]
