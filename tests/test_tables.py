"""The tables and figures of the READMEs say what the results files say, and change with them."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments import figures, readme, tables
from pkd_lightning.errors import RunError

STUDY = "seeds: [0, 1]\nruns:\n  first: {}\n  second: {}\n  missing: {}\n"


def result(run: str, seed: int, accuracies: list[float], **cost: int) -> dict[str, Any]:
    """A results file of as many rounds as accuracies; the prefix is a point better than the student."""
    costs = {"params": 100, "macs_total": 5000, "flops_published": 70, **cost}
    rounds = [
        {"round": t, "accuracy": a, "prefix_accuracy": a + 0.01, "prefix_agreement": 0.5, "epochs": 3 + seed, **costs,
         "edges": {"satisfied": t, "classes": 2}}
        for t, a in enumerate(accuracies)
    ]  # fmt: skip
    return {
        "seed": seed,
        "dataset": "mnist",
        "objective": run,
        "combine": "mean",
        "teacher": {"accuracy": 0.9 + 0.02 * seed, "nll": 0.1, **costs},
        "rounds": rounds,
        "ensemble": {"accuracy": accuracies[-1] + 0.01, "nll": 0.2, **costs},
        "wall_seconds": {
            "teacher": 10.0 + 0.01 * seed + 0.001 * len(run),
            "rounds": [t + 1.0 for t in range(len(rounds))],
            "total": 14.0 + seed,
        },
        "hardware": {"cpu": "a processor", "cores": 2, "threads": 1},
        "study": {"run": run, "overrides": []},
    }


@pytest.fixture
def study(tmp_path, monkeypatch) -> Path:
    """Runs of two seeds each: `first` with 60 and 70%, then 80 and 90%; `second` one student of 50%."""
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    folder = tmp_path / "experiments" / "some"
    (folder / "results").mkdir(parents=True)
    (folder / "study.yaml").write_text(STUDY)
    for run, seed, accuracies in (
        ("second", 0, [0.5]), ("second", 1, [0.5]), ("first", 1, [0.8, 0.9]), ("first", 0, [0.6, 0.7])
    ):  # fmt: skip
        path = folder / "results" / f"{run}-seed{seed}.json"
        path.write_text(json.dumps(result(run, seed, accuracies)))
    return folder


@contextmanager
def changed(study: Path, name: str) -> Iterator[dict[str, Any]]:
    """The results of a job, written back as the block leaves them."""
    path = study / "results" / f"{name}.json"
    run = json.loads(path.read_text())
    yield run
    path.write_text(json.dumps(run))


def slot(name: str, runs: str = "") -> str:
    return readme.fill(f"before\n<!-- table: some {name}{runs} -->\nold\n<!-- end of table -->\nafter\n")


def test_runs_come_in_the_order_of_the_study_and_seeds_in_theirs(study):
    runs = tables.load(study)
    assert {name: [run["seed"] for run in seeds] for name, seeds in runs.items()} == {"first": [0, 1], "second": [0, 1]}
    assert list(runs) == ["first", "second"]


def test_a_slot_is_filled_and_what_is_around_it_stays(study):
    text = slot("rounds")
    assert text.startswith("before\n<!-- table: some rounds -->\n| run |")
    assert text.endswith("<!-- end of table -->\nafter\n")
    assert "old" not in text
    assert readme.fill(text) == text


def test_means_and_deviations_over_the_seeds(study):
    lines = slot("rounds", " first").splitlines()
    assert "| first | 2 | alone | 70.0 ± 14.1 | 80.0 ± 14.1 |" in lines
    assert "| first | 2 | together | 71.0 ± 14.1 | 81.0 ± 14.1 |" in lines
    assert not any("second" in line for line in lines)


def test_accuracies_near_one_hundred_percent_are_shown_to_a_hundredth_of_a_point(study):
    with changed(study, "first-seed1") as run:
        run["rounds"][1]["prefix_accuracy"] = 0.9912
    assert "| first | 2 | together | 71.00 ± 14.14 | 85.06 ± 19.88 |" in slot("rounds", " first").splitlines()
    assert "| second | 2 | together | 51.0 ± 0.0 |" in slot("rounds", " second").splitlines()


@pytest.mark.parametrize(
    "name", ["students", "summary", "rounds", "first_students", "teachers", "ablation", "time", "paper"]
)
def test_every_table_has_a_cell_for_each_column(study, name):
    lines = [line for line in slot(name, " first").splitlines() if line.startswith("|")]
    assert len(lines) > 2
    assert len({line.count("|") for line in lines}) == 1


def test_the_tables_against_the_paper_have_its_budgets_and_accuracies(study):
    for seed in (0, 1):
        path = study / "results" / f"first-seed{seed}.json"
        path.write_text(json.dumps(result("first", seed, [0.8 + 0.1 * seed] * 7)))
    best = study.parent / "mnist_best"
    best.mkdir()
    limits = {"macs": 6000}
    rungs = {f"student-{t}": {**limits, "params": 100 + t} for t in range(1, 8)} | {
        "teacher": {**limits, "params": 900}
    }
    (best / "search.yaml").write_text(yaml.safe_dump({"rungs": rungs}))
    lines = slot("budgets", " first").splitlines()
    cost = "| 2 | 100 of 102 | 5,000 of 6,000 | 70 against 1,372 | 76"
    line = f"{cost} | 96.0 | 85.00 ± 7.07 | 97.0 | 86.00 ± 7.07 | 200 / 200 |"
    assert line in lines
    assert "| teacher | 100 of 900 | 5,000 of 6,000 | 70 against 95,648 | 98 | 99.5 | 91.00 ± 1.41 | | | |" in lines


@pytest.fixture
def both(study) -> None:
    """The studies of the headline: two seeds of MNIST, one of CIFAR-10."""
    for name, accuracies in (("mnist", [0.8, 0.9]), ("cifar10", [0.5])):
        folder = study.parent / f"{name}_best"
        (folder / "results").mkdir(parents=True)
        (folder / "study.yaml").write_text("seeds: [0, 1]\nruns: {anchored: {}}\n")
        for seed, accuracy in enumerate(accuracies):
            run = {**result("anchored", seed, [accuracy] * 7, macs_total=100 * len(name)), "dataset": name}
            (folder / "results" / f"anchored-seed{seed}.json").write_text(json.dumps(run))


def test_the_headline_has_both_data_sets_side_by_side(both):
    lines = readme.fill("<!-- table: - headline -->\n<!-- end of table -->\n").splitlines()
    mnist, cifar = "100 | 500 | 76% | 85.00 ± 7.07% | 86.00 ± 7.07%", "100 | 700 | 65% | 50.00% | 51.00%"
    assert f"| 2 | {mnist} | {cifar} |" in lines
    assert "| teacher | 100 | 500 | 98% | 91.00 ± 1.41% | | 100 | 700 | 87% | 90.00% | |" in lines
    assert "alone (2 seeds)" in lines[1]
    assert "alone (1 seed)" in lines[1]
    mnist_axes, cifar_axes = figures.headline().axes
    assert mnist_axes.lines[1].get_ydata().tolist() == pytest.approx([15] * 7)
    assert cifar_axes.lines[1].get_ydata().tolist() == pytest.approx([50] * 7)
    assert cifar_axes.lines[2].get_ydata().tolist() == [50, 35, 27, 22, 19, 16, 14]
    assert [axes.get_xlabel().split(":")[0] for axes in (mnist_axes, cifar_axes)] == ["MNIST", "CIFAR-10"]


def test_all_seven_students_of_the_paper_have_a_row_of_their_sums(study):
    (study / "results" / "first-seed1.json").unlink()
    (study / "results" / "first-seed0.json").write_text(json.dumps(result("first", 0, [0.8] * 6 + [0.7])))
    lines = slot("paper", " first").splitlines()
    assert "| all seven | 700 | 490 | 35,000 | 98 | | 71.0 | | |" in lines
    (study / "results" / "first-seed0.json").write_text(json.dumps(result("first", 0, [0.8] * 6)))
    assert "all seven" not in slot("paper", " first")


def test_rounds_without_any_class_and_prefixes_behind_are_counted_over_the_seeds(study):
    for seed in (0, 1):
        with changed(study, f"first-seed{seed}") as run:
            run["rounds"][1]["edges"]["satisfied"] = 2 * seed
            run["rounds"][1]["prefix_accuracy"] = 0.7 + 0.3 * seed  # alone 0.7, 0.9
    row = "| first | 2 | 2 | 1 of 2 | 1 of 2 | 1 of 2 | +0.0 to +10.0 | 81.0 ± 14.1 | 80.0 ± 14.1 |"
    assert row in slot("readings", " first").splitlines()


def test_every_cell_of_a_row(study):
    """Numbers that differ from each other, so that no column can be taken for another."""
    with changed(study, "first-seed0") as run:
        rounds = run["rounds"][:1] * 3
        run["rounds"] = [{**row, "round": t} for t, row in enumerate(rounds)]
        for t, accuracy, prefix, met in ((0, 0.5, 0.5, 0), (1, 0.7, 0.62, 2), (2, 0.6, 0.8, 1)):
            run["rounds"][t] |= {
                "accuracy": accuracy,
                "prefix_accuracy": prefix,
                "edges": {"satisfied": met, "classes": 2},
            }
            run["rounds"][t] |= {
                "params": 10 * t + 1,
                "macs_total": 100 * t + 7,
                "flops_published": t + 3,
                "epochs": t + 4,
            }
        run["ensemble"] = {"accuracy": 0.8, "nll": 0.4, "params": 33, "macs_total": 321}
        run["teacher"] |= {"params": 50, "macs_total": 642, "flops_published": 24, "accuracy": 0.95}
    (study / "results" / "first-seed1.json").unlink()
    for name, row in {
        "summary": "| first, mean | 1 | 95.0 | 80.0 | 60.0 | 8.0 points | 1 of 2 | 14 |",
        "students": "| 3 | 60.0% | 80.0% | 50.0% | 33 (66.0%) | 321 (50.0%) | 12 (50.0%) |",
        "paper": "| 2 | 11 | 4 | 107 | 76 | 70.0 | 62.0 | 2 of 2 | 5 |",
        "readings": "| first | 1 | 3 | 1 of 2 | 0 of 2 | 1 of 2 | -8.0 to +10.0 | 80.0 | 70.0 |",
        "ablation": "| first | 1 | 80.00 | 80.00 | | | 0.400 | 60.00 | 8.00 | 1 of 2 | 33 | 321 |",
        "first_students": "| first | 1 | 4 | 50.00 |",
        "teachers": "| first | 1 | 10 | | | | 95.00 | 0.100 |",
    }.items():
        assert row in slot(name, " first").splitlines()


def test_differences_to_the_first_run_are_taken_seed_by_seed(study):
    """The ensembles of `first` are 71 and 91% good; those of `second` 2 and 4 points less."""
    for seed, accuracy in ((0, 0.69), (1, 0.87)):
        with changed(study, f"second-seed{seed}") as run:
            run["ensemble"]["accuracy"] = accuracy
    assert "| second | 2 | | 78.00 ± 12.73 | -3.00 ± 1.41 | -2.0 -4.0 | 0.200 | 50.00" in slot(
        "ablation", " first second"
    )
    assert "| first | 2 | | 81.00 ± 14.14 | +3.00 ± 1.41 | +2.0 +4.0 | 0.200 | 80.00" in slot(
        "ablation", " second first"
    )
    (study / "results" / "first-seed1.json").unlink()
    assert "| second | 2 | | 78.00 ± 12.73 | -2.00 | -2.0 | 0.200 | 50.00" in slot("ablation", " first second")


def test_differences_of_every_round_are_taken_seed_by_seed(study):
    """The students of `first` are 60 and 70, 80 and 90% good, those of `second` 1 and 3, 2 and 8 points more."""
    for seed, accuracies in ((0, [0.61, 0.72]), (1, [0.83, 0.98])):
        (study / "results" / f"second-seed{seed}.json").write_text(json.dumps(result("second", seed, accuracies)))
    with changed(study, "second-seed1") as run:
        run["rounds"][1]["prefix_accuracy"] = 0.91
    lines = slot("differences", " first second").splitlines()
    assert "| against first | | 1 | 2 |" in lines
    assert "| second | alone | +2.00 ± 1.41 | +5.00 ± 4.24 |" in lines
    assert "| second | together | +2.00 ± 1.41 | +1.00 ± 1.41 |" in lines
    for seed in (0, 1):
        with changed(study, f"second-seed{seed}") as run:
            del run["rounds"][1]
    assert "| second | alone | +2.00 ± 1.41 | |" in slot("differences", " first second").splitlines()
    lines = slot("differences", " second first").splitlines()
    assert "| against second | | 1 |" in lines
    assert "| first | alone | -2.00 ± 1.41 |" in lines


def test_a_teacher_that_all_seeds_loaded_has_no_spread(study):
    for seed in (0, 1):
        with changed(study, f"second-seed{seed}") as run:
            run["teacher"]["accuracy"], run["wall_seconds"]["teacher"] = 0.99, 0.0
    assert "| second, mean | 2 | 99.0 | 51.0 ± 0.0 |" in slot("summary")


@pytest.mark.parametrize("key", ["params", "rounds"])
def test_seeds_of_different_models_are_not_averaged(key, study):
    with changed(study, "first-seed1") as run:
        run["rounds"] = run["rounds"][:1] if key == "rounds" else [{**row, "params": 101} for row in run["rounds"]]
    with pytest.raises(RunError, match="the seeds of first differ"):
        slot("summary")
    assert "second" in slot("summary", " second")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("<!-- table: some rounds -->\n\n# Prose\n<!-- table: some time -->\n<!-- end of table -->\n", "without its"),
        ("<!-- table: some time -->\n<!-- end of table -->\n<!-- end of table -->\n", "without its"),
        ("<!-- table: some tiem -->\n<!-- end of table -->\n", "no such table"),
        ("<!-- table: some budgets first second -->\n<!-- end of table -->\n", "a table of one run"),
    ],
)
def test_a_wrong_slot_is_an_error(text, fault, study):
    with pytest.raises(RunError, match=fault):
        readme.fill(text)


def test_seeds_with_different_students_have_no_mean_but_a_row_each(study):
    with changed(study, "first-seed1") as run:
        run["rounds"].pop()
        run["stop_reason"] = "no weak learner"
    with changed(study, "first-seed0") as run:
        run["stop_reason"] = "all rungs are used"
    with pytest.raises(RunError, match="the seeds of first differ in the number or cost of their students"):
        slot("rounds", " first")
    assert slot("seed_by_seed", " first").splitlines()[4:6] == [
        "| first | 0 | 2 | 71.00 | 0.200 | all rungs are used |",
        "| first | 1 | 1 | 91.00 | 0.200 | no weak learner |",
    ]


def test_time_is_that_of_all_seeds_and_cores(study):
    for seed in (0, 1):
        with changed(study, f"second-seed{seed}") as run:
            run["wall_seconds"]["total"], run["hardware"]["threads"] = 1800.0, 2
    lines = slot("time").splitlines()
    assert "| second | 2 | 10 | 1 | 2.00 | 2 |" in lines
    assert "| first | 2 | 10 | 3 | 0.01 | 1 |" in lines
    assert "| all | 4 | | | 2.01 | |" in lines


def test_a_teacher_that_runs_share_is_counted_once(study):
    """It was trained for 1,000 s by whichever came first, and everything else of the runs takes 8."""
    for name in ("first-seed0", "first-seed1", "second-seed0", "second-seed1"):
        with changed(study, name) as run:
            run["wall_seconds"] |= {"teacher": 1000.0, "total": 1002.0}
    lines = slot("time").splitlines()
    assert "| first | 2 | 1,000 | 3 | 0.28 | 1 |" in lines
    assert "| all | 4 | | | 0.28 | |" in lines


def test_a_run_without_a_teacher_takes_no_time_for_it(study):
    with changed(study, "second-seed0") as run:
        run["wall_seconds"] |= {"teacher": None, "total": 720.0}
    with changed(study, "second-seed1") as run:
        run["wall_seconds"] |= {"teacher": None, "total": 360.0}
    assert "| second | 2 | 0 | 1 | 0.30 | 1 |" in slot("time").splitlines()


def test_students_of_another_run_take_no_time(study):
    for seed in (0, 1):
        with changed(study, f"first-seed{seed}") as run:
            run["rounds"][0]["from"] = "runs/another"
    assert "| first | 2 | 10 | 2 | 0.01 | 1 |" in slot("time").splitlines()


def test_every_study_is_counted(study):
    other = study.parent / "other"
    (other / "results").mkdir(parents=True)
    (other / "study.yaml").write_text("seeds: [0]\nruns: {only: {}}\n")
    run = result("only", 0, [0.5])
    run["wall_seconds"]["total"] = 7200.0
    (other / "results" / "only-seed0.json").write_text(json.dumps(run))
    lines = readme.fill("<!-- table: * hours -->\n<!-- end of table -->\n").splitlines()
    assert lines[3:6] == ["| other | 1 | 2.0 |", "| some | 4 | 0.0 |", "| all | 5 | 2.0 |"]


def test_what_a_gpu_has_done_is_no_time_of_a_core(study):
    with changed(study, "second-seed0") as run:
        run["wall_seconds"]["total"], run["hardware"]["gpu"] = 600.0, "a GPU"
    with changed(study, "second-seed1") as run:
        run["wall_seconds"]["total"] = 720.0
    lines = slot("time").splitlines()
    assert "| second | 2 | 10 | 1 | 0.20, and 10 min of a GPU | 1 |" in lines
    assert any("a GPU, " in line for line in lines if line.startswith("| run |"))
    (line,) = (line for line in lines if line.startswith("| all |"))
    assert line.endswith(", and 10 min of a GPU | |")


def test_missing_and_outdated_results_are_named(study):
    with pytest.raises(RunError, match="no results of missing"):
        slot("rounds", " missing")
    (study / "study.yaml").write_text(STUDY.replace("second: {}", "second: {overrides: [seed=3]}"))
    with pytest.raises(RunError, match="second-seed0"):
        slot("rounds")


def drawn() -> str:
    return figures.digest(figures.errors("some", "first"))


def test_a_table_and_a_figure_change_with_the_results(study):
    text, before = slot("summary"), drawn()
    assert drawn() == before
    with changed(study, "first-seed1") as run:
        run["rounds"][1]["accuracy"] += 0.05
    assert slot("summary") != text
    assert drawn() != before


def test_curves_are_those_of_the_kept_metrics(study):
    folder = study / "kept" / "first-seed0"
    folder.mkdir(parents=True)
    records = [
        {"stage": stage, "attempt": attempt, "epoch": epoch, "validation_accuracy": accuracy}
        for stage, attempt, epoch, accuracy in (
            ("teacher", 0, 0, 0.1),  # of a fit that was interrupted and began again
            ("teacher", 0, 0, 0.5), ("teacher", 0, 1, 0.75), ("round-00", 0, 0, 0.25), ("round-00", 1, 0, 0.3)
        )
    ]  # fmt: skip
    torn = '{"stage": "round-00", "att'
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + torn)
    panels = {"one": {"a": ("first", "teacher")}, "two": {"b": ("first", "round-00")}}
    figure = figures.curves("some", panels)
    lines = [[line.get_xydata().tolist() for line in axes.lines] for axes in figure.axes]
    assert lines == [[[[1, 50], [2, 75]]], [[[1, 25]]]]
    (study / "study.yaml").write_text(STUDY.replace("first: {}", "first: {overrides: [seed=3]}"))
    with pytest.raises(RunError, match="other overrides"):
        figures.curves("some", panels)
    with pytest.raises(RunError, match="no metrics kept of second"):
        figures.curves("some", {"one": {"a": ("second", "teacher")}, "two": {}})


def test_a_teachers_epoch_of_least_validation_loss_stands_beside_its_last(study):
    (study / "study.yaml").write_text(STUDY.replace("first: {}", "first: {keep: [metrics]}"))
    for name in ("first-seed0", "first-seed1"):
        (study / "kept" / name).mkdir(parents=True)
        rows = [
            {"stage": stage, "attempt": 0, "epoch": epoch, "validation_loss": loss, "validation_accuracy": accuracy}
            for stage, epoch, loss, accuracy in (
                ("teacher", 0, 0.9, 0.5), ("teacher", 1, 0.3, 0.1),  # the second began again
                ("teacher", 1, 0.4, 0.625), ("teacher", 2, 0.5, 0.75), ("round-00", 0, 0.1, 0.2)
            )
        ]  # fmt: skip
        (study / "kept" / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "| first | 2 | 10 | | | | 91.00 ± 1.41 | 0.100 |" in slot("teachers", " first")  # of one seed only
    (study / "results" / "first-seed1.json").unlink()
    assert "| first | 1 | 10 | 2 of 3 | 62.50 | 75.00 | 90.00 | 0.100 |" in slot("teachers", " first")


def test_a_prefix_behind_its_best_member_is_said():
    run = result("first", 0, [0.6, 0.7])
    run["rounds"][1]["prefix_accuracy"] = 0.55
    assert tables.worst_prefix(run) == pytest.approx(0.15)


def test_runs_side_by_side_are_drawn_with_their_means(study):
    figure = figures.errors_by_run({"one": ("some", "first"), "other": ("some", "second")})
    lines = [[line.get_xydata().tolist() for line in axes.lines] for axes in figure.axes]
    alone, together = ([[[t, pytest.approx(y)] for t, y in points] for points in panel] for panel in lines)
    assert alone == [[[1, 30], [2, 20]], [[1, 50]]]
    assert together == [[[1, 29], [2, 19]], [[1, 49]]]


def test_fractions_of_the_teachers_cost_are_drawn_by_both_counts(study):
    (study / "results" / "first-seed1.json").unlink()
    with changed(study, "first-seed0") as run:
        run["rounds"][1] |= {"flops_published": 35, "macs_total": 500}
        run["teacher"] |= {"flops_published": 140, "macs_total": 10_000}
    figure = figures.fractions("some", "first")
    bars = [bar.get_height() for bar in figure.axes[0].patches]
    assert bars == [pytest.approx(value) for value in (50, 25, 75, 50, 5, 55)]
    with changed(study, "first-seed0") as run:
        run["rounds"][1]["macs_total"] += 100
    assert figures.digest(figures.fractions("some", "first")) != figures.digest(figure)  # bars are part of it


def test_final_errors_are_those_of_the_last_round_and_the_axis_is_that_of_the_ensembles(study):
    with changed(study, "second-seed0") as run:
        run["rounds"][0]["accuracy"] = 0.0  # a student that is nothing alone
    axes = figures.final_errors("some", ["first", "second"]).axes[0]
    together, alone, teacher = (line.get_xdata() for line in axes.lines)
    assert list(together) == [pytest.approx(19), pytest.approx(49)]
    assert list(alone) == [pytest.approx(20), pytest.approx(75)]
    assert teacher[0] == pytest.approx(9)
    assert axes.get_xlim()[1] == pytest.approx(98)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "second"]


def with_epochs(study: Path, run: str, courses: list[list[float]], objective: list[list[float]] | None = None) -> None:
    """Give the seeds of a run their validation accuracies by epoch, in its second attempt, and the objective's shares.

    An epoch takes a second more than the one before it.
    """
    (study / "study.yaml").write_text(re.sub(rf"{run}: {{}}", f"{run}: {{keep: [metrics]}}", STUDY))
    for seed, course in enumerate(courses):
        with changed(study, f"{run}-seed{seed}") as results:
            results["rounds"] = [row | {"attempts": 2, "validation_accuracy": course[-1]} for row in results["rounds"]]
            stage = f"round-{len(results['rounds']) - 1:02d}"
        rows = [{"stage": stage, "attempt": 0, "epoch": 0, "validation_accuracy": 0.99, "seconds": 0.1}]
        rows.append({"stage": "teacher", "attempt": 1, "epoch": 0, "validation_accuracy": 0.98, "seconds": 0.2})
        for epoch, accuracy in enumerate(course):
            shares = {} if objective is None else {"gradient_share/objective": objective[seed][epoch]}
            row = {"stage": stage, "attempt": 1, "epoch": epoch, "validation_accuracy": accuracy}
            rows.append({**row, "seconds": 2.0 + epoch + seed, **shares})
        kept = study / "kept" / f"{run}-seed{seed}"
        kept.mkdir(parents=True)
        (kept / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_last_epoch_stands_beside_the_best_one(study):
    """Of the student alone, of the attempt that gave it; differences to the first run by seed."""
    with_epochs(study, "second", [[0.4, 0.6, 0.5], [0.5, 0.4, 0.3]], [[0.8, 0.6, 0.4], [0.2, 0.2, 0.2]])
    for seed, accuracy in ((0, 0.52), (1, 0.49)):
        with changed(study, f"second-seed{seed}") as run:
            run["rounds"][0]["accuracy"] = accuracy
    row = "| second | 2 | 50.5 ± 2.1 | | | 40.0 ± 14.1 | 55.0 ± 7.1 | 0.60 | 0.1 |"
    assert row in slot("last_epochs", " second").splitlines()
    text = STUDY.replace("first: {}", "first: {keep: [metrics]}").replace("second: {}", "second: {keep: [metrics]}")
    with_epochs(study, "first", [[0.5], [0.5]])
    (study / "study.yaml").write_text(text)
    lines = slot("last_epochs", " first second").splitlines()
    assert "| first | 2 | 80.0 ± 14.1 | | | 50.0 ± 0.0 | 50.0 ± 0.0 | | 0.1 |" in lines
    assert "| second | 2 | 50.5 ± 2.1 | -29.50 ± 16.26 | -18.0 -41.0 | 40.0 ± 14.1 | 55.0 ± 7.1 | 0.60 | 0.1 |" in lines


def test_a_resumed_epoch_is_one_epoch_as_long_as_its_longest_line():
    def line(epoch: int, seconds: float, accuracy: float = 0.5) -> dict[str, object]:
        return {"stage": "round-00", "attempt": 0, "epoch": epoch, "seconds": seconds, "validation_accuracy": accuracy}

    lines = [line(0, 5.0), line(1, 4.0, 0.9), line(1, 1.0, 0.6), line(2, 6.0)]
    runs = [{"metrics": lines}, {"metrics": [line(0, 7.0)]}, {"metrics": [line(0, 3.0)]}]
    assert tables.fastest_epochs(runs) == 4.0
    epochs = tables.last_round({"rounds": [{"round": 0, "attempts": 1}], "metrics": lines})
    assert [row["validation_accuracy"] for row in epochs] == [0.5, 0.6, 0.5]


def test_ladders_are_compared_seed_by_seed_and_by_the_fastest_epoch_of_each_fit(study):
    text = STUDY.replace("first: {}", "first: {keep: [metrics]}").replace("second: {}", "second: {keep: [metrics]}")
    for seed, accuracies in ((0, [0.5, 0.64]), (1, [0.7, 0.93])):
        path = study / "results" / f"second-seed{seed}.json"
        path.write_text(json.dumps(result("second", seed, accuracies)))
    stages = {"first": ("round-00", "round-01", "teacher"), "second": ("peers",)}
    for run, names in stages.items():
        for seed in (0, 1):
            kept = study / "kept" / f"{run}-seed{seed}"
            kept.mkdir(parents=True)
            rows = [
                {"stage": stage, "attempt": 0, "epoch": epoch, "seconds": 10.0 * place + epoch - seed + 4}
                for place, stage in enumerate(names)
                for epoch in (0, 1)
            ]
            (kept / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (study / "study.yaml").write_text(text)
    lines = slot("ladders", " first second").splitlines()
    first = "| first | 2 | 70.0 ± 14.1 | 80.0 ± 14.1 | 81.0 ± 14.1 | | | 100 | 5,000 | 17.0 |"
    assert first in lines
    second = "| second | 2 | 60.0 ± 14.1 | 78.5 ± 20.5 | 79.5 ± 20.5 | -1.50 ± 6.36 | -6.0 +3.0 | 100 | 5,000 | 3.5 |"
    assert second in lines


def with_exits(study: Path, offset: float) -> None:
    for seed in (0, 1):
        with changed(study, f"first-seed{seed}") as run:
            points = [
                {"budget": budget, "accuracy": accuracy - offset * seed, "macs": 1e4 * budget}
                for budget, accuracy in ((0.25, 0.5), (0.6, 0.75))
            ]
            run["exits"] = {"prefix_macs": [5000, 10_000], "rules": {"margin": {"budgeted": points}}}


def test_early_exits_stand_beside_the_largest_prefix_within_each_budget(study):
    with_exits(study, 0.1)
    lines = slot("exits", " first").splitlines()
    assert "| accuracy at a budget of | 25% | 60% |" in lines
    assert any(line.endswith("| 45.00 ± 7.07 | 70.00 ± 7.07 |") for line in lines)
    assert "| largest prefix within it | | 71.00 ± 14.14 |" in lines  # of 5,000 of 10,000
    assert "| MACs of the budget | 2,500 | 6,000 |" in lines


def test_early_exits_are_drawn_of_the_first_seed(study):
    with pytest.raises(RunError, match="the results of first have no early exits"):
        figures.exits("some", "first")
    with_exits(study, 0.1)
    axes = figures.exits("some", "first").axes[0]
    (margin,) = [
        line for line in axes.lines if line.get_label() not in ("student alone", "first t together", "teacher")
    ]
    assert margin.get_xydata().tolist() == [[2500, pytest.approx(50)], [6000, pytest.approx(25)]]


def test_gains_are_drawn_seed_by_seed_the_best_on_top(study):
    """`second` is 10 and 40 points behind `first`, which is 70 and 90% good."""
    with changed(study, "second-seed0") as run:
        run["rounds"][-1]["accuracy"] = 0.6
    axes = figures.gains("some", ["first", "second"]).axes[0]
    _, seeds, means = axes.lines
    assert seeds.get_xydata().tolist() == [[pytest.approx(-10), 0], [pytest.approx(-40), 0]]
    assert means.get_xydata().tolist() == [[pytest.approx(-25), 0]]
    with changed(study, "second-seed0") as run:
        run["ensemble"]["accuracy"] = 0.95
    whole, _ = figures.gains("some", ["first", "second"], alone=False).axes[0].lines[1].get_xdata()
    assert whole == pytest.approx(24)  # 95 less the ensemble's 71
    (study / "results" / "second-seed0.json").unlink()
    text = STUDY.replace("missing: {}", "third: {}")
    (study / "study.yaml").write_text(text)
    for seed in (0, 1):
        (study / "results" / f"third-seed{seed}.json").write_text(json.dumps(result("third", seed, [0.95])))
    axes = figures.gains("some", ["first", "third", "second"]).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["second", "third"]
    assert axes.lines[1].get_xdata().tolist() == [pytest.approx(-40)]


def test_weights_of_terms_stand_side_by_side_by_factor(study):
    with_epochs(study, "second", [[0.4, 0.6, 0.5]], [[0.8, 0.6, 0.7]])
    with_epochs(study, "first", [[0.55], [0.45]], [[0.1], [1.0]])
    names = ("weigh_a_b_1", "weigh_a_b_0.1")
    lines = ["seeds: [0]\nruns:", *(f"  {name}: {{keep: [metrics]}}" for name in (*names, "weigh_c_0.1"))]
    (study / "study.yaml").write_text("\n".join(lines))
    for old, new in zip(("first", "second"), names, strict=True):
        (study / "results" / f"{old}-seed0.json").rename(study / "results" / f"{new}-seed0.json")
        (study / "kept" / f"{old}-seed0").rename(study / "kept" / f"{new}-seed0")
    (study / "kept" / "first-seed1").rename(study / "kept" / "weigh_c_0.1-seed0")
    (study / "results" / "first-seed1.json").rename(study / "results" / "weigh_c_0.1-seed0.json")
    lines = slot("weights", " weigh_*").splitlines()
    assert "| | 1 | 0.1 |" in lines
    assert "| a_b | 55.0 (0.90) | 50.0 (0.30) |" in lines
    assert "| c | | 45.0 |" in lines  # without a term, and at one of the factors


def test_a_pattern_names_runs_in_the_order_of_the_study(study):
    assert list(tables.chosen("some", ["second", "f*"])) == ["second", "first"]
    assert list(tables.chosen("some", ["*s*t", "*nd"])) == ["first", "second"]
    with pytest.raises(RunError, match="no results of third"):
        slot("rounds", " third*")
    with pytest.raises(RunError, match="no results of missing"):
        slot("rounds", " *")
