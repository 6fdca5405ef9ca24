"""The tables of the READMEs, made from the studies' results files; `experiments.readme` puts them there."""

import fnmatch
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from experiments.plan import load_study
from experiments.study import collected
from pkd_lightning.boosting.peers import STAGE as PEERS
from pkd_lightning.errors import RunError
from pkd_lightning.reporting.exits import RULES, exit_points, prefix_within
from pkd_lightning.reporting.load import COST_KEYS, read_metrics
from pkd_lightning.reporting.values import condition_counts, prefix_cost
from pkd_lightning.results import OBJECTIVE, SHARE

ROOT = Path(__file__).parent.parent
Results = dict[str, Any]
Runs = Mapping[str, list[Results]]  # a run's name to its results, one a seed


@dataclass(frozen=True)
class Published:
    """What Mamba-PKD (arXiv 2503.01727) publishes of a data set, and what we set out for within its budgets.

    Attributes:
        students: accuracies in percent.
        flops: of the students, as the paper counts them.
        teacher: accuracy.
        ensemble: accuracy.
        teacher_flops: as the paper counts them.
        goals_alone: accuracies of single students.
        goals_prefix: of the first t together.
        goal_teacher: of the teacher.
    """

    students: tuple[float, ...]
    flops: tuple[int, ...]
    teacher: float
    ensemble: float
    teacher_flops: int
    goals_alone: tuple[float, ...]
    goals_prefix: tuple[float, ...]
    goal_teacher: float


PUBLISHED = {
    "mnist": Published(  # Table 1; its text says 63% of the first student, its abstract 72%
        students=(60, 76, 84, 88, 91, 93, 98),
        flops=(686, 1_372, 2_744, 5_096, 7_448, 7_448, 51_744),
        teacher=98,
        ensemble=98,
        teacher_flops=95_648,  # by the formula that gives the students'; printed: 94,684
        goals_alone=(93.5, 96.0, 97.8, 98.4, 98.4, 98.7, 99.2),
        goals_prefix=(93.5, 97.0, 98.3, 98.8, 99.0, 99.2, 99.5),
        goal_teacher=99.5,
    ),
    "cifar10": Published(  # Table 2
        students=(50, 65, 73, 78, 81, 84, 86),
        flops=(119_506, 206_080, 351_560, 405_304, 420_202, 430_340, 450_106),
        teacher=87,
        ensemble=86,
        teacher_flops=2_390_016,
        goals_alone=(82.0, 85.0, 87.0, 87.5, 88.0, 88.0, 89.0),
        goals_prefix=(82.0, 86.5, 88.5, 89.5, 90.0, 90.5, 91.0),
        goal_teacher=92.0,
    ),
}

HEADLINE = {"MNIST": ("mnist_best", "anchored"), "CIFAR-10": ("cifar10_best", "anchored")}  # study and run
FLOPS = "FLOPs, counted as in the paper"  # heads of columns
COST_TOGETHER = "parameters / MACs together, % of the teacher's"


def load(study: Path) -> Runs:
    """The collected results of a study, by run in the order of its study.yaml, and by seed; not those not yet there.

    Beside what a results file holds, `metrics` are the lines of the epochs, where the run keeps them.

    Raises:
        RunError: where results were made with other overrides than those of study.yaml.
    """
    found: dict[str, list[Results]] = {}
    for job in load_study(study).jobs:
        results = collected(job)
        if results is not None:
            metrics = read_metrics(job.kept / "metrics.jsonl")[0]
            found.setdefault(job.run.name, []).append({**results, "metrics": metrics})
    return found


def chosen(study: str, names: Sequence[str], mean: bool = True) -> Runs:
    """The results of the named runs of a study, or of all; a name may be a pattern, `weigh_*`.

    Raises:
        RunError: where there are none of a run; for a `mean` over its seeds, also where they have different students.
    """
    runs = load(ROOT / "experiments" / study)
    every = [run.name for run in load_study(ROOT / "experiments" / study).runs]
    names = [name for pattern in names for name in (fnmatch.filter(every, pattern) or [pattern])]
    missing = [name for name in names if name not in runs] if names else [] if runs else ["any run"]
    if missing:
        raise RunError(f"experiments/{study}: no results of {', '.join(missing)}; make study STUDY={study}")
    for name in (names or runs) if mean else ():
        models = {str([[row[key] for key in COST_KEYS] for row in run["rounds"]]) for run in runs[name]}
        if len(models) > 1:
            raise RunError(f"experiments/{study}: the seeds of {name} differ in the number or cost of their students")
    return {name: runs[name] for name in names} if names else runs


def every_study() -> Runs:
    """By the name of the study, all its results; not a study without any."""
    folders = sorted(path.parent for path in (ROOT / "experiments").glob("*/study.yaml"))
    studies = {folder.name: [run for seeds in load(folder).values() for run in seeds] for folder in folders}
    return {name: runs for name, runs in studies.items() if runs}


def only(runs: Runs) -> list[Results]:
    """The results of the one run that a table is made of; RunError where there are more."""
    if len(runs) > 1:
        raise RunError(f"a table of one run, but {', '.join(runs)} are named")
    return next(iter(runs.values()))


def percent(values: Sequence[float], digits: int = 1, sign: str = "-") -> str:
    """Mean and standard deviation in percent; `sign="+"` for a difference."""
    mean = f"{100 * statistics.mean(values):{sign}z.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(re.sub(r"\|  (?=\|)", "| ", f"| {' | '.join(map(str, line))} |") for line in lines)


def per_round(runs: list[Results], key: str) -> list[list[float]]:
    """The values of `key`, a list over the seeds for each round."""
    return [list(values) for values in zip(*([row[key] for row in run["rounds"]] for run in runs), strict=True)]


def of_teacher(runs: list[Results], key: str) -> list[float]:
    """The teacher's values of `key` over the seeds; one value where all of them loaded the same teacher."""
    values = [run["teacher"][key] for run in runs]
    loaded = not any(run["wall_seconds"]["teacher"] for run in runs)
    return values[:1] if loaded and len(set(values)) == 1 else values


def worst_prefix(results: Results) -> float:
    """The most by which a prefix falls short of its best member, in fractions of 1; at most 0 where none does."""
    rounds = results["rounds"]
    return max(
        max(row["accuracy"] for row in rounds[: t + 1]) - rounds[t]["prefix_accuracy"] for t in range(len(rounds))
    )


def cost_together(results: Results) -> list[str]:
    """For each prefix its parameters and multiply-accumulates, in percent of the teacher's."""
    shares = [
        [f"{100 * total / results['teacher'][key]:.0f}" for total in prefix_cost(results, key)]
        for key in ("params", "macs_total")
    ]
    return [" / ".join(pair) for pair in zip(*shares, strict=True)]


def teacher_seconds(results: Results) -> float:
    """What its training took; 0 where there is none."""
    return results["wall_seconds"]["teacher"] or 0.0


def students_seconds(results: Results) -> float:
    """What the training of its students took; 0 for those of another run."""
    seconds = zip(results["wall_seconds"]["rounds"], results["rounds"], strict=True)
    return sum(own for own, row in seconds if "from" not in row)


def core_hours(results: list[Results]) -> float:
    """The wall time of all `results`, times their threads, in hours; that of a teacher which runs share counts once."""
    teachers = {teacher_seconds(run): run["hardware"]["threads"] for run in results}
    others = [(run["wall_seconds"]["total"] - teacher_seconds(run)) * run["hardware"]["threads"] for run in results]
    return (sum(seconds * threads for seconds, threads in teachers.items()) + sum(others)) / 3600


def spent(results: list[Results], digits: int) -> str:
    """Hours of one core, and minutes of a GPU where some of `results` had one."""
    on_gpu = [run for run in results if run["hardware"].get("gpu")]
    minutes = sum(run["wall_seconds"]["total"] for run in on_gpu) / 60
    hours = core_hours([run for run in results if not run["hardware"].get("gpu")])
    return f"{hours:.{digits}f}" + (f", and {minutes:.0f} min of a GPU" if on_gpu else "")


def students(runs: Runs) -> str:
    """One seed of one run, the first: a row a student, then the teacher."""
    run = only(runs)[0]
    teacher = run["teacher"]
    rows = []
    totals = {key: prefix_cost(run, key) for key in ("params", "macs_total", "flops_published")}
    for t, row in enumerate(run["rounds"]):
        cost = [f"{values[t]:,.0f} ({100 * values[t] / teacher[key]:.1f}%)" for key, values in totals.items()]
        accuracies = [f"{100 * row[name]:.1f}%" for name in ("accuracy", "prefix_accuracy", "prefix_agreement")]
        rows.append([row["round"] + 1, *accuracies, *cost])
    rows.append(["teacher", f"{100 * teacher['accuracy']:.1f}%", "", "", *(f"{teacher[name]:,}" for name in totals)])
    head = ["students", "alone", "together", "same answer as the teacher", "parameters together", "MACs together"]
    return table([*head, "published FLOPs together"], rows)


def seed_by_seed(runs: Runs) -> str:
    """A row a run and seed, whatever students each has: the ensemble, and why no student follows."""
    rows = [
        [
            name,
            run["seed"],
            len(run["rounds"]),
            percent([run["ensemble"]["accuracy"]], 2),
            f"{run['ensemble']['nll']:.3f}",
            run["stop_reason"],
        ]
        for name, seeds in runs.items()
        for run in seeds
    ]
    return table(["run", "seed", "students", "all together", "cross-entropy", "ended by"], rows)


def summary(runs: Runs) -> str:
    """A row a run, mean and standard deviation over its seeds."""
    rows = []
    for seeds in runs.values():
        met, later = (sum(counts) for counts in zip(*map(condition_counts, seeds), strict=True))
        rows.append(
            [
                f"{seeds[0]['objective']}, {seeds[0]['combine']}",
                len(seeds),
                percent(of_teacher(seeds, "accuracy")),
                percent([run["ensemble"]["accuracy"] for run in seeds]),
                percent([run["rounds"][-1]["accuracy"] for run in seeds]),
                f"{100 * max(worst_prefix(run) for run in seeds):.1f} points",
                f"{met} of {later}",
                f"{statistics.median(run['wall_seconds']['total'] for run in seeds):.0f}",
            ]
        )
    head = ["objective, combination", "seeds", "teacher", "ensemble", "last student alone"]
    head += ["prefix behind its best member, at most", "rounds after the first that met the condition"]
    return table([*head, "seconds a run"], rows)


def budgets(runs: Runs) -> str:
    """One run over its seeds against the budgets of the paper's students and the goals we set: a row a student."""
    seeds = only(runs)
    published = PUBLISHED[seeds[0]["dataset"]]
    folder = ROOT / "experiments" / f"{seeds[0]['dataset']}_best"
    limits = yaml.safe_load((folder / "search.yaml").read_text())["rungs"]
    costs = {
        key: [values[0] for values in per_round(seeds, key)] for key in ("params", "macs_total", "flops_published")
    }
    rows, together = [], cost_together(seeds[0])
    for t, (alone, prefix) in enumerate(
        zip(per_round(seeds, "accuracy"), per_round(seeds, "prefix_accuracy"), strict=True)
    ):
        limit = limits[f"student-{t + 1}"]
        cost = [f"{costs['params'][t]:,} of {limit['params']:,}", f"{costs['macs_total'][t]:,} of {limit['macs']:,}"]
        rows.append(
            [
                t + 1,
                *cost,
                f"{costs['flops_published'][t]:,} against {published.flops[t]:,}",
                published.students[t],
                published.goals_alone[t],
                percent(alone, 2),
                published.goals_prefix[t],
                percent(prefix, 2),
                together[t],
            ]
        )
    teacher, limit = seeds[0]["teacher"], limits["teacher"]
    cost = [f"{teacher['params']:,} of {limit['params']:,}", f"{teacher['macs_total']:,} of {limit['macs']:,}"]
    accuracy = percent(of_teacher(seeds, "accuracy"), 2)
    cost.append(f"{teacher['flops_published']:,} against {published.teacher_flops:,}")
    rows.append(["teacher", *cost, published.teacher, published.goal_teacher, accuracy, "", "", ""])
    head = ["student", "parameters", "MACs", FLOPS, "paper", "goal, alone"]
    head += [alone_over(seeds), "goal, together", "first t together", COST_TOGETHER]
    return table(head, rows)


def alone_over(seeds: list[Results]) -> str:
    """The head of a column of single students."""
    return f"alone ({len(seeds)} seed{'s' * (len(seeds) > 1)})"


def headline(runs: Runs) -> str:
    """Our students on both data sets of the paper, beside its accuracies: a row a student, as short as it can be."""
    head, columns = ["student"], [[*range(1, 8), "teacher"]]
    for name, (study, run) in HEADLINE.items():
        seeds = chosen(study, [run])[run]
        published, teacher = PUBLISHED[seeds[0]["dataset"]], seeds[0]["teacher"]
        for title, key in (("parameters", "params"), ("MACs", "macs_total")):
            head.append(f"{name}: {title}")
            columns.append([f"{row[key]:,}" for row in (*seeds[0]["rounds"], teacher)])
        head += ["Mamba-PKD, as published", alone_over(seeds), "first t together"]
        columns.append([f"{value}%" for value in (*published.students, published.teacher)])
        alone, prefixes = (per_round(seeds, key) for key in ("accuracy", "prefix_accuracy"))
        columns.append([f"{percent(values, 2)}%" for values in (*alone, of_teacher(seeds, "accuracy"))])
        columns.append([*(f"{percent(values, 2)}%" for values in prefixes), ""])
    return table(head, list(zip(*columns, strict=True)))


def paper(runs: Runs) -> str:
    """One run of the paper's architectures beside the paper's table: a row a student."""
    seeds = only(runs)
    published = PUBLISHED[seeds[0]["dataset"]]
    rows = []
    for t, row in enumerate(seeds[0]["rounds"]):
        edges = "by definition" if t == 0 else ", ".join(
            f"{run['rounds'][t]['edges']['satisfied']} of {run['rounds'][t]['edges']['classes']}" for run in seeds
        )  # fmt: skip
        rows.append(
            [
                t + 1,
                f"{row['params']:,}",
                f"{row['flops_published']:,}",
                f"{row['macs_total']:,}",
                published.students[t],
                percent([run["rounds"][t]["accuracy"] for run in seeds]),
                percent([run["rounds"][t]["prefix_accuracy"] for run in seeds]),
                edges,
                ", ".join(str(run["rounds"][t]["epochs"]) for run in seeds),
            ]
        )
    keys = ("params", "flops_published", "macs_total")
    if len(rows) == len(published.students):
        cost = [f"{prefix_cost(seeds[0], key)[-1]:,.0f}" for key in keys]
        rows.append(["all seven", *cost, published.ensemble, "", rows[-1][6], "", ""])
    cost = [f"{seeds[0]['teacher'][key]:,}" for key in keys]
    rows.append(["teacher", *cost, published.teacher, percent(of_teacher(seeds, "accuracy")), "", "", ""])
    head = ["student", "parameters", "published FLOPs", "total MACs", "accuracy in the paper", "alone"]
    return table([*head, "first t together", "edges above 0", "epochs"], rows)


def readings(runs: Runs) -> str:
    """A row a run: in how many rounds after the first, over its seeds, the condition and the ensemble's promise held.

    A prefix is ahead where it is better than its best member, by more than a hundredth of a point.
    """
    rows = []
    for name, seeds in runs.items():
        later = [row for run in seeds for row in run["rounds"][1:]]
        ahead = [row["prefix_accuracy"] - best for run in seeds for row, best in after_first(run)]
        rows.append(
            [
                name,
                len(seeds),
                ", ".join(dict.fromkeys(str(len(run["rounds"])) for run in seeds)),
                f"{sum(row['edges']['satisfied'] == row['edges']['classes'] for row in later)} of {len(later)}",
                f"{sum(row['edges']['satisfied'] == 0 for row in later)} of {len(later)}",
                f"{sum(value > 1e-4 for value in ahead)} of {len(later)}",
                f"{100 * min(ahead):+.1f} to {100 * max(ahead):+.1f}" if ahead else "",
                percent([run["ensemble"]["accuracy"] for run in seeds]),
                percent([max(row["accuracy"] for row in run["rounds"]) for run in seeds]),
            ]
        )
    head = ["run", "seeds", "students", "condition met in all classes, of the rounds after the first", "in no class"]
    head += ["prefix ahead of its best member", "by (points)", "ensemble", "best student"]
    return table(head, rows)


def after_first(results: Results) -> list[tuple[dict[str, Any], float]]:
    """Each round after the first, and the accuracy of the best student so far."""
    best = list(accumulate((row["accuracy"] for row in results["rounds"]), max))
    return list(zip(results["rounds"][1:], best[1:], strict=True))


def rounds(runs: Runs) -> str:
    """Two rows a run: each student alone, and each prefix; mean and standard deviation over the seeds.

    To a hundredth of a point where any prefix is above 99%.
    """
    rows = []
    most = max(len(seeds[0]["rounds"]) for seeds in runs.values())
    best = max(row["prefix_accuracy"] for seeds in runs.values() for run in seeds for row in run["rounds"])
    digits = 2 if best > 0.99 else 1
    for name, seeds in runs.items():
        for label, key in (("alone", "accuracy"), ("together", "prefix_accuracy")):
            cells = [percent(values, digits) for values in per_round(seeds, key)]
            rows.append([name, len(seeds), label, *cells, *[""] * (most - len(cells))])
    return table(["run", "seeds", "", *range(1, most + 1)], rows)


def differences(runs: Runs) -> str:
    """Two rows a run but the first: each student and each prefix, less those of the first run, in points.

    Taken seed by seed, of the rounds that both have; mean and standard deviation over the seeds that both have.
    """
    (first, reference), *others = runs.items()
    rows, count = [], len(reference[0]["rounds"])
    for name, seeds in others:
        pairs = [(run, other) for run in seeds for other in reference if run["seed"] == other["seed"]]
        for label, key in (("alone", "accuracy"), ("together", "prefix_accuracy")):
            by_pair = [
                [row[key] - base[key] for row, base in zip(run["rounds"], other["rounds"], strict=False)]
                for run, other in pairs
            ]
            cells = [percent(values, 2, "+") for values in zip(*by_pair, strict=True)]
            rows.append([name, label, *cells, *[""] * (count - len(cells))])
    return table([f"against {first}", "", *range(1, count + 1)], rows)


def first_students(runs: Runs) -> str:
    """A row a run: its first student."""
    rows = [
        [name, len(seeds), seeds[0]["rounds"][0]["epochs"], percent(per_round(seeds, "accuracy")[0], 2)]
        for name, seeds in runs.items()
    ]
    return table(["run", "seeds", "epochs", "accuracy"], rows)


def teacher_epochs(runs: list[Results]) -> list[str]:
    """On the validation part: a teacher's epoch of least loss, of how many, its accuracy, and that of the last epoch.

    Empty where there are several seeds, or no epochs are kept.
    """
    epochs = epochs_of(runs[0], "teacher", 0) if len(runs) == 1 else []
    if not epochs:
        return ["", "", ""]
    best = min(epochs, key=lambda row: row["validation_loss"])
    accuracies = [f"{100 * row['validation_accuracy']:.2f}" for row in (best, epochs[-1])]
    return [f"{best['epoch'] + 1} of {epochs[-1]['epoch'] + 1}", *accuracies]


def teachers(runs: Runs) -> str:
    """A row a run: its teacher."""
    rows = [
        [
            name,
            len(seeds),
            f"{statistics.median(map(teacher_seconds, seeds)):,.0f}",
            *teacher_epochs(seeds),
            percent(of_teacher(seeds, "accuracy"), 2),
            f"{statistics.mean(of_teacher(seeds, 'nll')):.3f}",
        ]
        for name, seeds in runs.items()
    ]
    head = ["run", "seeds", "seconds of training", "epoch of least validation loss", "validation accuracy then"]
    return table([*head, "after the last epoch", "test accuracy", "cross-entropy"], rows)


def gains(seeds: list[Results], reference: list[Results], alone: bool = False) -> list[float]:
    """Accuracies of the ensembles, or of the last students `alone`, less a reference's: of each seed that both have."""

    def accuracy(run: Results) -> float:
        return float((run["rounds"][-1] if alone else run["ensemble"])["accuracy"])

    base = {run["seed"]: accuracy(run) for run in reference}
    return [accuracy(run) - base[run["seed"]] for run in seeds if run["seed"] in base]


def gained(differences: Sequence[float]) -> list[str]:
    """Two cells of `gains`, in points: mean and standard deviation, then seed by seed; empty without any."""
    mean = percent(differences, 2, "+") if differences else ""
    return [mean, " ".join(f"{100 * value:+.1f}" for value in differences)]


def ablation(runs: Runs) -> str:
    """A row a run: the ensemble, its parts and what it costs; mean and standard deviation over the seeds.

    The difference to the first run is taken seed by seed, over the seeds that both have: runs of one seed share the
    order of images and, where their architectures are the same, initialisation.
    """
    rows = []
    first, reference = next(iter(runs.items()))
    for name, seeds in runs.items():
        prefixes = per_round(seeds, "prefix_accuracy")
        middle = percent(prefixes[2], 2) if len(prefixes) > 2 else ""
        met, later = (sum(counts) for counts in zip(*map(condition_counts, seeds), strict=True))
        differences = [] if name == first else gains(seeds, reference)
        rows.append(
            [
                name,
                len(seeds),
                middle,
                percent([run["ensemble"]["accuracy"] for run in seeds], 2),
                *gained(differences),
                f"{statistics.mean(run['ensemble']['nll'] for run in seeds):.3f}",
                percent([run["rounds"][-1]["accuracy"] for run in seeds], 2),
                f"{100 * max(worst_prefix(run) for run in seeds):.2f}",
                f"{met} of {later}" if later else "",
                f"{seeds[0]['ensemble']['params']:,}",
                f"{seeds[0]['ensemble']['macs_total']:,}",
            ]
        )
    head = ["run", "seeds", "first three together", "all together", f"against {first}"]
    head += ["seed by seed", "cross-entropy", "last student alone", "prefix behind its best member, at most (points)"]
    head += ["rounds after the first that met the condition", "parameters", "total MACs"]
    return table(head, rows)


def last_round(results: Results) -> list[dict[str, Any]]:
    """The epochs of a run's last round, of the attempt that gave its student."""
    last = results["rounds"][-1]
    return epochs_of(results, f"round-{last['round']:02d}", last.get("attempt", last["attempts"] - 1))


def epochs_of(results: Results, stage: str, attempt: int) -> list[dict[str, Any]]:
    """The epochs of a fit, in their order; of lines of the same epoch, where it was resumed, the last."""
    rows = [row for row in results["metrics"] if (row["stage"], row["attempt"]) == (stage, attempt)]
    return list({row["epoch"]: row for row in rows}.values())


def fastest_epochs(runs: list[Results]) -> float:
    """Seconds of the fastest epoch of every fit of students, what other work lengthens least; the seeds' median.

    An epoch in which a run was resumed has a line more: the longer one counts.
    """
    found = []
    for run in runs:
        fits: dict[str, dict[tuple[int, int], float]] = {}
        for row in run["metrics"]:
            if row["stage"] == PEERS or row["stage"].startswith("round-"):
                epochs, key = fits.setdefault(row["stage"], {}), (row["attempt"], row["epoch"])
                epochs[key] = max(row["seconds"], epochs.get(key, 0.0))
        found.append(sum(min(epochs.values()) for epochs in fits.values()))
    return statistics.median(found)


def share_of_terms(results: Results) -> float:
    """What share of the gradient's norm the terms of knowledge have together, in the mean over the epochs."""
    key = f"{SHARE}{OBJECTIVE}"
    return 1 - statistics.mean(row[key] for row in last_round(results)) if key in last_round(results)[0] else 0.0


def weights(runs: Runs) -> str:
    """A row a family of runs FAMILY_FACTOR: accuracy on the validation part and share of the gradient, by factor."""
    found: dict[str, dict[str, Results]] = {}
    for name, seeds in runs.items():
        family, factor = name.removeprefix("weigh_").rsplit("_", 1)
        found.setdefault(family, {})[factor] = only({name: seeds})[0]
    factors = list(dict.fromkeys(factor for row in found.values() for factor in row))
    rows = []
    for family, row in found.items():
        cells = [weighed(row[factor]) if factor in row else "" for factor in factors]
        rows.append([family, *cells])
    return table(["", *factors], rows)


def weighed(results: Results) -> str:
    """Accuracy on the validation part, and the terms' share of the gradient where there are terms."""
    accuracy, share = 100 * results["rounds"][-1]["validation_accuracy"], share_of_terms(results)
    return f"{accuracy:.1f} ({share:.2f})" if share else f"{accuracy:.1f}"


def last_epochs(runs: Runs) -> str:
    """A row a run of one student: the last epoch, what choosing another would have shown, and the terms' pull.

    The difference to the first run is taken seed by seed, over the seeds that both have.
    """
    rows = []
    first, reference = next(iter(runs.items()))
    for name, seeds in runs.items():
        differences = [] if name == first else gains(seeds, reference, alone=True)
        courses = [[row["validation_accuracy"] for row in last_round(run)] for run in seeds]
        shares = [share_of_terms(run) for run in seeds]
        rows.append(
            [
                name,
                len(seeds),
                percent([run["rounds"][-1]["accuracy"] for run in seeds]),
                *gained(differences),
                percent([course[-1] for course in courses]),
                percent([max(course) for course in courses]),
                f"{statistics.mean(shares):.2f}" if any(shares) else "",
                f"{fastest_epochs(seeds):.1f}",
            ]
        )
    head = ["run", "seeds", "last epoch, test", f"against {first}", "seed by seed", "last epoch, validation"]
    head += ["best epoch, validation", "terms' share of the gradient", "fastest epoch (s)"]
    return table(head, rows)


def ladders(runs: Runs) -> str:
    """A row a run: its students alone, all together, and seed by seed against the first run that is named."""
    rows = []
    first, reference = next(iter(runs.items()))
    count = len(reference[0]["rounds"])
    for name, seeds in runs.items():
        differences = [] if name == first else gains(seeds, reference)
        rows.append(
            [
                name,
                len(seeds),
                *(percent(values) for values in per_round(seeds, "accuracy")),
                percent([run["ensemble"]["accuracy"] for run in seeds]),
                *gained(differences),
                f"{seeds[0]['ensemble']['params']:,}",
                f"{seeds[0]['ensemble']['macs_total']:,}",
                f"{fastest_epochs(seeds):.1f}",
            ]
        )
    alone = [f"{t + 1} alone" for t in range(count)]
    head = ["run", "seeds", *alone, "all together", f"against {first}", "seed by seed", "parameters", "total MACs"]
    return table([*head, "fastest epochs (s)"], rows)


def exits(runs: Runs) -> str:
    """One run over its seeds: a row a rule of early exits, a column a budget in percent of the whole ensemble's MACs.

    Last the largest prefix within each budget, and what the budgets are.
    """
    seeds = only(runs)
    points = {rule: [exit_points(run, rule) for run in seeds] for rule in RULES}
    points = {rule: found for rule, found in points.items() if all(found)}
    budgets = sorted(set.intersection(*(set(one) for found in points.values() for one in found)))
    rows = [
        [RULES[rule][0], *(percent([one[budget].accuracy for one in found], 2) for budget in budgets)]
        for rule, found in points.items()
    ]
    fixed = [[prefix_within(run, budget) for run in seeds] for budget in budgets]
    rows.append(["largest prefix within it", *("" if any(map(math.isnan, row)) else percent(row, 2) for row in fixed)])
    whole = seeds[0]["exits"]["prefix_macs"][-1]
    rows.append(["MACs of the budget", *(f"{budget * whole:,.0f}" for budget in budgets)])
    return table(["accuracy at a budget of", *(f"{100 * budget:.0f}%" for budget in budgets)], rows)


def time(runs: Runs) -> str:
    """A row a run: seconds of the teacher and of its own students, hours of one core of all seeds, and the machine."""
    rows: list[list[object]] = [
        [
            name,
            len(seeds),
            f"{statistics.median(map(teacher_seconds, seeds)):,.0f}",
            f"{statistics.median(map(students_seconds, seeds)):,.0f}",
            spent(seeds, 2),
            seeds[0]["hardware"]["threads"],
        ]
        for name, seeds in runs.items()
    ]
    total = spent([run for seeds in runs.values() for run in seeds], 2)
    rows.append(["all", sum(len(seeds) for seeds in runs.values()), "", "", total, ""])
    hardware = [run["hardware"] for seeds in runs.values() for run in seeds]
    machines = {
        ", ".join(filter(None, (machine.get("gpu"), machine["cpu"], f"{machine['cores']} cores")))
        for machine in hardware
    }
    head = ["run", "seeds", "teacher (s, median)", "students (s, median)", "hours of one core, all seeds"]
    return table([*head, f"threads a run ({'; '.join(sorted(machines))})"], rows)


def architectures(runs: Runs) -> str:
    """Which architectures the rows of the paper's Table 2 can be."""
    from experiments.cifar10_paper.rows import as_table  # it makes its table with `table`

    return as_table()


def published_teacher(runs: Runs) -> str:
    """What the teacher of Table 2 does as it is initialised, and what its training takes."""
    from experiments.cifar10_paper.teacher import as_table

    return as_table()


def what_teachers_tell(runs: Runs) -> str:
    """What the two teachers of the CIFAR-10 ablation answer on training and on test images."""
    from experiments.cifar10_ablation.teachers import as_table

    return as_table()


def hours(runs: Runs) -> str:
    """A row a run, or a study where the runs are those of `every_study`: hours of one core."""
    rows: list[list[object]] = [[name, len(results), spent(results, 1)] for name, results in runs.items()]
    every = [run for results in runs.values() for run in results]
    rows.append(["all", len(every), spent(every, 1)])
    return table(["study", "runs", "hours of one core"], rows)


TABLES: dict[str, Callable[[Runs], str]] = {
    function.__name__: function
    for function in (
        students,
        seed_by_seed,
        summary,
        headline,
        budgets,
        paper,
        readings,
        rounds,
        differences,
        first_students,
        teachers,
        ablation,
        weights,
        last_epochs,
        ladders,
        exits,
        time,
        architectures,
        published_teacher,
        what_teachers_tell,
        hours,
    )
}
