"""Tables of the READMEs, made from the studies' results files so that no figure is typed by hand.

    python -m experiments.tables                                  # rewrite the tables
    python -m experiments.tables --collect runs/sweep experiments/digits   # first take over the results of runs

A table stands between `<!-- table: STUDY NAME -->` and `<!-- end of table -->`.
"""

import argparse
import json
import re
import shutil
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SLOT = re.compile(r"(<!-- table: (\S+) (\S+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
OBJECTIVES = ("anchored", "additive", "published")


def load(study: Path) -> list[dict[str, Any]]:
    """The results of a study's runs, by objective and seed."""
    results = [json.loads(path.read_text()) for path in sorted((study / "results").glob("*.json"))]
    return sorted(results, key=lambda r: (OBJECTIVES.index(r["objective"]), r["seed"]))


def collect(runs: Path, study: Path) -> None:
    """Copy the results of every finished run below `runs` into the study, and the figures of its first anchored run."""
    target = study / "results"
    target.mkdir(parents=True, exist_ok=True)
    for done in sorted(runs.rglob("DONE")):
        results = json.loads((done.parent / "results.json").read_text())
        shutil.copy(done.parent / "results.json", target / f"{results['objective']}-seed{results['seed']}.json")
        if (results["objective"], results["seed"]) == ("anchored", 0):
            for figure in ("accuracy_students.png", "cost.png"):
                shutil.copy(done.parent / "figures" / figure, study / figure)


def percent(values: list[float]) -> str:
    """Mean and standard deviation in percent."""
    mean = 100 * statistics.mean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {100 * statistics.stdev(values):.1f}"


def worst_prefix(results: dict[str, Any]) -> float:
    """The most by which a prefix falls short of its best member, in fractions of 1; at most 0 where none does."""
    rounds = results["rounds"]
    return max(
        max(row["accuracy"] for row in rounds[: t + 1]) - rounds[t]["prefix_accuracy"] for t in range(len(rounds))
    )


def students(results: list[dict[str, Any]]) -> str:
    """One run, the first: a row a student, then the teacher."""
    run = results[0]
    teacher = run["teacher"]
    lines = [
        "| students | alone | together | same answer as the teacher | parameters together | MACs together |"
        " published FLOPs together |",
        "|---|---|---|---|---|---|---|",
    ]
    totals = dict.fromkeys(("params", "macs_total", "flops_published"), 0)
    for row in run["rounds"]:
        totals = {name: value + row[name] for name, value in totals.items()}
        cost = " | ".join(f"{value:,} ({100 * value / teacher[name]:.1f}%)" for name, value in totals.items())
        lines.append(
            f"| {row['round'] + 1} | {100 * row['accuracy']:.1f}% | {100 * row['prefix_accuracy']:.1f}% |"
            f" {100 * row['prefix_agreement']:.1f}% | {cost} |"
        )
    cost = " | ".join(f"{teacher[name]:,}" for name in totals)
    lines.append(f"| teacher | {100 * teacher['accuracy']:.1f}% | | | {cost} |")
    return "\n".join(lines)


def summary(results: list[dict[str, Any]]) -> str:
    """A row an objective, mean and standard deviation over its seeds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for run in results:
        groups[run["objective"], run["combine"]].append(run)
    lines = [
        "| objective, combination | seeds | teacher | ensemble | last student alone | prefix behind its best member, at"
        " most | rounds after the first that met the condition | seconds a run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (objective, combine), runs in groups.items():
        later = [row for run in runs for row in run["rounds"][1:]]
        met = sum(row["edges"]["satisfied"] == row["edges"]["classes"] for row in later)
        seconds = [run["wall_seconds"]["total"] for run in runs]
        lines.append(
            f"| {objective}, {combine} | {len(runs)}"
            f" | {percent([run['teacher']['accuracy'] for run in runs])}"
            f" | {percent([run['ensemble']['accuracy'] for run in runs])}"
            f" | {percent([run['rounds'][-1]['accuracy'] for run in runs])}"
            f" | {100 * max(worst_prefix(run) for run in runs):.1f} points"
            f" | {met} of {len(later)} | {statistics.median(seconds):.0f} |"
        )
    return "\n".join(lines)


TABLES = {"students": students, "summary": summary}


def fill(text: str) -> str:
    """`text` with every table made anew."""

    def table(match: re.Match[str]) -> str:
        study, name = match[2], match[3]
        return f"{match[1]}{TABLES[name](load(ROOT / 'experiments' / study))}\n{match[5]}"

    return SLOT.sub(table, text)


def documents() -> list[Path]:
    """Every Markdown file with tables."""
    return [path for path in (ROOT / "README.md", *sorted((ROOT / "experiments").glob("*/README.md"))) if path.exists()]


def main() -> None:
    """Collect results where asked to, and rewrite the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", nargs=2, type=Path, metavar=("RUNS", "STUDY"))
    options = parser.parse_args()
    if options.collect:
        collect(*options.collect)
    for path in documents():
        path.write_text(fill(path.read_text()))


if __name__ == "__main__":
    main()
