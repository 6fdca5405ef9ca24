"""Early exits of trained ensembles: `python -m benchmarks.exits [RUN ...]` writes docs/exits.json.

Measures the pretrained MNIST ensemble, and finished runs whose directories are given; runs of one experiment that
differ by their seed stand together. Exits are calibrated on the validation rows of the split that the students were
trained with, and measured on its test part. Then, or with `--tables` alone, docs/exits.png and the tables of
docs/inference.md are written from docs/exits.json. The tables stand between `<!-- exits: NAME -->` and
`<!-- end of exits -->`.
"""

import argparse
import json
import math
import re
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.tables import DOCS, markdown
from pkd_lightning.assembling import options
from pkd_lightning.checks import build
from pkd_lightning.cli import load_config
from pkd_lightning.cost import total_macs
from pkd_lightning.data.module import DataConfig, DataModule
from pkd_lightning.earlier import following, reads
from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.evaluate import ExitCurves, hardware, versions
from pkd_lightning.finish import config_of
from pkd_lightning.fitting import predict
from pkd_lightning.prefixes import mix
from pkd_lightning.pretrained import load
from pkd_lightning.reporting import style
from pkd_lightning.reporting.exits import RULES, Curves, Point, curves_of, draw_exits, exit_points
from pkd_lightning.reporting.load import load_run

RESULTS, DOCUMENT, FIGURE = DOCS / "exits.json", DOCS / "inference.md", DOCS / "exits.png"
SLOT = re.compile(r"(<!-- exits: (\w+) -->\n).*?(<!-- end of exits -->)", re.DOTALL)
PRETRAINED = "mnist_best, pretrained"
SMALL = (0.05, 0.1, 0.15, 0.25)  # budgets at which rules are compared: from there on all are as good as everything
GOAL_BUDGET, GOAL_POINTS = 0.25, 0.2
Row = dict[str, Any]


# ---------------------------------------------------------------------------------- measuring


def measured(name: str, ensemble: ProgressiveEnsemble, data: DataModule, teacher: Row, seed: int) -> Row:
    """Students, prefixes and early exits of an ensemble, in the form of results.json."""
    cpu, shape = torch.device("cpu"), data.task.input_shape
    labels = data.labels[data.test.start : data.test.stop]

    def accuracy(logits: torch.Tensor) -> float:
        return float((logits.argmax(-1) == labels).double().mean())

    rounds: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        exits, prefix, cost = ExitCurves(data, cpu, Path(folder)), None, 0
        for t, (member, scales) in enumerate(zip(ensemble.members, ensemble.scales, strict=True)):
            asked: nn.Module = following(member, list(ensemble.members)[:t])
            logits = predict(asked, data, data.test, cpu)
            prefix = mix(prefix, logits, scales)
            macs = total_macs(asked, shape)
            cost = macs if reads(member) else cost + macs
            exits.ask(asked, scales)
            exits.add(prefix, cost)
            rounds.append({"macs_total": macs, "accuracy": accuracy(logits), "prefix_accuracy": accuracy(prefix)})
        found = exits.results(seed)["exits"]
    for rule in found["rules"].values():
        for point in (*rule["budgeted"], *rule["one_threshold"]):
            del point["thresholds"]  # of no use without the students
    sizes = {"validation": len(data.validation), "test": len(data.test)}
    return {"ensemble": name, "seed": seed, "sizes": sizes, "teacher": teacher, "rounds": rounds, "exits": found}


def of_pretrained() -> Row:
    """The pretrained MNIST ensemble, on the split that `mnist_best` was trained with."""
    data = DataModule(build(DataConfig, options(load_config("experiment=mnist_best", "data.copies=0").data)))
    ensemble, teacher = load("mnist")
    logits = predict(teacher, data, data.test, torch.device("cpu"))
    right = logits.argmax(-1) == data.labels[data.test.start : data.test.stop]
    row = {"accuracy": float(right.double().mean()), "macs_total": total_macs(teacher, data.task.input_shape)}
    return measured(PRETRAINED, ensemble, data, row, 0)


def of_run(run: Path) -> Row:
    """The ensemble of a finished run."""
    results, config = load_run(run).results, config_of(run.resolve())
    name = f"{results['experiment']}, {results['objective']}, {results['combine']}"
    teacher = {key: results["teacher"][key] for key in ("accuracy", "macs_total")}
    data = DataModule(build(DataConfig, options(config.data)))
    found = measured(name, ProgressiveEnsemble.load(run), data, teacher, int(results["seed"]))
    if abs(found["rounds"][-1]["prefix_accuracy"] - results["ensemble"]["accuracy"]) > 1e-3:
        raise SystemExit(f"error: {run}: the ensemble has another accuracy here than in its results.json")
    return found


# ---------------------------------------------------------------------------------- tables


def full(row: Row) -> float:
    """Test accuracy of the whole ensemble in %."""
    return 100 * float(row["rounds"][-1]["prefix_accuracy"])


def spread(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """Mean, and standard deviation where there are several."""
    mean = f"{round(statistics.mean(values), digits) + 0.0:{sign}.{digits}f}"  # no -0.00
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def accuracies(rows: Sequence[Row]) -> str:
    """A line a rule: at each budget the test accuracy, and what share of the MACs the test images took."""
    budgets = rows[0]["exits"]["budgets"]
    costs = [row["exits"]["prefix_macs"] for row in rows]
    lines = []
    for rule, (label, *_) in RULES.items():
        cells = [label]
        for budget in budgets:
            points = [found[budget] for found in (exit_points(row, rule) for row in rows) if budget in found]
            shares = [point.macs / macs[-1] for point, macs in zip(points, costs, strict=False)]
            whole = len(points) == len(rows)  # or some seeds cannot meet it
            cells.append(_cell([point.accuracy for point in points], shares) if whole else "n/a")
        lines.append(cells)
    fixed = ["largest prefix within it"]
    for budget in budgets:
        counts = [sum(macs <= budget * cost[-1] for macs in cost) for cost in costs]
        if 0 in counts:
            fixed.append("n/a")
            continue
        within = [row["rounds"][count - 1]["prefix_accuracy"] for row, count in zip(rows, counts, strict=True)]
        fixed.append(_cell(within, [cost[count - 1] / cost[-1] for cost, count in zip(costs, counts, strict=True)]))
    head = ["budget", *(f"{100 * budget:.0f}%" for budget in budgets)]
    whole = spread([full(row) for row in rows])
    teacher = spread([100 * row["teacher"]["accuracy"] for row in rows[:: len(rows)]])
    cost = 100 * statistics.mean(row["teacher"]["macs_total"] / macs[-1] for row, macs in zip(rows, costs, strict=True))
    seeds = f"{len(rows)} seeds, " if len(rows) > 1 else ""
    sizes = rows[0]["sizes"]
    note = (
        f"{seeds}{sizes['validation']:,} validation and {sizes['test']:,} test images. The whole ensemble: {whole}. "
        f"The teacher{' of the first seed' if len(rows) > 1 else ''}: {teacher}, at {cost:.0f}% of the ensemble's MACs."
    )
    return markdown(head, [*lines, fixed]) + f"\n{note}\n"


def _cell(accuracy: Sequence[float], share: Sequence[float]) -> str:
    return f"{spread([100 * value for value in accuracy])} ({100 * statistics.mean(share):.0f})"


def winners(groups: Mapping[str, Sequence[Row]]) -> str:
    """A line an ensemble: each rule against maximum probability, over the small budgets, seed by seed."""
    head = ["ensemble", *(label for rule, (label, *_) in RULES.items() if rule != "maximum")]
    lines = []
    for name, rows in groups.items():
        cells = [name]
        for rule in list(RULES)[1:]:
            differences = []
            for row in rows:
                one, other = exit_points(row, rule), exit_points(row, "maximum")
                both = [budget for budget in SMALL if budget in one and budget in other]
                differences.append(statistics.mean(100 * (one[b].accuracy - other[b].accuracy) for b in both))
            cells.append(spread(differences, sign="+"))
        lines.append(cells)
    return markdown(head, lines)


def goal(groups: Mapping[str, Sequence[Row]]) -> str:
    """A line an ensemble: points below the whole ensemble at a quarter of its MACs."""
    lines = []
    for name, rows in groups.items():
        cells = [name]
        for rule in RULES:
            points = [exit_points(row, rule)[GOAL_BUDGET] for row in rows]
            cells.append(
                spread([100 * point.accuracy - full(row) for point, row in zip(points, rows, strict=True)], sign="+")
            )
        lines.append(cells)
    return markdown(["ensemble", *(label for label, *_ in RULES.values())], lines)


def grouped(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by ensemble, each in the order of seeds."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        groups.setdefault(row["ensemble"], []).append(row)
    return {name: groups[name] for name in sorted(groups, key=lambda name: (name != PRETRAINED, name))}


def slots(rows: Sequence[Row]) -> dict[str, str]:
    """The text of each slot of the document."""
    groups = grouped(rows)
    tables = {slug(name): f"**{name}**\n\n{accuracies(found)}" for name, found in groups.items()}
    return {**tables, "goal": goal(groups), "winners": winners(groups)}


def slug(name: str) -> str:
    return re.sub(r"\W+", "_", name)


def fill(text: str, rows: Sequence[Row]) -> str:
    """`text` with every table written anew."""
    tables = slots(rows)
    return SLOT.sub(lambda slot: slot[1] + tables[slot[2]] + slot[3], text)


def mean_curves(rows: Sequence[Row]) -> Curves:
    """The means over seeds of what the figure shows."""

    def mean(points: Sequence[Point]) -> Point:
        return Point(*(statistics.mean(values) for values in zip(*points, strict=True)))

    each = [curves for curves in map(curves_of, rows) if curves is not None]
    return Curves(
        {rule: [mean(points) for points in zip(*(one.rules[rule] for one in each), strict=False)] for rule in RULES},
        [mean(points) for points in zip(*(one.prefixes for one in each), strict=True)],
        [mean(points) for points in zip(*(one.students for one in each), strict=True)],
        mean([one.teacher for one in each]),
    )


def draw(rows: Sequence[Row], file: Path) -> None:
    """A panel an ensemble."""
    groups = grouped(rows)
    with style.styled():
        lines = math.ceil(len(groups) / 2)
        figure = style.new_figure(3.6 * lines + 0.6, 2 * style.WIDTH)
        panels = list(figure.subplots(lines, 2, squeeze=False).flat)
        for axes, (name, found) in zip(panels, groups.items(), strict=False):
            draw_exits(axes, mean_curves(found))
            axes.set_title(name, loc="left", fontweight="bold")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        for axes in panels[len(groups) :]:
            axes.set_visible(False)
        style.save_png(figure, file, "Early exit: test error against mean compute")


def main(arguments: list[str] | None = None) -> None:
    """Measure, then write the tables and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="directories of finished runs")
    parser.add_argument("--tables", action="store_true", help="measure nothing; from docs/exits.json")
    given = parser.parse_args(arguments)
    if not given.tables:
        torch.set_num_threads(1)
        rows = [of_pretrained(), *map(of_run, given.runs)]
        content = {"hardware": hardware(), "versions": versions(), "rows": rows}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    DOCUMENT.write_text(fill(DOCUMENT.read_text(), stored()))
    draw(stored(), FIGURE)


def stored() -> list[Row]:
    """The rows that the tables are made of."""
    rows: list[Row] = json.loads(RESULTS.read_text())["rows"]
    return rows


if __name__ == "__main__":
    main()
