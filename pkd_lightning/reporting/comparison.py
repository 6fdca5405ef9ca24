"""The page that compares several runs."""

import math
from collections.abc import Callable, Sequence
from statistics import mean, stdev
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pkd_lightning.reporting import page, style
from pkd_lightning.reporting.grouping import Group, curve, grouped
from pkd_lightning.reporting.load import RunRecord
from pkd_lightning.reporting.values import (
    MISSING,
    condition_counts,
    duration,
    ensemble_shares,
    number,
    percent,
    prefix_cost,
    share,
)

HEAD = (
    "experiment · objective · combination",
    "seed",
    "students",
    "teacher accuracy",
    "ensemble accuracy",
    "points to teacher",
    "agrees with teacher",
    "parameters / teacher",
    "total MACs / teacher",
    "published FLOPs / teacher",
    "condition met after the first",
    "time",
    "stopped",
    "directory",
)
ACCURACY = "ensemble test accuracy (%)"
TEXT_COLUMNS = (0, 1, 12, 13)


def comparison_page(runs: Sequence[RunRecord]) -> str:
    """One section a data set and split: accuracies on different test parts are never drawn together."""
    sections: dict[tuple[str, str], list[RunRecord]] = {}
    for run in runs:
        sections.setdefault((str(run.results["dataset"]), str(run.results["split"])), []).append(run)
    names = [f"{dataset} (split {split})" for dataset, split in sections]
    body = [page.heading("Comparison of runs", f"{len(runs)} runs on {', '.join(names)}")]
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
                f"{band}Short dashes at the right edge: the teacher (mean over seeds) of each setting.",
                [style.svg(students_figure(groups), f"{name}-students", "Ensemble accuracy against students")],
            ),
            page.figure(
                "Ensemble accuracy against compute",
                f"{band}Total MACs count everything the first t students compute for one image; stars are teachers. "
                "Published FLOPs are in the table.",
                [style.svg(macs_figure(groups), f"{name}-macs", "Ensemble accuracy against total MACs")],
            ),
        ]
    return [
        f"<section>{page.section_heading(title)}",
        page.notes(remarks),
        f'<div class="figures">{"".join(graphics)}</div>' if graphics else "",
        page.section_heading("Runs", 3),
        _table(groups),
        "</section>",
    ]


def students_figure(groups: Sequence[Group]) -> Figure:
    """Prefix accuracy against the number of students, a colour for each group."""
    figure, axes = _canvas(groups)
    most = max(len(run.results["rounds"]) for group in groups for run in group.runs)
    for index, group in enumerate(groups):
        _lines(axes, group, index, lambda run: [float(t) for t in range(1, len(run.results["rounds"]) + 1)])
        line = curve(group)
        _band(axes, group, index, [float(t) for t in range(1, len(line.center) + 1)])
        teacher = _mean([number(run.results["teacher"], "accuracy") for run in group.runs])
        axes.plot([0.965, 1.0], [100 * teacher] * 2, color=_color(index), lw=2, transform=axes.get_yaxis_transform())
    style.student_axis(axes, most, "number of students t")
    axes.set_xlim(0.5, most + 0.7)
    style.accuracy_axis(axes, ACCURACY)
    return figure


def macs_figure(groups: Sequence[Group]) -> Figure:
    """Prefix accuracy against total MACs, a colour for each group, the teachers as stars."""
    figure, axes = _canvas(groups)
    known: list[float] = []
    for index, group in enumerate(groups):
        _lines(axes, group, index, lambda run: prefix_cost(run.results, "macs_total"))
        _band(axes, group, index, curve(group).macs)
        for run in group.runs:
            teacher = number(run.results["teacher"], "macs_total")
            accuracy = 100 * number(run.results["teacher"], "accuracy")
            axes.plot(teacher, accuracy, "*", color=_color(index), ms=9, mec="white", mew=0.6)
            known += [cost for cost in (teacher, *prefix_cost(run.results, "macs_total")) if cost > 0]
    if known:
        style.mac_axis(axes, known)
    style.accuracy_axis(axes, ACCURACY)
    return figure


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
        width, alpha = (1.8, 1.0) if single else (0.8, 0.45)
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


def _row(group: Group, run: RunRecord) -> list[str]:
    results = run.results
    ensemble, teacher = results.get("ensemble") or {}, results["teacher"]
    shares = ensemble_shares(results)
    gap = 100 * (number(ensemble, "accuracy") - number(teacher, "accuracy"))
    met, later = condition_counts(results)
    return [
        group.label,
        str(results.get("seed")),
        str(len(results["rounds"])),
        percent(number(teacher, "accuracy"), 2),
        percent(number(ensemble, "accuracy"), 2),
        MISSING if math.isnan(gap) else f"{gap:+.2f}",
        percent(number(ensemble, "agreement"), 2),
        share(shares["params"]),
        share(shares["macs_total"]),
        share(shares["flops_published"]),
        f"{met} of {later}",
        duration(number(results, "wall_seconds", "total")),
        str(results.get("stop_reason") or ""),
        str(run.path),
    ]


def _mean_row(group: Group) -> list[str]:
    """Mean and sample standard deviation over the seeds of a group."""

    def spread(values: list[float]) -> str:
        if any(math.isnan(value) for value in values):
            return MISSING
        return f"{100 * mean(values):.2f} ± {100 * stdev(values):.2f}%"

    teacher = [number(run.results["teacher"], "accuracy") for run in group.runs]
    ensemble = [number(run.results.get("ensemble") or {}, "accuracy") for run in group.runs]
    agreement = [number(run.results.get("ensemble") or {}, "agreement") for run in group.runs]
    gap = [own - other for own, other in zip(ensemble, teacher, strict=True)]
    shares = [ensemble_shares(run.results) for run in group.runs]
    means = [share(_mean([one[key] for one in shares])) for key in ("params", "macs_total", "flops_published")]
    students = _mean([float(len(run.results["rounds"])) for run in group.runs])
    seconds = _mean([number(run.results, "wall_seconds", "total") for run in group.runs])
    points = spread(gap).removesuffix("%")
    own = [spread(teacher), spread(ensemble), points, spread(agreement), *means]
    label = f"mean ± SD of {len(group.runs)}"
    return [group.label, label, f"{students:.3g}", *own, "", duration(seconds), "", ""]


def _table(groups: Sequence[Group]) -> str:
    rows, strong = [], []
    for group in groups:
        rows += [_row(group, run) for run in group.runs]
        if len(group.runs) > 1:
            strong.append(len(rows))
            rows.append(_mean_row(group))
    return page.table(HEAD, rows, TEXT_COLUMNS, strong)
