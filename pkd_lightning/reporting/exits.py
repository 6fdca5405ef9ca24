"""Early exits in a report: a figure of test error against mean multiply-accumulates, and a table by budgets."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pkd_lightning.reporting import style
from pkd_lightning.reporting.load import Row
from pkd_lightning.reporting.values import MISSING, decimal, distilled, number, percent

# by their names in results.json, in the order of legends and tables; sizes of markers, which are open: many coincide
RULES = {
    "maximum": ("maximum probability", style.BLUE, "o", 9),
    "margin": ("margin", style.GREEN, "^", 5),
    "entropy": ("entropy", style.PURPLE, "D", 7),
    "patience": ("patience", style.ORANGE, "v", 6),
    "learned": ("learned exit", style.VERMILLION, "P", 4),
}
# of the thresholds that are shown: one a prefix, but of patience, as it was published, one for all
CHOICES = {"patience": "one_threshold"}
OTHERWISE = "budgeted"


class Point(NamedTuple):
    """Multiply-accumulates an image in the mean, and accuracy, from 0 to 1."""

    macs: float
    accuracy: float


class Curves(NamedTuple):
    """What the figure shows.

    Attributes:
        rules: of each rule by name, its points by budget.
        prefixes: the first t students for every image.
        students: each student alone.
        teacher: the teacher.
    """

    rules: Mapping[str, Sequence[Point]]
    prefixes: Sequence[Point]
    students: Sequence[Point]
    teacher: Point


def exit_points(results: Row, rule: str) -> dict[float, Point]:
    """A rule's points on the test part by budget, a part of the ensemble's multiply-accumulates."""
    choice = CHOICES.get(rule, OTHERWISE)
    exits = results.get("exits")
    rules = exits.get("rules") if isinstance(exits, Mapping) else None
    given = rules.get(rule) if isinstance(rules, Mapping) else None
    points = given.get(choice) if isinstance(given, Mapping) else None
    found = {}
    for point in points if isinstance(points, list) else []:
        budget, at = number(point, "budget"), Point(number(point, "macs"), number(point, "accuracy"))
        if not any(map(math.isnan, (budget, *at))):
            found[budget] = at
    return found


def curves_of(results: Row) -> Curves | None:
    """What the figure of a run shows; None where its results have no early exits."""
    rules = {rule: list(exit_points(results, rule).values()) for rule in RULES}
    if not any(rules.values()):
        return None
    rounds = results["rounds"]
    prefixes = [
        Point(macs, number(row, "prefix_accuracy")) for macs, row in zip(_prefix_macs(results), rounds, strict=False)
    ]
    students = [Point(number(row, "macs_total"), number(row, "accuracy")) for row in rounds]
    teacher = Point(number(results["teacher"], "macs_total"), number(results["teacher"], "accuracy"))
    return Curves({rule: points for rule, points in rules.items() if points}, prefixes, students, teacher)


def _prefix_macs(results: Row) -> list[float]:
    """Multiply-accumulates of an image in each prefix, NaN where it is unknown."""
    given = results["exits"].get("prefix_macs")
    return [number({"macs": value}, "macs") for value in given] if isinstance(given, list) else []


def exits_figure(curves: Curves) -> Figure:
    """Test error against mean multiply-accumulates."""
    figure = style.new_figure(4.4)
    axes = figure.add_subplot()
    draw_exits(axes, curves)
    style.legend_above(axes, 3)
    return figure


def draw_exits(axes: Axes, curves: Curves) -> None:
    """Test error against mean multiply-accumulates; students alone and prefixes where they are not far worse."""
    worst = max(100 - 100 * point.accuracy for points in curves.rules.values() for point in points)
    drawn = []

    def line(points: Sequence[Point], *kind: str, label: str, **looks: object) -> None:
        shown = [(macs, 100 - 100 * accuracy) for macs, accuracy in points if macs > 0 and accuracy <= 1]
        shown = [(macs, error) for macs, error in shown if error <= 2 * worst]
        drawn.extend(shown)
        if shown:
            axes.plot(*zip(*shown, strict=True), *kind, label=label, **looks)  # type: ignore[arg-type]

    line(curves.students, "s", ls="none", color=style.GREY, mfc="white", label="student alone")
    line(curves.prefixes, "X--", color=style.INK, lw=1.2, label="first t together")
    for name, points in curves.rules.items():
        label, color, marker, size = RULES[name]
        line(points, f"{marker}-", color=color, lw=1.1, ms=size, mfc="none", label=label)
    line([curves.teacher], "*", ls="none", color=style.INK, ms=11, label="teacher")
    style.mac_axis(axes, [macs for macs, _ in drawn])
    axes.set_xlabel("mean total multiply-accumulates (MACs) per image, log scale")
    style.error_axis(axes, [error for _, error in drawn])


def exits_table(results: Row) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: accuracies by rules and budgets, and those of the largest prefix within each budget."""
    points = {rule: exit_points(results, rule) for rule in RULES}
    budgets = sorted({budget for found in points.values() for budget in found})
    rows = [
        [RULES[rule][0], *(percent(found[budget].accuracy, 2) if budget in found else MISSING for budget in budgets)]
        for rule, found in points.items()
        if found
    ]
    fixed = [percent(prefix_within(results, budget), 2) for budget in budgets]
    head = ["budget", *(f"{decimal(100 * budget, 0)}%" for budget in budgets)]
    return head, [*rows, ["largest prefix within it", *fixed]]


def prefix_within(results: Row, budget: float) -> float:
    """Test accuracy of the largest prefix within a part of the whole ensemble's MACs, NaN where there is none."""
    costs = _prefix_macs(results)
    within = [row for macs, row in zip(costs, results["rounds"], strict=False) if macs <= budget * costs[-1]]
    return number(within[-1], "prefix_accuracy") if within else math.nan


CAPTION = (
    "Error on the test part where images leave at the first prefix that is sure of them, against what an image costs in"
    " the mean. The thresholds, one a prefix (of patience one for all), were chosen on the validation part, for"
    " {budgets} of the whole ensemble's MACs. Beside them: all images by the first t students, {others}."
)


def exits_caption(results: Row) -> str:
    """What the figure shows."""
    budgets = exits_table(results)[0][1:]
    listed = ", ".join(budgets[:-1]) + f" and {budgets[-1]}" if len(budgets) > 1 else budgets[0]
    others = "students alone, the teacher" if distilled(results) else "students alone"
    return CAPTION.format(budgets=listed, others=others)
