"""What a report shows of terms of knowledge: their curves, and in words which do nothing or everything."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pkd_lightning.naming import Naming
from pkd_lightning.report import print_table, write_report
from pkd_lightning.reporting import style
from pkd_lightning.reporting.figures import cards
from pkd_lightning.reporting.grouping import grouped
from pkd_lightning.reporting.knowledge import CAPTION, knowledge_caption, knowledge_panels, taught, terms_of
from pkd_lightning.reporting.load import load_run
from pkd_lightning.sweeps.listing import list_runs
from tests.support import patterns, tiny_config, tiny_run
from tests.test_report import make_results, make_run, parsed, visible

__all__ = ["patterns"]
pytestmark = pytest.mark.report
Row = dict[str, Any]


def epochs(shares: Mapping[str, float | None], count: int = 3, attempt: int = 0) -> list[Row]:
    """Metric rows of a fit whose terms have these shares in each epoch."""
    rest = 1 - sum(share or 0 for share in shares.values())
    return [
        {"attempt": attempt, "epoch": epoch, "train_loss": 1.0, "gradient_share/objective": rest}
        | {f"gradient_share/{name}": share for name, share in shares.items()}
        | {f"knowledge/{name}": 0.5 for name in shares}
        for epoch in range(count)
    ]


def remarks(*students: list[Row]) -> str:
    stages = {f"round-{index:02d}": rows for index, rows in enumerate(students)}
    return knowledge_caption(taught(stages)).removeprefix(CAPTION).strip()


def test_a_term_that_does_nothing_or_everything_is_said_in_words() -> None:
    idle, half, alone = epochs({"a": 0.004}), epochs({"a": 0.5}), epochs({"a": 0.951})
    assert remarks(half) == ""
    assert remarks(idle) == "a does next to nothing in student 1: its mean share is 0.40%."
    assert remarks(half, alone) == "a does nearly everything in student 2: its mean share is 95.1%."
    assert remarks(idle, idle, epochs({"a": 0.002}), half, idle, half, alone, alone) == (
        "a does next to nothing in students 1 to 3 and 5: its mean share is at most 0.40%."
        " a does nearly everything in students 7 and 8: its mean share is at least 95.1%."
    )


def test_remarks_are_of_means_over_epochs_with_a_share_of_the_last_attempt() -> None:
    rows = epochs({"a": 0.001}, 2) + epochs({"a": 0.016}, 1)
    assert remarks(rows) == "a does next to nothing in student 1: its mean share is 0.60%."
    assert remarks(rows + epochs({"a": None}, 3)) == remarks(rows)
    assert remarks(epochs({"a": 0.5}) + [{**row, "attempt": 1} for row in rows]) == remarks(rows)
    assert remarks(epochs({"a": None})) == ""


def test_no_terms_have_no_figure(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path / "run"))
    with style.styled():
        assert "knowledge" not in [card.name for card in cards(run)]


@pytest.mark.parametrize("count", [1, 6])
def test_each_student_has_its_shares_and_below_them_its_losses(count: int) -> None:
    rows = epochs({"a": 0.2, "b": 0.3}, count) + epochs({"a": 0.25, "b": 0.3}, count, attempt=1)
    rows[-1]["gradient_share/a"] = None
    students = taught({"teacher": [{"epoch": 0}], **{f"round-{index:02d}": rows for index in range(5)}})
    with style.styled():
        figure = knowledge_panels(students, terms_of(rows), 3.0, 4)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    titles = [axes.get_title(loc="left") for axes in shown]
    assert [title for title in titles if title] == [f"student {index}, 2 attempts" for index in range(1, 6)]
    above = shown[0]
    assert len(above.lines) == 2 * 3  # attempts, terms and the objective
    low, high = above.get_ylim()
    assert low < 0 < 100 < high
    for axes in shown:
        assert all(float(tick).is_integer() for tick in axes.get_xticks())
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "the objective"]
    assert len({line.get_color() for line in above.lines}) == 3


def test_a_value_between_two_gaps_has_a_mark() -> None:
    rows = epochs({"a": 0.2}, 5)
    rows[1]["gradient_share/a"] = rows[3]["gradient_share/a"] = None
    with style.styled():
        figure = knowledge_panels({1: rows}, ["a"], 3.0, 4)
    marked = [line.get_markevery() for line in figure.axes[0].lines]
    assert marked == [[], [0, 2, 4]]


@pytest.mark.parametrize("losses", [[None] * 3, [0.0] * 3, [1e-9, 0.0, 1e9]])
def test_losses_of_any_kind_are_drawn(losses: list[float | None]) -> None:
    rows = [{**row, "knowledge/a": loss} for row, loss in zip(epochs({"a": 0.2}), losses, strict=True)]
    with style.styled():
        knowledge_panels({1: rows}, ["a"], 3.0, 1).draw_without_rendering()


def test_the_page_has_the_figure_and_its_words(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", stages=("teacher",))
    rows = [{"stage": f"round-{index:02d}", **row} for index in range(3) for row in epochs({"a": 0.002})]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    page = write_report(run)
    assert (run / "figures" / "knowledge.png").is_file()
    assert "a does next to nothing in students 1 to 3: its mean share is 0.20%." in visible(page).replace(
        "at most ", ""
    )
    assert parsed(page).tags.count("svg") == 5 + 4 + 3


def test_runs_are_named_by_their_terms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = make_results(knowledge=["fitnet", "rkd"])
    print_table(own, Console(width=200))
    assert "digits: digits, anchored objective + fitnet + rkd, learned combination, seed 0" in capsys.readouterr().out
    runs = [make_run(tmp_path / "plain"), make_run(tmp_path / "terms", own)]
    groups, _ = grouped([load_run(run) for run in runs])
    assert [group.label for group in groups] == [
        "digits · anchored · learned", "digits · anchored + fitnet + rkd · learned",
    ]  # fmt: skip
    assert "objective anchored + fitnet + rkd · combine learned" in visible(write_report(runs[1], figures=False))


def test_results_tell_the_terms_and_say_nothing_where_there_are_none(tmp_path: Path) -> None:
    fitnet = "knowledge=fitnet"
    assert tiny_run(tmp_path / "terms", fitnet, "boosting.rounds=1")["knowledge"] == ["fitnet"]
    assert "knowledge" not in tiny_run(tmp_path / "plain", "boosting.rounds=1")
    assert Naming(tiny_config(tmp_path, fitnet), "patterns").tags[-1] == "fitnet"
    settings = [row.settings for row in list_runs(tmp_path / "terms") + list_runs(tmp_path / "plain")]
    assert [row[0] == "knowledge=fitnet" for row in settings] == [True, False]
    assert not any("knowledge" in setting for setting in settings[0][1:] if "_target_" in setting)
