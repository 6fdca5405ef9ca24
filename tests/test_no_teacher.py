"""Runs without a teacher: students learn from labels, and nothing is asked of a teacher, or said of one."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from pkd_lightning.assembling import assemble
from pkd_lightning.boosting.student import NoTeacher
from pkd_lightning.boosting.weak_learner import faults_without_teacher
from pkd_lightning.cli import load_config
from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.errors import ConfigError, RunError
from pkd_lightning.loggers import summary_of
from pkd_lightning.losses import distillation_loss
from pkd_lightning.report import compare, write_report
from pkd_lightning.reporting.load import load_run, read_results
from pkd_lightning.reporting.table import print_table
from pkd_lightning.rundir import RunDirectory
from pkd_lightning.sweeps import listing
from pkd_lightning.wandb_tracker import figures_of
from tests.support import ACCEPT, stopped_by, tiny_config, tiny_run
from tests.test_fit_resume import Killed, assert_same, killed_at, run_until_done
from tests.test_processes import ONE, TWO, arguments, command
from tests.test_report import make_results, make_run

ALONE = ("teacher=none", "boosting.alpha=1", ACCEPT)


def place(root: Path, *flags: str) -> Path:
    return RunDirectory(tiny_config(root, *flags)).path


def test_with_labels_alone_the_teacher_is_not_read() -> None:
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    nothing = NoTeacher().outputs(torch.arange(5), torch.zeros(5, 2)).logits
    assert distillation_loss(logits, nothing, labels, 1.0, 2.0) == F.cross_entropy(logits, labels)
    with pytest.raises(RuntimeError):  # whoever reads it all the same is told
        distillation_loss(logits, nothing, labels, 0.5, 2.0)


def test_a_run_without_a_teacher_has_everything_but_what_is_of_one(tmp_path: Path) -> None:
    results = tiny_run(tmp_path, *ALONE)
    (run,) = tmp_path.glob("digits/*")
    assert results["teacher"] is None
    assert results["wall_seconds"]["teacher"] is None
    assert results["wall_seconds"]["total"] > 0
    assert "fraction_of_teacher" not in results["ensemble"]
    for row in results["rounds"]:
        assert [row[name] for name in ("edges", "eta", "bound", "largest_residual")] == [None] * 4
        assert not {"agreement", "prefix_agreement"} & row.keys()
        assert row["macs_total"] > 0
    assert results["rounds"][0]["accepted_by"] == "first_round"
    assert not (tmp_path / "teachers").exists()
    assert not (run / "teacher").exists()
    assert '"teacher"' not in (run / "metrics.jsonl").read_text()
    assert len(ProgressiveEnsemble.load(run)) == 3
    assert results["exits"]


@pytest.mark.parametrize("objective", ["anchored", "additive", "independent"])
def test_students_are_those_of_any_teacher_with_labels_alone(objective: str, tmp_path: Path) -> None:
    """With alpha = 1 a teacher is there in vain."""
    flags = ("boosting.alpha=1", f"boosting.objective={objective}", ACCEPT)
    with_one, without = tiny_run(tmp_path / "one", *flags), tiny_run(tmp_path / "none", *flags, "teacher=none")
    same = ("accuracy", "prefix_accuracy", "prefix_nll", "scales", "validation_loss", "accepted_by", "epochs")
    for mine, its in zip(without["rounds"], with_one["rounds"], strict=True):
        assert {name: mine[name] for name in same} == {name: its[name] for name in same}


@pytest.mark.parametrize("flags", [(), ("trainer.mode=step",)])
def test_killed_after_any_step_it_gives_the_same_bits(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (*ALONE, "trainer.max_epochs=2", *flags)
    tiny_run(tmp_path / "whole", *flags)
    with killed_at(7, monkeypatch) as kills:
        run_until_done(tmp_path / "parts", *flags)
    assert {kill.split()[0] for kill in kills} == {"round-00", "round-01", "round-02"}
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_its_state_has_no_residual_matrices_and_is_of_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = (*ALONE, "trainer.max_epochs=2")
    with killed_at(20, monkeypatch), pytest.raises(Killed):  # after a round
        tiny_run(tmp_path, *flags)
    path = place(tmp_path, *flags) / "boosting.ckpt"
    state = torch.load(path, weights_only=True)
    assert "ensemble_logits" in state
    assert not {"S", "validation_S"} & state.keys()
    from tests import support
    from tests.test_resume import relabelled

    original = support.patterns
    monkeypatch.setattr(support, "patterns", lambda root=None: relabelled(original(root)))
    with pytest.raises(RunError, match="on other images"):
        tiny_run(tmp_path, *flags)


def faults_of(root: Path, *flags: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        assemble(tiny_config(root, *flags))
    return error.value.faults


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ((), "boosting.alpha=0.5: must be 1 without a teacher"),
        (("boosting.alpha=1", "boosting.objective=published"), "boosting.objective='published': needs a teacher; set"),
        (("boosting.alpha=1", "boosting.weak_learner.require=condition"),
         "boosting.weak_learner.require='condition': edges need a teacher; set improvement"),
        (("boosting.alpha=1", "boosting.weights=samples"), "boosting.weights='samples': K+ and K- need a teacher"),
        (("boosting.alpha=1", "boosting.eta=0.1"), "boosting.eta=0.1: is of K+ and K-, which need a teacher"),
        (("boosting.alpha=1", "boosting.bound_quantile=0.9"), "boosting.bound_quantile=0.9: is of K+ and K-"),
        (("boosting.alpha=1", "teacher.online=true"), "teacher.online=True: there is no teacher"),
        (("boosting.alpha=1", "teacher.generations=2"), "teacher.generations=2: there is no teacher"),
        (("boosting.alpha=1", f"teacher.checkpoint={__file__}"), "teacher.checkpoint="),
        (("boosting.alpha=1", "+teacher.onlin=true"), "teacher.onlin: no such option. Did you mean 'teacher.online'?"),
    ],
)  # fmt: skip
def test_what_needs_a_teacher_is_refused(flags: tuple[str, ...], fault: str, tmp_path: Path) -> None:
    found = faults_of(tmp_path, "teacher=none", *flags)
    assert len(found) == 1
    assert found[0].startswith(fault)


def test_an_objective_of_features_of_the_teacher_is_refused(tmp_path: Path) -> None:
    objective = ("objective=attention", "+boosting.objective.alpha=1", "boosting.alpha=1")
    assert any("needs a teacher" in fault for fault in faults_of(tmp_path, "teacher=none", *objective))


def test_an_objective_with_its_own_weight_of_the_teacher_is_refused(tmp_path: Path) -> None:
    flags = ("objective=anchored", "+boosting.objective.alpha=0.9", "boosting.alpha=1")
    assert faults_of(tmp_path, "teacher=none", *flags) == [
        "boosting.objective='anchored': needs a teacher; set objective=independent, or choose a teacher, teacher=NAME"
    ]


def test_how_no_teacher_would_be_trained_names_no_other_run(tmp_path: Path) -> None:
    plain = place(tmp_path, *ALONE)
    assert place(tmp_path, *ALONE, "teacher.trainer.max_epochs=7") == plain
    assert place(tmp_path, ACCEPT, "boosting.alpha=1") != plain


def test_more_rounds_go_on_from_those_that_are_there(tmp_path: Path) -> None:
    tiny_run(tmp_path / "grown", *ALONE, "boosting.rounds=2")
    grown = tiny_run(tmp_path / "grown", *ALONE)
    whole = tiny_run(tmp_path / "whole", *ALONE)
    assert grown["rounds"][1]["from_round"] == 1
    assert grown["ensemble"]["nll"] == whole["ensemble"]["nll"]


@pytest.mark.report
def test_reports_say_that_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tiny_run(tmp_path, *ALONE)
    (run,) = tmp_path.glob("digits/*")
    page = (run / "report.html").read_text()
    assert "There is no teacher: students learned from the labels." in page
    assert not load_run(run).notes
    for words in ("agrees with teacher", "of the teacher", "Edges", "time, teacher", ">n/a<"):
        assert words not in page
    assert not {"cost", "edges"} & {path.stem for path in (run / "figures").glob("*.png")}
    console = Console(width=160, record=True)
    print_table(results, console)
    shown = console.export_text()
    assert "No teacher." in shown
    assert not {"same as", "edges", "FLOPs"} & set(shown.split())
    assert listing.main([str(tmp_path)]) == 0
    assert f"digits/{run.name}" in capsys.readouterr().out


@pytest.mark.report
def test_it_is_compared_with_runs_that_have_one(tmp_path: Path) -> None:
    make_run(tmp_path / "with", make_results())
    rows = [{**row, "edges": None} for row in make_results()["rounds"]]
    for row in rows:
        del row["prefix_agreement"]
    ensemble = {key: value for key, value in make_results()["ensemble"].items() if key != "fraction_of_teacher"}
    without = make_results(rounds=3, teacher=None, objective="independent", ensemble=ensemble)
    without["rounds"] = rows
    make_run(tmp_path / "without", without)
    page = Path(compare([tmp_path / "with", tmp_path / "without"], tmp_path / "comparison.html")).read_text()
    assert "independent" in page
    assert "n/a" in page
    write_report(tmp_path / "without")


def test_a_teacher_that_is_missing_is_not_one_that_was_not_wanted(tmp_path: Path) -> None:
    results = make_results()
    del results["teacher"]
    run = make_run(tmp_path / "run", results)
    with pytest.raises(RunError, match="teacher is missing"):
        read_results(run / "results.json")
    results = make_results()
    results["rounds"][1]["edges"] = None
    run = make_run(tmp_path / "other", results)
    with pytest.raises(RunError, match=r"rounds\[1\].edges is missing"):
        read_results(run / "results.json")


def test_trackers_show_what_there_is(tmp_path: Path) -> None:
    results = tiny_run(tmp_path, *ALONE, "logger=wandb", "boosting.rounds=2")
    figures: dict[str, Any] = dict(figures_of(results))
    assert not [name for name in figures if name.startswith("teacher/")]
    assert figures["ensemble/validation_accuracy"] == results["rounds"][-1]["prefix_validation_accuracy"]
    shown = summary_of(results["rounds"][0])
    assert shown["accuracy"] == results["rounds"][0]["accuracy"]
    assert not [name for name in shown if "edge" in name or "agreement" in name]


def test_an_unfinished_run_is_shown_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with killed_at(3, monkeypatch), pytest.raises(Killed):
        tiny_run(tmp_path, *ALONE)
    (run,) = tmp_path.glob("digits/*")
    assert json.loads((run / "progress.json").read_text())["teacher"] is None
    assert load_run(run).results["rounds"] == []


def test_the_options_are_checked_by_their_own_values() -> None:
    assert faults_without_teacher(assemble(load_config("boosting.alpha=1")).boosting) == []
    assert len(faults_without_teacher(assemble(load_config("boosting=paper")).boosting)) == 2


@pytest.mark.slow
def test_two_processes_give_the_ensemble_of_one_and_go_on_from_each_other(tmp_path: Path) -> None:
    one = tiny_run(tmp_path / "one", *ALONE, *ONE)
    flags = arguments(tmp_path / "two", *ALONE, *TWO, "trainer.checkpoint_every='1 epochs'")
    (tmp_path / "two").mkdir()
    code, _, said = stopped_by(
        signal.SIGTERM, tmp_path / "two", flags, lambda lines: any('"round-01"' in line for line in lines)
    )
    assert code == 143, said
    done = command(tmp_path / "two", *ALONE, *TWO)
    assert done.returncode == 0, done.stderr
    assert "resumed after 1 of 2 rounds" in done.stdout
    (path,) = (tmp_path / "two").rglob("results.json")
    assert json.loads(path.read_text())["ensemble"]["nll"] == pytest.approx(one["ensemble"]["nll"], rel=1e-4)
