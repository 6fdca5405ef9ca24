"""`pkd finish`: a run that was stopped ends with the students there are."""

import json
import shutil
from pathlib import Path

import pytest

from pkd_lightning import finish
from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.run import main as command
from tests.support import ACCEPT, stopped_after, tiny_run


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a run of three rounds that was stopped after two."""
    return stopped_after(2, tmp_path / "runs", monkeypatch)


@pytest.mark.report
def test_it_ends_with_the_students_there_are_and_says_so(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finish.main([str(stopped)]) == 0
    results = json.loads((stopped / "results.json").read_text())
    assert results["stop_reason"] == "ended early, by `pkd finish`"
    assert len(results["rounds"]) == results["ensemble"]["members"] == 2
    assert (stopped / "report.html").is_file()
    assert len(ProgressiveEnsemble.load(stopped / "students")) == 2
    said = capsys.readouterr().out
    assert f"report: {stopped / 'report.html'}" in said
    assert "ended early, by `pkd finish`" in said
    again = tiny_run(stopped.parents[1], ACCEPT)  # the same command shows it
    assert again == results
    assert finish.main([str(stopped)]) == 0
    assert json.loads((stopped / "results.json").read_text()) == results


def test_the_students_are_those_of_the_whole_run(stopped: Path, tmp_path: Path) -> None:
    finish.main([str(stopped)])
    whole = tiny_run(tmp_path / "whole", ACCEPT)
    ended = json.loads((stopped / "results.json").read_text())
    for mine, its in zip(ended["rounds"], whole["rounds"], strict=False):
        assert mine["prefix_nll"] == its["prefix_nll"]


def test_a_run_that_was_moved_is_finished_where_it_is(stopped: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / stopped.parent.name / stopped.name
    moved.parent.mkdir(parents=True)
    shutil.move(stopped, moved)
    shutil.move(tmp_path / "runs" / "teachers", tmp_path / "elsewhere" / "teachers")
    assert finish.main([str(moved)]) == 0
    assert (moved / "DONE").exists()


def test_the_latest_run_is_the_default(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert finish.main([]) == 0
    assert (stopped / "DONE").exists()


def test_the_command_line_has_it(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["pkd", "finish", str(stopped)])
    with pytest.raises(SystemExit) as end:
        command()
    assert end.value.code == 0
    assert (stopped / "DONE").exists()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: shutil.rmtree(run), "is no run's directory"),
        (lambda run: (run / "config.yaml").write_text("- 1"), "is no run's directory"),
        (lambda run: (run / "config.yaml").write_text("a: ["), "is no run's directory"),
        (lambda run: (run / "boosting.ckpt").unlink(), "has no student yet"),
        (lambda run: change(run, "seed: 0", "seed: 1"), "its config.yaml is of another run"),
    ],
)
def test_what_cannot_be_finished_is_said(spoil, said: str, stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    spoil(stopped)
    with pytest.raises(SystemExit, match=said):
        finish.main([str(stopped)])


def change(run: Path, old: str, new: str) -> None:
    text = (run / "config.yaml").read_text()
    assert old in text
    (run / "config.yaml").write_text(text.replace(old, new))
