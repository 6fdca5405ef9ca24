"""The figures of one run."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pkd_lightning.reporting import style
from pkd_lightning.reporting.exits import curves_of, exits_caption, exits_figure
from pkd_lightning.reporting.knowledge import knowledge_caption, knowledge_panels, taught, terms_of
from pkd_lightning.reporting.load import Row, RunRecord, part
from pkd_lightning.reporting.values import (
    LATENCY,
    acceptance,
    decimal,
    distilled,
    ensemble_share,
    number,
    prefix_cost,
    ratio,
    share,
)

COST_PANELS = (
    ("params", "parameters\n(% of teacher)", style.BLUE),
    ("flops_published", "published FLOPs\n(% of teacher)", style.ORANGE),
    ("macs_total", "total MACs\n(% of teacher)", style.VERMILLION),
)
EDGE_STYLES = {
    "first_round": (style.GREY, "X", "first student: zero by definition"),
    "condition": (style.BLUE, "o", "accepted by the condition"),
    "relaxed_condition": (style.ORANGE, "s", "accepted by the relaxed condition"),
    "improvement": (style.PURPLE, "^", "accepted by improvement"),
    "best_candidate": (style.VERMILLION, "v", "accepted as best candidate"),
    "peers": (style.GREEN, "P", "trained together, not judged"),
    "contradiction": (style.INK, "D", "recorded as condition, not every edge positive"),
}
OTHER_EDGE_STYLE = (style.INK, "D", "accepted otherwise")


@dataclass(frozen=True)
class Card:
    """A figure with the words around it.

    Attributes:
        name: file name of the PNG without its ending, and prefix of identifiers on the page.
        title: heading.
        caption: what is drawn, and what a reader must know to read it.
        figures: the parts; more than one are small multiples that the page arranges by its width.
        draw: draws all of it as one figure, for the PNG.
    """

    name: str
    title: str
    caption: str
    figures: list[Figure]
    draw: Callable[[], Figure]


def cards(run: RunRecord) -> list[Card]:
    """Every figure this run has data for. Call inside `style.styled()`."""
    results = run.results
    made = []
    if results["rounds"]:
        for name, title, caption, draw in (
            ("accuracy_students", "Accuracy against number of students", caption_of(results), accuracy_figure),
            ("accuracy_macs", "Accuracy against compute", MACS_CAPTION, macs_figure),
            ("cost", "Cost per student, relative to the teacher", COST_CAPTION, cost_figure),
            ("latency", "Latency", LATENCY_CAPTION, latency_figure),
            ("edges", "Edges of each round", EDGES_CAPTION, edges_figure),
        ):
            if (name == "latency" and not timed(results)) or (name in ("accuracy_macs", "cost") and not run.finished):
                continue
            if name in ("cost", "edges") and not distilled(results):
                continue
            made.append(Card(name, title, caption, [draw(results)], lambda draw=draw: draw(results)))  # type: ignore[misc]
    curves = curves_of(results)
    if curves is not None:
        draw_exits = partial(exits_figure, curves)
        made.append(
            Card(
                "exits",
                "Early exit: test error against mean compute",
                exits_caption(results),
                [draw_exits()],
                draw_exits,
            )
        )
    stages = loss_stages(run.metrics)
    if stages:
        panels = [loss_panels({stage: rows}, 3.0, 1) for stage, rows in stages.items()]
        made.append(Card("losses", "Loss curves", LOSS_CAPTION, panels, lambda: loss_panels(stages, 3.0, 4)))
    students = taught(stages)
    if students:
        names = terms_of(row for rows in students.values() for row in rows)
        panels = [knowledge_panels({student: rows}, names, 3.0, 1) for student, rows in students.items()]
        draw_terms = partial(knowledge_panels, students, names, 3.0, 4)
        made.append(Card("knowledge", "Knowledge", knowledge_caption(students), panels, draw_terms))
    return made


def caption_of(results: Row) -> str:
    """What the accuracies are of."""
    line = "; the dashed line is the teacher" if distilled(results) else ""
    return (
        f"Accuracy on the {part(results)} part of each student alone and of the ensemble of the first t students{line}."
    )


MACS_CAPTION = (
    "Accuracy of the first t students together against everything they compute for one image (convolutions, "
    "projections and scan included), numbered by t. The published FLOPs are in the table."
)
COST_CAPTION = (
    "Each student alone, and all of them together, in % of the teacher. Published FLOPs follow the paper's convention, "
    "which counts in_proj alone of a Mamba block; total MACs count everything. Each panel has its own scale."
)
LATENCY_CAPTION = (
    f"{LATENCY[0].upper()}{LATENCY[1:]} Each student alone, and the first t students one after the other, with what "
    "combines them. It depends on the machine and need not follow the MACs."
)
EDGES_CAPTION = (
    "Edge of each class: the weighted sum of student minus teacher logit, positive where the student corrects what "
    "the ensemble so far gets wrong. A bar spans the smallest to the largest edge; the fraction counts the classes "
    "with a positive edge. The first student's edges are zero by definition, so they say nothing about the condition."
)
LOSS_CAPTION = (
    "Loss against epoch of each fit (student 1 is round-00 in metrics.jsonl; of peers, trained together, it is "
    "the mean loss). Each fit minimises its own objective (dimensionless), so heights compare within a panel only. "
    "Earlier attempts of a round are drawn faint."
)


def accuracy_figure(results: Row) -> Figure:
    """Accuracy of single students and of prefixes against the number of students."""
    figure = style.new_figure(3.6)
    axes = figure.add_subplot()
    rounds = results["rounds"]
    count = range(1, len(rounds) + 1)
    _teacher_line(axes, results)
    alone = [100 * number(entry, "accuracy") for entry in rounds]
    prefix = [100 * number(entry, "prefix_accuracy") for entry in rounds]
    axes.plot(count, alone, "s--", color=style.VERMILLION, mfc="white", lw=1.2, label="student t alone")
    axes.plot(count, prefix, "o-", color=style.BLUE, label="first t together")
    style.student_axis(axes, len(rounds), "number of students t")
    style.accuracy_axis(axes, f"{part(results)} accuracy (%)")
    style.legend_above(axes, 3)
    return figure


def macs_figure(results: Row) -> Figure:
    """Accuracy of prefixes against their total MACs, with the teacher as a point."""
    figure = style.new_figure(3.6)
    axes = figure.add_subplot()
    accuracies = [100 * number(entry, "prefix_accuracy") for entry in results["rounds"]]
    points = [
        (macs, accuracy, str(index))
        for index, (macs, accuracy) in enumerate(
            zip(prefix_cost(results, "macs_total"), accuracies, strict=True), start=1
        )
        if macs > 0 and not math.isnan(accuracy)
    ]
    teacher = number(results["teacher"], "macs_total"), 100 * number(results["teacher"], "accuracy")
    known = [macs for macs, _, _ in points]
    if teacher[0] > 0 and not math.isnan(teacher[1]):
        known.append(teacher[0])
        axes.plot(*teacher, "*", color=style.INK, ms=11, ls="none", label="teacher")
    if not known:
        axes.set_ylabel("test accuracy (%)")
        axes.text(0.5, 0.5, "no costs recorded", transform=axes.transAxes, ha="center", color=style.GREY)
        axes.set_xlabel("total multiply-accumulates (MACs) per image")
        return figure
    if points:
        xs, ys, labels = map(list, zip(*points, strict=True))
        axes.plot(xs, ys, "o-", color=style.BLUE, label="first t students together, numbered by t")
    style.mac_axis(axes, known)
    style.accuracy_axis(axes, "test accuracy (%)")
    style.legend_above(axes, 2)
    if points:
        style.label_points(axes, xs, ys, labels, style.BLUE)
    return figure


def cost_figure(results: Row) -> Figure:
    """Parameters, published FLOPs and total MACs of each student and of all, in % of the teacher."""
    figure = style.new_figure(4.8)
    rounds = results["rounds"]
    names = [str(index) for index in range(1, len(rounds) + 1)] + ["all"]
    places = [*range(1, len(rounds) + 1), len(rounds) + 1.4]
    panels = figure.subplots(3, 1, sharex=True)
    for axes, (key, label, color) in zip(panels, COST_PANELS, strict=True):
        teacher = number(results["teacher"], key)
        values = [ratio(number(entry, key), teacher) for entry in rounds] + [ensemble_share(results, key)]
        heights = [0.0 if math.isnan(value) else 100 * value for value in values]
        bars = axes.bar(places, heights, width=0.7, color=color)
        bars[-1].set(facecolor="white", edgecolor=color, hatch="////", linewidth=1.2)
        for place, height, value in zip(places, heights, values, strict=True):
            text = share(value).removesuffix("%")
            axes.annotate(
                text,
                (place, height),
                (0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=7 if len(places) <= 13 else 6,
                rotation=0 if len(places) <= 13 else 90,
            )
        axes.set_ylabel(label, fontsize=8)
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.22 if len(places) <= 13 else 0.4)
        axes.yaxis.set_major_locator(MaxNLocator(4))
    panels[-1].set_xticks(places, names)
    panels[-1].set_xlim(0.4, places[-1] + 0.6)
    panels[-1].set_xlabel("student")
    return figure


def timed(results: Row) -> bool:
    """Whether the run measured the latency of any prefix."""
    return any(not math.isnan(number(entry, "prefix_latency_ms")) for entry in results["rounds"])


def latency_figure(results: Row) -> Figure:
    """Latency of each student alone and of each prefix, with the teacher's as a line."""
    figure = style.new_figure(4.8)
    axes = figure.add_subplot()
    count = range(1, len(results["rounds"]) + 1)
    alone = [number(entry, "latency_ms") for entry in results["rounds"]]
    prefix = [number(entry, "prefix_latency_ms") for entry in results["rounds"]]
    teacher = number(results["teacher"], "latency_ms")
    if not math.isnan(teacher):
        axes.axhline(teacher, color=style.INK, ls=style.TEACHER_DASH, lw=1.2, label=f"teacher ({teacher:.2f} ms)")
    axes.bar(count, alone, 0.6, color=style.VERMILLION, label="student t alone")
    axes.plot(count, prefix, "o-", color=style.BLUE, label="first t together")
    last = len(prefix), prefix[-1]
    axes.annotate(decimal(prefix[-1], 2), last, (0, 6), textcoords="offset points", ha="center", fontsize=7.5)
    style.student_axis(axes, len(prefix), "number of students t")
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("latency (ms per image)")
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    style.legend_above(axes, 3)
    return figure


def edges_figure(results: Row) -> Figure:
    """Range of the edges of each round, and single classes where they are recorded."""
    figure = style.new_figure(3.6)
    axes = figure.add_subplot()
    axes.use_sticky_edges = False  # a bar's end is data like any other: leave room below it
    axes.axhline(0, color=style.INK, lw=1)
    used = {}
    for place, entry in enumerate(results["rounds"], start=1):
        kind = acceptance(entry)
        color, marker, _ = used[kind] = EDGE_STYLES.get(kind, OTHER_EDGE_STYLE)
        edges = entry["edges"]
        low, high = number(edges, "min"), number(edges, "max")
        if kind == "first_round" or math.isnan(low) or math.isnan(high):
            if kind == "first_round":
                axes.plot(place, 0, marker, color=color, ms=7, zorder=3)
            continue
        axes.bar(place, high - low, 0.62, bottom=low, color=color, alpha=0.22, edgecolor=color, linewidth=1.2)
        classes = [number({"edge": edge}, "edge") for edge in edges.get("per_class") or []]
        spread = [place - 0.2 + 0.4 * index / max(len(classes) - 1, 1) for index in range(len(classes))]
        axes.plot(spread, classes, marker, color=color, ms=3, ls="none")
        text = f"{number(edges, 'satisfied'):.0f}/{number(edges, 'classes'):.0f}"
        axes.annotate(text, (place, max(high, 0)), (0, 5), textcoords="offset points", ha="center", fontsize=7.5)
    axes.margins(y=0.14)
    if len(used) == 1 and "first_round" in used:
        axes.set_ylim(-1, 1)
    style.student_axis(axes, len(results["rounds"]), "student")
    axes.set_ylabel("edge of a class (logits)")
    axes.grid(axis="x", visible=False)
    handles = [
        Line2D([], [], color=color, marker=marker, ls="none", label=label) for color, marker, label in used.values()
    ]
    # one below the other: two of the long ones are wider than the figure
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.01, 1.0), borderaxespad=0.2)
    return figure


def loss_stages(metrics: list[Row]) -> dict[str, list[Row]]:
    """The metric rows that hold losses, by stage: the teacher first, then the rounds in their order."""
    stages: dict[str, list[Row]] = {}
    for row in metrics:
        if any(not math.isnan(number(row, key)) for key in ("train_loss", "validation_loss")):
            stages.setdefault(str(row["stage"]), []).append(row)

    def place(stage: str) -> tuple[int, int, str]:
        found = re.fullmatch(r"round-(\d+)", stage)
        first = {"teacher": 0, "assistant": 1}.get(stage.partition("-")[0], 3)
        return (2, int(found[1]), "") if found else (first, 0, stage)

    return {stage: stages[stage] for stage in sorted(stages, key=place)}


def loss_panels(stages: dict[str, list[Row]], width: float, columns: int) -> Figure:
    """Small multiples of the loss curves, `columns` wide."""
    columns = min(columns, len(stages))
    lines = math.ceil(len(stages) / columns)
    figure = style.new_figure(2.2 * lines, width * columns)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, (stage, rows) in zip(panels, stages.items(), strict=False):
        _loss_curves(axes, stage, rows)
    for axes in panels[len(stages) :]:
        axes.set_visible(False)
    return figure


def _loss_curves(axes: Axes, stage: str, rows: list[Row]) -> None:
    attempts = sorted({int(row.get("attempt") or 0) for row in rows})
    drawn: list[float] = []
    for attempt in attempts:
        chosen = [row for row in rows if int(row.get("attempt") or 0) == attempt]
        epochs = [int(row["epoch"]) + 1 for row in chosen]
        last = attempt == attempts[-1]
        for key, color, line, label in (
            ("train_loss", style.ORANGE, "-", "training"),
            ("validation_loss", style.BLUE, "--", "validation"),
        ):
            losses = [number(row, key) for row in chosen]
            drawn += [loss for loss in losses if not math.isnan(loss)]
            mark = "." if len(losses) < 4 else ""
            alpha = 1.0 if last else 0.35
            axes.plot(epochs, losses, line, color=color, marker=mark, lw=1.4, alpha=alpha, label=label if last else "")
    style.loss_axis(axes, drawn)
    found = re.fullmatch(r"round-(\d+)", stage)
    title = f"student {int(found[1]) + 1}" if found else {"peers": "all students together"}.get(stage, stage)
    tries = f", {len(attempts)} attempts" if len(attempts) > 1 else ""
    axes.set_title(f"{title[:28]}{tries}", loc="left", fontweight="bold", fontsize=8.5)
    style.epoch_axis(axes)
    axes.legend(fontsize=7, handlelength=1.6)


def _teacher_line(axes: Axes, results: Row) -> None:
    accuracy = 100 * number(results["teacher"], "accuracy")
    if not math.isnan(accuracy):
        axes.axhline(accuracy, color=style.INK, ls=style.TEACHER_DASH, lw=1.2, label=f"teacher ({accuracy:.1f}%)")
