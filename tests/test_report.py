"""The report: right numbers, honest words, one offline file, and a clear message for every damaged run."""

import io
import itertools
import json
import math
import os
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from pkd_lightning.errors import RunError
from pkd_lightning.report import compare, main, print_table, write_report
from pkd_lightning.reporting import comparison, figures, single, style
from pkd_lightning.reporting.grouping import curve, grouped
from pkd_lightning.reporting.load import load_run, read_metrics
from pkd_lightning.reporting.table import student_rows, teacher_row
from pkd_lightning.reporting.values import acceptance, duration, engineering, percent, share
from tests.support import tiny_config

PARAMS, FLOPS, MACS = (620, 1206, 2378), (686, 1372, 2744), (12_838, 44_492, 164_248)
pytestmark = pytest.mark.report
VOID = {"meta", "use", "path", "br", "link", "img"}


def make_results(rounds=3, **changes):
    entries = []
    for t in range(rounds):
        edges = [0.0] * 10 if t == 0 else [0.5] * t + [-0.4] * (10 - t)
        entries.append(
            {
                "round": t,
                "class_index": t,
                "attempts": 1,
                "epochs": 3,
                "config": {"n_blocks": 1, "d_state": 16},
                "params": PARAMS[t],
                "flops_published": FLOPS[t],
                "macs_total": MACS[t],
                "latency_ms": 0.51,
                "accuracy": 0.80 + 0.02 * t,
                "validation_accuracy": 0.81,
                "prefix_validation_accuracy": 0.81,
                "validation_loss": 2.8,
                "scales": [0.65, 0.63],
                "bound": 9.9,
                "eta": 0.1,
                "prefix_accuracy": 0.80 + 0.05 * t,
                "prefix_agreement": 0.81 + 0.05 * t,
                "prefix_nll": 0.3,
                "prefix_ece": 0.02,
                "prefix_latency_ms": 0.62 + 0.5 * t,
                "edges": {"min": min(edges), "max": max(edges), "satisfied": t, "classes": 10, "per_class": edges},
                "accepted_by": "first_round" if t == 0 else "best_candidate",
                "seconds": 5.0,
            }
        )
    costs = {"params": PARAMS, "flops_published": FLOPS, "macs_total": MACS}
    totals = {key: sum(values[:rounds]) for key, values in costs.items()}
    teacher = {"accuracy": 0.98, "nll": 0.07, "ece": 0.01, "params": 34_674, "flops_published": 95_648}
    teacher |= {"macs_total": 14_000_000, "latency_ms": 3.1, "config": {"n_blocks": 28}}
    ensemble = {"members": rounds, "accuracy": 0.80 + 0.05 * (rounds - 1), "agreement": 0.91, "nll": 0.2, "ece": 0.02}
    ensemble["latency_ms"] = 1.62
    ensemble |= totals | {"fraction_of_teacher": {key: total / teacher[key] for key, total in totals.items()}}
    results = {
        "schema": 1,
        "experiment": "digits",
        "dataset": "digits",
        "split": "paper",
        "seed": 0,
        "objective": "anchored",
        "combine": "learned",
        "versions": {"torch": "2.13.0"},
        "hardware": {"cpu": "some cpu", "gpu": None},
        "sizes": {"train": 1132, "validation": 126, "test": 539},
        "wall_seconds": {"teacher": 10.2, "rounds": [5.0] * rounds, "total": 60.0},
        "teacher": teacher,
        "rounds": entries,
        "ensemble": ensemble,
        "stop_reason": "reached 3 rounds",
    }
    return results | changes


def make_run(path, results=None, stages=("teacher", "round-01"), config="epochs: 3\nseed: 0\n"):
    path.mkdir(parents=True, exist_ok=True)
    (path / "results.json").write_text(json.dumps(make_results() if results is None else results))
    rows = [
        {"stage": stage, "attempt": 0, "epoch": epoch, "train_loss": 2 - 0.3 * epoch, "validation_loss": 2.1}
        for stage in stages
        for epoch in range(3)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "config.yaml").write_text(config)
    return path


class Balanced(HTMLParser):
    """Collects tags, attributes and text; fails on a tag closed out of order."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.tags, self.words = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.words.append(data)


def parsed(file):
    parser = Balanced()
    parser.feed(file.read_text())
    parser.close()
    assert parser.open == []
    return parser


def table_text(results, width):
    stream = io.StringIO()
    print_table(results, Console(file=stream, width=width))
    return stream.getvalue()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_report(make_run(tmp_path_factory.mktemp("report") / "run"))


@pytest.fixture
def no_figures(monkeypatch):
    """For tests about words: drawing takes a second a report."""
    monkeypatch.setattr(single, "cards", lambda run: [])


def visible(file):
    return " ".join(" ".join(parsed(file).words).split())


def test_report_is_one_offline_file_with_figures(report):
    assert report.name == "report.html"
    page = parsed(report)
    for tag, name, value in page.attributes:
        if not name.startswith("xmlns"):
            assert "//" not in value, (tag, name, value)
        if name in ("href", "xlink:href"):
            assert value.startswith("#")
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    text = report.read_text()
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    saved = {figure.stem for figure in (report.parent / "figures").glob("*.png")}
    assert saved == {"accuracy_students", "accuracy_macs", "cost", "latency", "edges", "losses"}
    assert page.tags.count("svg") == 5 + 2  # five figures, and a loss panel for each stage


def test_identifiers_are_unique_and_references_resolve(report):
    page = parsed(report)
    identifiers = [value for _, name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    links = {value[1:] for _, name, value in page.attributes if name.endswith("href")}
    clips = set(re.findall(r"url\(#([^)]+)\)", report.read_text()))
    assert links
    assert links | clips <= set(identifiers)


def test_report_is_the_same_for_the_same_run(report, tmp_path):
    assert write_report(report.parent, tmp_path / "again.html").read_bytes() == report.read_bytes()


def test_headline_gives_both_cost_conventions(report):
    text = visible(report)
    assert "The teacher classifies 98.0% of the 539 test images correctly." in text
    assert "The ensemble of 3 students reaches 90.0%, 8.0 points below the teacher" in text
    assert "It has 12.1% of the teacher's parameters." in text  # (620 + 1206 + 2378) / 34674
    assert "1.6% of the teacher's multiply-accumulates" in text  # 221578 / 14000000
    assert "and 5.0% by the paper's convention" in text  # 4802 / 95648
    assert "reached 3 rounds" in text


def test_page_table_has_own_and_cumulative_values(report):
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", report.read_text(), flags=re.DOTALL)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]
    third = [value for row in cells if row and row[0] == "3" for value in row]
    for value in ("84.00%", "90.00%", "91.00%", "2,378", "4,204", "12.1%", "164,248", "1.6%", "5.0%", "2/10", "5.0 s"):
        assert value in third
    teacher = [value for row in cells if row and row[0] == "teacher" for value in row]
    assert {"98.00%", "34,674", "14,000,000", "3.10"} <= set(teacher)


def test_latency_has_units_and_the_teacher_beside_it(report, tmp_path):
    text = visible(report)
    assert "latency 1.62 ms teacher 3.10 ms; one image, one CPU thread" in text
    assert "the ensemble of 3 students takes 1.62 ms an image and the teacher 3.10 ms" in text
    assert "latency alone (ms) latency of prefix (ms)" in text
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", report.read_text(), flags=re.DOTALL)
    last = [re.findall(r"<td[^>]*>(.*?)</td>", row)[-2:] for row in rows]
    assert [row for row in last if row and "." in row[0] and "." in row[1]] == [
        ["0.51", "0.62"],
        ["0.51", "1.12"],
        ["0.51", "1.62"],
        ["3.10", "3.10"],
    ]
    results = make_results()
    shown = table_text(results, 200)
    assert "ms: CPU time of one image on one thread, the least of several calls." in shown
    assert "~" not in shown
    results["rounds"][1] |= {"latency_disturbed": False, "prefix_latency_disturbed": True}
    disturbed = table_text(results, 200)
    assert "~1.12" in disturbed
    assert "~0.51" not in disturbed
    assert "~: other work disturbed the measurement." in disturbed
    for part in (results["teacher"], results["ensemble"], *results["rounds"]):
        for key in ("latency_ms", "prefix_latency_ms"):
            part.pop(key, None)
    unmeasured = write_report(make_run(tmp_path / "run", results))
    assert not (unmeasured.parent / "figures" / "latency.png").exists()
    assert " ms " not in visible(unmeasured)
    assert compare([unmeasured.parent], tmp_path / "out.html").is_file()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_table_never_wraps_and_keeps_costs_together(width):
    lines = table_text(make_results(), width).splitlines()
    assert max(map(len, lines)) <= width
    students = [line for line in lines if re.match(r"\s[123]\s", line)]
    assert len(students) == 3
    assert "90.0%" in students[2]
    text = "\n".join(lines)
    assert ("FLOPs" in text) == ("MACs" in text)
    assert "…" not in text
    assert "Stopped: reached 3 rounds" in text


def test_wide_table_shows_every_column():
    text = table_text(make_results(), 120)
    for word in ("rung", "same as", "edges", "accepted", "time", "own", "best try", "2/10", "4,204", "5.0 s", "34,674"):
        assert word in text
    assert "Stopped" not in table_text(make_results(stop_reason=None), 120)


def test_table_takes_markup_in_data_literally():
    assert "[bold]x[/nope]" in table_text(make_results(experiment="[bold]x[/nope]"), 120)


@pytest.mark.usefixtures("no_figures")
def test_the_condition_is_met_where_every_edge_is_positive_and_nowhere_else(tmp_path):
    results = make_results()
    second, third = results["rounds"][1:]
    second["accepted_by"], third["accepted_by"] = "best_candidate", "relaxed_condition"
    text = visible(write_report(make_run(tmp_path / "none", results)))
    assert "0 of 2 students after the first met the weak-learning condition for every class." in text
    assert "best candidate, nothing required was met" in text
    assert "relaxed condition only" in text
    # every edge positive, though accepted for another reason
    second["accepted_by"] = "improvement"
    second["edges"] |= {"satisfied": 10, "min": 0.1}
    assert "1 of 2 students" in visible(write_report(make_run(tmp_path / "one", results)))
    third["edges"] |= {"satisfied": 9}
    assert "1 of 2 students" in visible(write_report(make_run(tmp_path / "nine", results)))


@pytest.mark.usefixtures("no_figures")
def test_edges_overrule_a_recorded_condition(tmp_path):
    results = make_results()
    results["rounds"][1]["accepted_by"] = "condition"  # with 1 of 10 edges positive
    assert acceptance(results["rounds"][1]) == "contradiction"
    text = visible(write_report(make_run(tmp_path / "run", results)))
    assert "0 of 2 students" in text
    assert "student 2 is recorded as accepted by the condition, but its edges are not all positive" in text
    assert "zero by definition" in text


# Shapes of a real run: a zigzag, accuracies a point apart, losses over three decades, every kind of acceptance.
REAL_MACS = (14_416, 24_216, 49_568, 96_224, 128_920, 165_072, 204_680)
REAL_ACCURACY = (0.9519, 0.9648, 0.9759, 0.9741, 0.9796, 0.9833, 0.9815)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    results = make_results()
    kinds = ["first_round", "improvement", "best_candidate", "condition", "relaxed_condition", "improvement", "odd"]
    rounds = [results["rounds"][1] | {"round": t, "accepted_by": kind} for t, kind in enumerate(kinds)]
    for entry, macs, accuracy in zip(rounds, REAL_MACS, REAL_ACCURACY, strict=True):
        entry |= {"macs_total": macs, "accuracy": accuracy, "prefix_accuracy": accuracy}
    results["teacher"]["macs_total"] = 1_414_784
    stages = ["teacher", *(f"round-{t:02d}" for t in range(7))]
    run = make_run(tmp_path_factory.mktemp("real") / "run", results | {"rounds": rounds})
    with (run / "metrics.jsonl").open("w") as file:
        for place, stage in enumerate(stages):
            for epoch in range(20):
                for attempt in range(place % 2 + 1):
                    loss = (2.0 + place) * (0.66 if place < 4 else 0.8) ** epoch
                    row = {"stage": stage, "attempt": attempt, "epoch": epoch, "train_loss": loss}
                    file.write(json.dumps(row | {"validation_loss": 0.1 + loss}) + "\n")
    return load_run(run)


def drawn_text(figure):
    """What a reader sees written: matplotlib leaves each text as a comment in front of its outline."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg")
    return re.findall(r"<!-- (.*?) -->", stream.getvalue())


def test_figures_of_a_real_run_are_whole(real):
    with style.styled():
        made = {card.name: [*card.figures, card.draw()] for card in figures.cards(real)}
        groups, _ = grouped([real])
        made["comparison"] = [comparison.students_figure(groups), comparison.macs_figure(groups)]
        assert set(made) == {"accuracy_students", "accuracy_macs", "cost", "latency", "edges", "losses", "comparison"}
        for name, drawings in made.items():
            for figure in drawings:
                words = drawn_text(figure)
                assert words
                assert not [word for word in words if "$" in word or "\\" in word or "mathdefault" in word], name
                width, height = figure.get_size_inches()
                box = figure.get_tightbbox()  # of everything drawn: legends, titles, tick labels
                assert box.x0 > -0.02, name
                assert box.y0 > -0.02, name
                assert box.x1 < width + 0.02, name
                assert box.y1 < height + 0.02, name
                share = sum(axes.get_position().width for axes in figure.axes) / len(figure.axes)
                columns = 4 if len(figure.axes) == 8 else 1
                assert share > 0.7 / columns, name  # no legend or label squeezes the axes
        first = drawn_text(made["losses"][0])
        assert {"teacher", "1", "0.1", "0.01"} <= set(first)
        assert {"0.2", "0.5", "1", "2", "5"} <= set(drawn_text(made["losses"][-2]))  # one decade: 1 alone says little
        assert "student 1, 2 attempts" in drawn_text(made["losses"][1])


@pytest.mark.parametrize(
    ("xs", "ys"),
    [
        (list(itertools.accumulate(REAL_MACS)), [100 * accuracy for accuracy in REAL_ACCURACY]),
        ([1, 2, 3, 4, 5, 6, 7], [0, 5, 0, 5, 0, 5, 0]),  # over a valley's point the curve is near
        ([1, 2, 2.1, 3, 4, 4.1, 5], [3, 3, 3, 3, 1, 1, 1]),  # neighbours
    ],
)
def test_numbers_at_points_stand_clear_of_the_curve_and_of_one_another(xs, ys):
    with style.styled():
        figure = style.new_figure(3.6)
        axes = figure.add_subplot()
        axes.plot(xs, ys, "o-")
        axes.margins(0.1)
        style.label_points(axes, xs, ys, list("1234567"), style.BLUE)
        figure.draw_without_rendering()
        assert sorted(text.get_text() for text in axes.texts) == list("1234567")
        boxes = [text.get_window_extent().padded(1) for text in axes.texts]
        corners = axes.transData.transform(list(zip(xs, ys, strict=True)))
        for (x, y), (right, up) in itertools.pairwise(corners):
            for step in range(201):
                point = x + (right - x) * step / 200, y + (up - y) * step / 200
                assert not [box for box in boxes if box.contains(*point)]
        for one, other in itertools.combinations(boxes, 2):
            assert not one.overlaps(other)


def test_data_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>&$\\frac{"
    results = make_results(experiment=evil, objective=evil, stop_reason=evil, versions={evil: evil}, dataset=evil)
    results["rounds"][1]["accepted_by"] = evil
    results["rounds"][1]["config"] = {evil: evil}
    run = make_run(tmp_path / "run", results, stages=("teacher", evil, "--><b>"), config=f"name: {evil!r}\n")
    for file in (write_report(run), compare([run, run], tmp_path / "comparison.html")):
        page = parsed(file)
        assert "script" not in page.tags
        assert "<script>" in " ".join(page.words)
        assert "<!--" not in file.read_text()


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_short_runs(tmp_path, rounds):
    results = make_results(rounds)
    if rounds == 0:
        results["ensemble"] = None
    run = make_run(tmp_path / "run", results, stages=("teacher",))
    text = visible(write_report(run))
    assert {0: "No student was accepted.", 1: "The single student", 2: "The ensemble of 2"}[rounds] in text
    assert "teacher" in table_text(results, 80)
    assert compare([run, run], tmp_path / "out.html").is_file()


def test_missing_metrics_and_config_are_notes(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    (run / "config.yaml").unlink()
    text = visible(write_report(run))
    assert "loss curves are missing" in text
    assert "config.yaml is missing" in text
    assert not (run / "figures" / "losses.png").exists()


@pytest.mark.usefixtures("no_figures")
def test_no_teacher_losses(tmp_path):
    text = visible(write_report(make_run(tmp_path / "run", stages=("round-00", "round-02"))))
    assert "no losses of the teacher" in text
    assert "no losses of round-01" in text


@pytest.mark.usefixtures("no_figures")
def test_torn_last_line_and_repeated_epochs(tmp_path):
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "round-01", "attempt": 0, "epoch": 1, "train_loss": 7.5}\n{"stage": "round-02", "att')
    rows, notes = read_metrics(run / "metrics.jsonl")
    assert [row["train_loss"] for row in rows if row["stage"] == "round-01"] == [2.0, 7.5, 1.4]
    assert len(notes) == 1
    assert "last line is torn" in notes[0]
    assert "last line is torn" in visible(write_report(run))


def test_unreadable_lines_inside_are_counted(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'\xff\xfe\n[1]\n"x"\n{"epoch": 1}\n{"stage": "teacher", "epoch": 0, "train_loss": 1.0}\n\n')
    rows, notes = read_metrics(file)
    assert len(rows) == 1
    assert notes == ["metrics.jsonl: 4 unreadable line(s) skipped, the first is line 1"]


def test_values_that_are_not_numbers(tmp_path):
    results = make_results()
    results["rounds"][1] |= {"accuracy": math.nan, "macs_total": None, "prefix_nll": math.inf}
    results["rounds"][2]["edges"] |= {"min": math.nan, "per_class": [math.nan, None, 0.1]}
    results["teacher"]["flops_published"] = None
    results["ensemble"]["fraction_of_teacher"] = {}
    run = make_run(tmp_path / "run", results)
    (run / "metrics.jsonl").write_text('{"stage": "teacher", "attempt": 0, "epoch": 0, "train_loss": NaN}\n')
    text = visible(write_report(run))
    for place in ("rounds[1].accuracy", "rounds[1].macs_total", "rounds[2].edges.min", "teacher.flops_published"):
        assert place in text
    assert "1 loss value(s) are not finite" in text
    assert "n/a by the paper's convention" in text
    assert "n/a" in table_text(results, 120)
    assert not re.search(r"\bnan\b", text, flags=re.IGNORECASE)
    assert compare([run, run], tmp_path / "out.html").is_file()


@pytest.mark.parametrize("keys", [("flops_published",), ("flops_published", "macs_total")])
def test_costs_that_could_not_be_counted(tmp_path, keys):
    runs = []
    for seed in (0, 1):
        results = make_results(seed=seed)
        for row in (
            results["teacher"],
            *results["rounds"],
            results["ensemble"],
            results["ensemble"]["fraction_of_teacher"],
        ):
            row |= dict.fromkeys(keys)
        runs.append(make_run(tmp_path / str(seed), results))
    page = visible(write_report(runs[0]))
    assert all(f"teacher.{key}" in page for key in keys)
    assert "n/a" in table_text(results, 120)
    for row in (*student_rows(results), teacher_row(results)):
        assert all(row[key] == row[f"{key}_share"] == "n/a" for key in keys)
    both = visible(compare(runs, tmp_path / "out.html"))
    assert "n/a" in both
    assert not re.search(r"\b(nan|None)\b", page + both)


def broken(tmp_path, text):
    run = make_run(tmp_path / "run")
    (run / "results.json").write_text(text)
    return run


def without(results, *path):
    inner = results
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return results


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(make_results())[:400], "truncated or damaged"),
        ("", "truncated or damaged"),
        ("[1, 2]", "holds a list"),
        (json.dumps(make_results(schema=2)), "has schema 2; this version of pkd_lightning reads schema 1"),
        (json.dumps(without(make_results(), "schema")), "has schema None"),
        (json.dumps(without(make_results(), "teacher")), "teacher is missing"),
        (json.dumps(make_results() | {"rounds": 7}), "rounds is 7, not a list"),
        (json.dumps(without(make_results(), "rounds", 1, "edges")), r"rounds\[1\]\.edges is missing"),
        (json.dumps(make_results() | {"teacher": {"accuracy": "high"}}), "teacher.accuracy is 'high', not a number"),
        ("[" * 100_000, "nested more than 32 levels deep"),
        (json.dumps(make_results())[:-1] + ', "x": ' + "[" * 40 + "]" * 40 + "}", "nested more than 32 levels deep"),
    ],
)
def test_damaged_results(tmp_path, capsys, text, message):
    run = broken(tmp_path, text)
    with pytest.raises(RunError, match=message):
        write_report(run)
    assert main([str(run)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert not (run / "report.html").exists()


def test_every_fault_is_reported_at_once(tmp_path):
    results = without(without(make_results(), "rounds", 0, "accepted_by"), "ensemble", "params")
    results["rounds"][1]["round"] = 5
    with pytest.raises(RunError, match=r"accepted_by") as caught:
        load_run(make_run(tmp_path / "run", results))
    assert "ensemble.params is missing" in str(caught.value)
    assert "rounds[1].round is 5, not 1" in str(caught.value)


@pytest.mark.usefixtures("no_figures")
def test_command_line_errors(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for path, message in (
        ("none", "no such run directory"),
        ("empty", "no results.json in or below"),
        ("file", "is not a directory"),
    ):
        assert main([str(tmp_path / path)]) == 1
        assert message in capsys.readouterr().err
    run = make_run(tmp_path / "run")
    assert main([str(run), "--out", str(tmp_path / "no" / "where.html")]) == 1
    assert "cannot write" in capsys.readouterr().err
    with pytest.raises(RunError, match="no such run directory"):
        write_report(tmp_path / "none")


@pytest.mark.usefixtures("no_figures")
def test_command_line_one_run_and_several(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = make_run(tmp_path / "runs" / "digits" / "abc")
    assert main(["runs"]) == 0  # a directory above a single run
    assert Path(capsys.readouterr().out.strip()) == one / "report.html"
    make_run(tmp_path / "runs" / "digits" / "def", make_results(seed=1))
    assert main(["runs", str(one)]) == 0  # a run named twice counts once
    assert capsys.readouterr().out.strip() == "comparison.html"
    assert "2 runs on digits" in visible(tmp_path / "comparison.html")
    assert main([str(one), "runs/digits/def", "--out", "x.html"]) == 0
    assert (tmp_path / "x.html").is_file()


def test_comparison_groups_runs_that_differ_only_by_seed(tmp_path):
    runs = []
    for seed in range(3):
        results = make_results(seed=seed)
        results["ensemble"]["accuracy"] = results["rounds"][2]["prefix_accuracy"] = 0.90 + 0.01 * seed
        results["teacher"]["accuracy"] = 0.90
        config = f"epochs: 3\nseed: {seed}\nthreads: {seed + 1}\nrun_root: runs/{seed}\nlogger:\n  name: run{seed}\n"
        runs.append(make_run(tmp_path / f"seed{seed}", results, config=config))
    runs.append(make_run(tmp_path / "longer", config="epochs: 9\nseed: 0\n"))
    runs.append(make_run(tmp_path / "sum", make_results(combine="sum")))
    groups, notes = grouped([load_run(run) for run in runs])
    assert [len(group.runs) for group in groups] == [3, 1, 1]
    assert [group.label for group in groups] == [
        "digits · anchored · learned [epochs=3]",
        "digits · anchored · learned [epochs=9]",
        "digits · anchored · sum",
    ]
    assert notes == []
    line = curve(groups[0])
    assert line.center == pytest.approx([80.0, 85.0, 91.0])
    assert line.spread == pytest.approx([0.0, 0.0, statistics.stdev([90.0, 91.0, 92.0])])
    assert line.macs[2] == pytest.approx(sum(MACS))
    text = visible(compare(runs[::-1], tmp_path / "out.html"))
    assert "[epochs=3] 0 3 90.00%" in text  # the group's heading, then its first run: seed 0, though given last
    assert "+1.00 ± 1.00" in text
    assert "mean ± SD of 3" in text
    assert "91.00 ± 1.00%" in text
    assert "Not one comparison" not in text


def test_a_copied_run_is_no_second_seed(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    groups, notes = grouped([load_run(run) for run in runs])
    assert [len(group.runs) for group in groups] == [1]
    assert "repeats the settings and seed 0" in notes[0]
    assert "repeats the settings" in visible(compare(runs, tmp_path / "out.html"))


def test_seeds_with_different_numbers_of_students_average_what_all_have(tmp_path):
    runs = [make_run(tmp_path / f"{n}", make_results(n, seed=n)) for n in (2, 3)]
    groups, _ = grouped([load_run(run) for run in runs])
    assert len(curve(groups[0]).center) == 2
    assert compare(runs, tmp_path / "out.html").is_file()


def test_data_sets_are_never_drawn_together(tmp_path):
    runs = [make_run(tmp_path / name, make_results(dataset=name)) for name in ("digits", "mnist")]
    runs.append(make_run(tmp_path / "official", make_results(dataset="mnist", split="official")))
    file = compare(runs, tmp_path / "out.html")
    text = visible(file)
    assert "The runs use 3 different data sets or splits." in text
    for title in ("digits, split paper", "mnist, split paper", "mnist, split official"):
        assert title in text
    page = parsed(file)
    assert page.tags.count("section") == 3
    assert page.tags.count("svg") == 6
    identifiers = [value for _, name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))


def test_comparison_names_every_broken_run(tmp_path):
    good = make_run(tmp_path / "good")
    with pytest.raises(RunError, match="bad1") as caught:
        compare([good, tmp_path / "bad1", tmp_path / "bad2"], tmp_path / "out.html")
    assert "bad2" in str(caught.value)


def test_unreadable_configuration_still_compares(tmp_path):
    runs = [make_run(tmp_path / "a", config="a: [1\n b: }{"), make_run(tmp_path / "b", make_results(seed=1))]
    assert "not readable YAML" in visible(compare(runs, tmp_path / "out.html"))


LAUGHS = "a: &a [x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghij")
)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (LAUGHS, "it has aliases"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested more than 32 levels deep"),
        ("".join(f"{' ' * level}k:\n" for level in range(500)), "nested more than 32 levels deep"),
        ("a: " + "${oc.env:" * 100, ""),
        ("? [1, 2]\n: x\n", ""),
        ("a: 1" + "0" * 5000, ""),
    ],
)
def test_a_hostile_configuration_still_compares(tmp_path, monkeypatch, config, why):
    monkeypatch.setattr(comparison, "students_figure", lambda groups: style.new_figure(1))
    monkeypatch.setattr(comparison, "macs_figure", lambda groups: style.new_figure(1))
    if why:  # not even tried: nine levels of aliases are 9^9 nodes
        monkeypatch.setattr("pkd_lightning.reporting.grouping.OmegaConf.create", None)
    run = make_run(tmp_path / "a", config=config)
    text = visible(compare([run], tmp_path / "out.html"))
    assert "a/config.yaml is not readable YAML (" in text
    assert why in text


def test_keys_and_numbers_of_any_kind_in_a_configuration_compare(tmp_path):
    kinds = "1: a\n2: {3: b}\ntrue: 5\nbig: 1" + "0" * 400 + "\n"
    runs = [load_run(make_run(tmp_path / name, config=config)) for name, config in (("a", kinds), ("b", "1: b\n"))]
    groups, notes = grouped(runs)
    assert (len(groups), notes) == (2, [])
    assert groups[0].label.endswith("[1=5]")  # 2.3 is in one of them only, as this is: one key tells them apart


def test_the_configuration_of_a_run_has_no_aliases(tmp_path):
    config = tiny_config(tmp_path, "teacher.trainer.schedule=${trainer.schedule}")
    file = tmp_path / "config.yaml"
    file.write_text(OmegaConf.to_yaml(config, resolve=True))
    groups, notes = grouped([load_run(make_run(tmp_path / "run", config=file.read_text()))])
    assert (len(groups), notes) == (1, [])


@pytest.mark.usefixtures("no_figures")
def test_integers_beyond_float64_are_shown_as_missing(tmp_path):
    huge = 10**400
    results = make_results(seed=huge)
    results["teacher"]["accuracy"] = results["rounds"][1]["latency_ms"] = results["wall_seconds"]["total"] = huge
    run = make_run(tmp_path / "run", results)
    rows = [f'{{"stage": "teacher", "epoch": {epoch}, "train_loss": {huge}}}\n' for epoch in (huge, 0)]
    (run / "metrics.jsonl").write_text("".join([*rows, "[" * 100_000, "\n"]))
    text = visible(write_report(run))
    assert "results.json has no number for teacher.accuracy" in text
    assert "2 unreadable line(s) skipped, the first is line 1" in text
    assert "1 loss value(s) are not finite" in text
    assert "n/a" in table_text(load_run(run).results, 120)


def test_losses_that_are_null_are_gaps(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"stage": "teacher", "epoch": 0, "train_loss": null, "validation_loss": 1.0}\n')
    rows, notes = read_metrics(file)
    assert len(rows) == 1
    assert notes == ["metrics.jsonl: 1 loss value(s) are not finite: gaps in the loss curves"]


# ---------------------------------------------------------------------------------- links


@pytest.fixture
def outside(tmp_path):
    """A file beside the run that is none of the report's business."""
    file = tmp_path / "outside.txt"
    file.write_text("PRECIOUS\n")
    return file


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(("name", "said"), [("config.yaml", "is not shown"), ("metrics.jsonl", "curves are missing")])
def test_what_a_link_leads_to_is_not_shown(tmp_path, outside, name, said):
    run = make_run(tmp_path / "run")
    (run / name).unlink()
    (run / name).symlink_to(outside)
    page = write_report(run)
    assert "PRECIOUS" not in page.read_text()
    assert re.search(rf"{name} cannot be read \(it is a link.*\): .*{said}", visible(page))


@pytest.mark.usefixtures("no_figures")
def test_results_behind_a_link_are_refused(tmp_path, outside):
    run = make_run(tmp_path / "run")
    (run / "results.json").unlink()
    (run / "results.json").symlink_to(outside)
    with pytest.raises(RunError, match=r"results\.json cannot be read: it is a link"):
        write_report(run)


@pytest.mark.usefixtures("no_figures")
def test_special_and_oversized_files_are_not_read(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "config.yaml").unlink()
    os.mkfifo(run / "config.yaml")  # opening it would wait for ever
    (run / "metrics.jsonl").open("w").truncate(2**40)
    text = visible(write_report(run))
    assert "config.yaml cannot be read (it is not a regular file)" in text
    assert "metrics.jsonl cannot be read (it is larger than" in text


def test_nothing_outside_the_run_is_written(tmp_path, outside):
    run = make_run(tmp_path / "run")
    (run / "figures").mkdir()
    for name in ("report.html", "report.html.partial", "figures/edges.png"):
        (run / name).symlink_to(outside)
    assert "ensemble of 3" in visible(write_report(run))
    assert outside.read_text() == "PRECIOUS\n"
    assert not (run / "report.html").is_symlink()
    assert (run / "figures/edges.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


@pytest.mark.usefixtures("no_figures")
def test_figures_behind_a_link_are_refused(tmp_path):
    run, elsewhere = make_run(tmp_path / "run"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (run / "figures").symlink_to(elsewhere)
    with pytest.raises(RunError, match="figures is a link"):
        write_report(run)
    assert list(elsewhere.iterdir()) == []


@pytest.mark.usefixtures("no_figures")
def test_a_page_replaces_files_only(tmp_path):
    run = make_run(tmp_path / "run")
    os.mkfifo(tmp_path / "pipe")
    for out in (tmp_path / "pipe", tmp_path):
        with pytest.raises(RunError, match="it is not a regular file"):
            write_report(run, out)
    assert not (tmp_path / "pipe").is_file()


def test_numbers_as_text():
    assert [percent(0.9844), percent(math.nan), percent(1.0, 0)] == ["98.4%", "n/a", "100%"]
    assert [share(x) for x in (0.00001, 0.0006, 0.0994, 1.0, 1.204, 0.0)] == [
        "<0.01%",
        "0.06%",
        "9.9%",
        "100%",
        "120%",
        "0.0%",
    ]
    assert [duration(x) for x in (5.1, 100, 3661, math.nan)] == ["5.1 s", "1 min 40 s", "1 h 01 min", "n/a"]
    assert [engineering(x) for x in (686, 9400, 14e6)] == ["686", "9.4 k", "14 M"]
