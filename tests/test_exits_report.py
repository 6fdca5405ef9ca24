"""Early exits in reports and documents."""

import copy
from typing import Any

import pytest

from benchmarks import exits as benchmark
from pkd_lightning.report import write_report
from pkd_lightning.reporting.exits import curves_of, exit_points, exits_table
from tests.test_report import make_results, make_run

pytestmark = pytest.mark.report


def with_exits(**changes: Any) -> dict[str, Any]:
    """Results whose three prefixes take 10, 40 and 100, with two rules at two budgets."""

    def point(budget: float, accuracy: float) -> dict[str, float]:
        return {"budget": budget, "accuracy": accuracy, "macs": 101 * budget}

    rules = {
        "margin": {"budgeted": [point(0.1, 0.85), point(0.4, 0.89)], "one_threshold": [point(0.1, 0.5)]},
        "patience": {"budgeted": [point(0.1, 0.5)], "one_threshold": [point(0.4, 0.88)]},
    }
    exits = {"prefix_macs": [10, 40, 100], "budgets": [0.1, 0.4], "rules": rules}
    return make_results(exits={**exits, **changes})


def test_the_table_has_each_rule_and_the_largest_prefix_within_each_budget():
    head, rows = exits_table(with_exits())
    assert head == ["budget", "10%", "40%"]
    assert rows == [
        ["margin", "85.00%", "89.00%"],
        ["patience", "n/a", "88.00%"],
        ["largest prefix within it", "80.00%", "85.00%"],
    ]


def test_the_page_of_a_run_shows_early_exits_where_there_are_any(tmp_path):
    run = make_run(tmp_path / "new", with_exits())
    text = write_report(run).read_text()
    assert "Early exit: test error against mean compute" in text
    assert "largest prefix within it" in text
    assert (run / "figures" / "exits.png").stat().st_size > 5_000
    old = make_run(tmp_path / "old")
    assert "Early exit" not in write_report(old).read_text()
    assert not (old / "figures" / "exits.png").exists()


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        [],
        "no",
        {"rules": 3},
        {"rules": {"margin": []}},
        {"rules": {"margin": {"budgeted": [None, {"budget": "x"}, {"budget": 0.1, "accuracy": None, "macs": 1}]}}},
    ],
)
def test_a_page_is_written_whatever_stands_for_early_exits(tmp_path, damaged):
    results = make_results(exits=damaged)
    assert curves_of(results) is None
    assert exit_points(results, "margin") == {}
    assert "Early exit" not in write_report(make_run(tmp_path / "run", results)).read_text()


def test_a_page_is_written_without_the_costs_of_prefixes(tmp_path):
    results = with_exits(prefix_macs=[1, None])
    assert exits_table(results)[1][-1] == ["largest prefix within it", "n/a", "n/a"]
    assert "Early exit" in write_report(make_run(tmp_path / "run", results)).read_text()


def test_the_tables_of_the_document_are_those_of_the_measurements():
    text = benchmark.DOCUMENT.read_text()
    assert {name for _, name, _ in benchmark.SLOT.findall(text)} == set(benchmark.slots(benchmark.stored()))
    assert benchmark.fill(text, benchmark.stored()) == text, "run: python -m benchmarks.exits --tables"


def test_a_table_counts_what_test_images_took_and_says_where_a_seed_cannot_meet_a_budget():
    one = {**with_exits(), "ensemble": "e", "seed": 1}
    other = copy.deepcopy({**one, "seed": 0})
    assert "| margin | 85.00 ± 0.00 (10) | 89.00 ± 0.00 (40) |" in benchmark.accuracies([one, other])
    other["exits"]["rules"]["margin"]["budgeted"].pop(0)
    assert "| margin | n/a | 89.00 ± 0.00 (40) |" in benchmark.accuracies([one, other])
    assert [row["seed"] for row in benchmark.grouped([one, other])["e"]] == [0, 1]


def test_a_mean_of_nearly_nothing_has_no_sign_of_its_own():
    assert benchmark.spread([-0.001, 0.0], sign="+") == "+0.00 ± 0.00"
