"""The figures of the READMEs, drawn from the studies' results files; `experiments.readme` saves them."""

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments import tables
from experiments.plan import load_study
from experiments.study import collected
from experiments.tables import PUBLISHED, Results, chosen, of_teacher, per_round
from pkd_lightning.errors import RunError
from pkd_lightning.reporting import style
from pkd_lightning.reporting.exits import curves_of, exits_figure
from pkd_lightning.reporting.load import read_metrics
from pkd_lightning.reporting.values import prefix_cost

ERRORS = (0.3, 0.4, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100)  # percent, ticks


def draw_errors(axes: Axes, seeds: list[Results], key: str, line: str, color: str, label: str) -> None:
    """The mean over the seeds of the test error by `key`, with a band of a standard deviation."""
    values = [[100 - 100 * value for value in row] for row in per_round(seeds, key)]
    means = [statistics.mean(row) for row in values]
    count = range(1, len(means) + 1)
    axes.plot(count, means, line, color=color, mfc="white" if line == "s--" else color, label=label)
    if len(seeds) > 1:
        spread = [statistics.stdev(row) for row in values]
        lower = [max(m - s, m / 10) for m, s in zip(means, spread, strict=True)]  # above 0
        upper = [m + s for m, s in zip(means, spread, strict=True)]
        axes.fill_between(count, lower, upper, color=color, alpha=0.15, linewidth=0)


def error_axis(axes: Axes) -> None:
    """Logarithmic, because what matters above 99% of accuracy would be hidden beside 60%."""
    axes.set_yscale("log")
    axes.set_yticks(ERRORS, [f"{error:g}" for error in ERRORS])
    axes.minorticks_off()
    axes.margins(y=0.06)
    axes.set_ylabel("test error (%)")


def draw_prefixes(axes: Axes, seeds: list[Results], against_paper: bool, label: str) -> None:
    """Mean test error of students alone and together over the seeds of a run, and its teacher's."""
    draw_errors(axes, seeds, "prefix_accuracy", "o-", style.BLUE, "first t together")
    draw_errors(axes, seeds, "accuracy", "s--", style.VERMILLION, "student t alone")
    if against_paper:
        published = [100 - accuracy for accuracy in PUBLISHED[seeds[0]["dataset"]].students]
        axes.plot(range(1, len(published) + 1), published, "x:", color=style.GREY, label="Mamba-PKD, as published")
    teacher = 100 - 100 * statistics.mean(of_teacher(seeds, "accuracy"))
    axes.axhline(teacher, color=style.INK, ls=style.TEACHER_DASH, lw=1.2, label=f"teacher ({teacher:.2g}%)")
    style.student_axis(axes, len(seeds[0]["rounds"]), label)
    error_axis(axes)
    style.legend_above(axes, 2)


def errors(study: str, run: str, against_paper: bool = False) -> Figure:
    """Mean test error of students alone and together over the seeds of a run."""
    with style.styled():
        figure = style.new_figure(3.8)
        draw_prefixes(figure.add_subplot(), chosen(study, [run])[run], against_paper, "student t, or the first t")
    return figure


def headline() -> Figure:
    """The same of our students on both data sets of the paper, a panel each."""
    with style.styled():
        figure = style.new_figure(3.8, width=2 * style.WIDTH)
        panels = figure.subplots(1, len(tables.HEADLINE))
        for axes, (name, (study, run)) in zip(panels, tables.HEADLINE.items(), strict=True):
            draw_prefixes(axes, chosen(study, [run])[run], True, f"{name}: student t, or the first t")
    return figure


def errors_by_run(lines: Mapping[str, tuple[str, str]]) -> Figure:
    """Mean test errors, students alone in one panel and together in the other; a line is the run of a study.

    The axis ends a little above the worst ensemble, as in `final_errors`.
    """
    with style.styled():
        figure = style.new_figure(3.8, width=2 * style.WIDTH)
        panels = {"student t alone": "accuracy", "the first t together": "prefix_accuracy"}
        for axes, (title, key) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
            for (label, (study, run)), color, marker in zip(lines.items(), style.CYCLE, style.MARKERS, strict=False):
                draw_errors(axes, chosen(study, [run])[run], key, f"{marker}-", color, label)
            style.student_axis(axes, len(axes.lines[0].get_xdata()), title)
            error_axis(axes)
            style.legend_above(axes, 2)
        axes.set_ylim(top=1.2 * max(line.get_ydata().max() for line in axes.lines))
    return figure


def fractions(study: str, run: str) -> Figure:
    """FLOPs of each student and of all together in percent of the teacher's: as published, and everything counted.

    The bars of the figure 6 of Mamba-PKD (arXiv 2503.01727), beside those of all multiply-accumulates.
    """
    results = chosen(study, [run])[run][0]
    names = [*(f"{t + 1}" for t in range(len(results["rounds"]))), "all"]
    counts = {
        "in_proj and head, as the paper counts": ("flops_published", style.BLUE, -0.2),
        "every multiply-accumulate": ("macs_total", style.VERMILLION, 0.2),
    }
    with style.styled():
        figure = style.new_figure(3.2, width=1.7 * style.WIDTH)
        axes = figure.add_subplot()
        for label, (key, color, shift) in counts.items():
            costs = [row[key] for row in results["rounds"]]
            shares = [100 * cost / results["teacher"][key] for cost in (*costs, prefix_cost(results, key)[-1])]
            bars = axes.bar([place + shift for place in range(len(names))], shares, 0.4, color=color, label=label)
            axes.bar_label(bars, [f"{value:.2g}" for value in shares], fontsize=7)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlabel("student")
        axes.set_ylabel("% of the teacher's")
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.1)
        style.legend_above(axes, 2)
    return figure


def final_errors(study: str, names: Sequence[str]) -> Figure:
    """Test errors of each run's ensemble and last student: means and standard deviations over its seeds.

    The axis ends at twice the worst ensemble: a student that is nothing alone would hide what is between the others.
    """
    runs = chosen(study, names)
    parts = (("prefix_accuracy", "o", style.BLUE, "all together"), ("accuracy", "s", style.VERMILLION, "last alone"))
    with style.styled():
        figure = style.new_figure(1 + 0.33 * len(runs), width=1.3 * style.WIDTH)
        axes = figure.add_subplot()
        for key, marker, color, label in parts:
            errors = [[100 - 100 * run["rounds"][-1][key] for run in seeds] for seeds in runs.values()]
            means = [statistics.mean(row) for row in errors]
            spread = [statistics.stdev(row) if len(row) > 1 else 0 for row in errors]
            rows = [row + (0.12 if marker == "o" else -0.12) for row in range(len(runs), 0, -1)]  # the first on top
            axes.errorbar(means, rows, xerr=spread, fmt=marker, color=color, label=label)
        teacher = 100 - 100 * statistics.mean(of_teacher(next(iter(runs.values())), "accuracy"))
        axes.axvline(teacher, color=style.INK, ls=style.TEACHER_DASH, lw=1.2, label=f"teacher ({teacher:.2g}%)")
        axes.set_xscale("log")
        axes.set_xticks(ERRORS, [f"{error:g}" for error in ERRORS])
        axes.minorticks_off()
        axes.margins(x=0.06, y=0.08)
        axes.set_xlim(right=2 * max(axes.lines[0].get_xdata()))
        axes.set_xlabel("test error (%)")
        axes.set_yticks(range(len(runs), 0, -1), list(runs))
        style.legend_above(axes, 3)
    return figure


def gains(study: str, names: Sequence[str], alone: bool = True) -> Figure:
    """Accuracy of each run less that of the first run, seed by seed, and their means: a line a run.

    Of the last student `alone`, or of the ensemble. Seeds are those that both have. The best mean stands on top.
    """
    (_, reference), *others = chosen(study, names).items()
    rows = {name: [100 * gain for gain in tables.gains(seeds, reference, alone)] for name, seeds in others}
    rows = dict(sorted(((name, row) for name, row in rows.items() if row), key=lambda item: statistics.mean(item[1])))
    with style.styled():
        figure = style.new_figure(1 + 0.28 * len(rows), width=1.3 * style.WIDTH)
        axes = figure.add_subplot()
        axes.axvline(0, color=style.INK, lw=1.2)
        for place, row in enumerate(rows.values()):
            axes.plot(
                row, [place] * len(row), "o", color=style.BLUE, mfc="none", ms=5, label="a seed" if not place else ""
            )
        means = [statistics.mean(row) for row in rows.values()]
        axes.plot(means, range(len(rows)), "|", color=style.VERMILLION, ms=14, mew=2, label="mean")
        axes.set_yticks(range(len(rows)), list(rows))
        axes.margins(x=0.06)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel(f"test accuracy against {names[0]} (points)")
        style.legend_above(axes, 2)
    return figure


def exits(study: str, run: str) -> Figure:
    """Test error against mean multiply-accumulates of early exits, of the first seed; students alone and the teacher.

    Raises:
        RunError: the run's results have no early exits.
    """
    curves = curves_of(chosen(study, [run])[run][0])
    if curves is None:
        raise RunError(f"experiments/{study}: the results of {run} have no early exits")
    with style.styled():
        return exits_figure(curves)


def fits(study: str, run: str) -> dict[str, list[dict[str, Any]]]:
    """The first fit of every stage, its epochs in order, from the metrics kept of a run's first seed.

    Raises:
        RunError: there are none.
    """
    jobs = [job for job in load_study(tables.ROOT / "experiments" / study).jobs if job.run.name == run]
    records = read_metrics(jobs[0].kept / "metrics.jsonl")[0] if jobs and collected(jobs[0]) else []
    if not records:
        raise RunError(f"experiments/{study}: no metrics kept of {run}; make study STUDY={study}")
    stages: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["attempt"] == 0:
            stages.setdefault(record["stage"], []).append(record)
    return stages


def curves(study: str, panels: Mapping[str, Mapping[str, tuple[str, str]]]) -> Figure:
    """Validation accuracy after each epoch; a panel is a title and, by label, the run and stage of each curve in it."""
    with style.styled():
        figure = style.new_figure(3.2, width=2 * style.WIDTH)
        for axes, (name, lines) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            for (label, (run, stage)), color, marker in zip(lines.items(), style.CYCLE, style.MARKERS, strict=False):
                values = [100 * record["validation_accuracy"] for record in fits(study, run)[stage]]
                every = max(1, len(values) // 10)
                axes.plot(
                    range(1, len(values) + 1), values, color=color, marker=marker, markevery=every, lw=1.2, label=label
                )
            slowest = min(line.get_ydata()[len(line.get_ydata()) // 4] for line in axes.lines)
            axes.set_ylim(bottom=slowest)  # first epochs far below would flatten the rest
            axes.set_title(name, loc="left")
            axes.set_xlabel("epoch")
            axes.set_ylabel("validation accuracy (%)")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.legend(ncols=1 + len(lines) // 4)
    return figure


def digest(figure: Figure) -> str:
    """What a figure shows, in a few letters: the title of its file, by which a test can tell its age."""
    drawn = [
        [label, [[f"{value:.6g}" for value in point] for point in np.asarray(points)]]
        for axes in figure.axes
        for label, points in (
            *((str(line.get_label()), line.get_xydata()) for line in axes.lines),
            *(("band", path.vertices) for band in axes.collections for path in band.get_paths()),
            *(("bar", bar.get_corners()) for bar in axes.patches if isinstance(bar, Rectangle)),
            ("limits", (axes.get_xlim(), axes.get_ylim())),
        )
    ]
    return f"data {hashlib.blake2b(json.dumps(drawn).encode(), digest_size=6).hexdigest()}"


# file below experiments/, and how it is drawn
FIGURES: dict[str, Callable[[], Figure]] = {
    "headline.png": headline,
    "digits/errors.png": partial(errors, "digits", "anchored"),
    "mnist_best/errors.png": partial(errors, "mnist_best", "anchored", against_paper=True),
    "cifar10_best/errors.png": partial(errors, "cifar10_best", "anchored", against_paper=True),
    "cifar10_best/exits.png": partial(exits, "cifar10_best", "anchored"),
    "cifar10_best/longer.png": partial(
        errors_by_run,
        {"20 passes (anchored)": ("cifar10_best", "anchored"), "60 passes (long)": ("cifar10_best", "long")},
    ),
    "mnist_paper/errors.png": partial(errors, "mnist_paper", "published", against_paper=True),
    "mnist_paper/fractions.png": partial(fractions, "mnist_paper", "published"),
    "mnist_objectives/errors.png": partial(
        errors_by_run,
        {
            "published objective": ("mnist_objectives", "published"),
            "additive": ("mnist_objectives", "additive"),
            "anchored": ("mnist_objectives", "anchored"),
            "published objective and settings": ("mnist_paper", "published"),
        },
    ),
    "mnist_ablation/errors.png": partial(
        errors_by_run,
        {
            "anchored": ("mnist_ablation", "anchored"),
            "independent, learned": ("mnist_ablation", "independent_learned"),
            "independent, mean": ("mnist_ablation", "independent"),
            "published": ("mnist_ablation", "published"),
            "additive": ("mnist_ablation", "additive"),
            "anchored, convolutions": ("mnist_ablation", "anchored_convolutions"),
        },
    ),
    "mnist_ablation/final.png": partial(
        final_errors,
        "mnist_ablation",
        [
            "anchored",
            "anchored_weighted",
            "independent_learned",
            "no_teacher_learned",
            "independent",
            "no_teacher",
            "published",
            "published_learned",
            "published_mean",
            "published_learned_mean",
            "additive",
            "additive_learned",
            "anchored_convolutions",
            "single",
            "single_longer",
        ],
    ),
    "knowledge/gains.png": partial(
        gains,
        "knowledge",
        [
            "logits",
            "no_teacher",
            "no_teacher_longer",
            "standardised",
            "dkd",
            "dist",
            "fitnet",
            "vid",
            "attention_transfer",
            "fsp",
            "sp",
            "rkd",
            "pkt",
            "crd",
            "mixers",
            "own_size",
            "assistant",
        ],
    ),
    "cifar10_ablation/gains.png": partial(
        gains,
        "cifar10_ablation",
        [
            "no_teacher",
            "independent",
            "independent_learned",
            "independent_held_out",
            "independent_soft",
            "independent_residual",
            "anchored",
            "anchored_held_out",
            "published",
            "published_held_out",
            "single",
            "depthwise",
            "fitnet_norm",
        ],
        alone=False,
    ),
    "mnist_paper/curves.png": partial(
        curves,
        "mnist_paper",
        {
            "teacher": {
                "ours: AdamW, cosine from 0.01, batches of 128": ("teacher", "teacher"),
                "published settings, 3 epochs of 50": ("teacher_published", "teacher"),
            },
            "the first t students while the t-th trains, published settings": {
                f"t = {t + 1}": ("published", f"round-{t:02d}") for t in range(7)
            },
        },
    ),
}
