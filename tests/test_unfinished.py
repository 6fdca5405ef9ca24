"""An unfinished run: its students so far can be loaded and reported, and both say that it is not finished."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from pkd_lightning import distil
from pkd_lightning.boosting import loop as loop_module
from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.errors import Pruned, RunError
from pkd_lightning.report import compare, main, write_report
from pkd_lightning.reporting import single
from tests.support import ACCEPT, patterns, stopped_after, tiny_run


def test_the_students_so_far_are_the_prefix_of_the_finished_ensemble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = stopped_after(2, tmp_path, monkeypatch)
    images = patterns().images[:5]
    with torch.no_grad():
        unfinished = ProgressiveEnsemble.load(run)
        assert len(unfinished) == 2
        assert "not finished; its first 2 students" in caplog.text
        logits = [*unfinished.anytime(unfinished.preprocess(images))]
        tiny_run(tmp_path, ACCEPT)
        caplog.clear()
        finished = ProgressiveEnsemble.load(run)
        assert len(finished) == 3
        assert not caplog.text
        for members, expected in enumerate(logits, 1):
            torch.testing.assert_close(finished(finished.preprocess(images), members=members), expected)


@pytest.mark.report
def test_an_unfinished_run_is_reported_by_its_validation_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(single, "cards", lambda run: [])
    run = stopped_after(2, tmp_path / "stopped", monkeypatch)
    assert main([str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "not finished: 2 of 3 rounds" in text
    assert "validation images" in text
    assert "test images" not in text
    records = [row for row in json.loads((run / "progress.json").read_text())["rounds"]]
    assert f"{100 * records[1]['prefix_validation_accuracy']:.2f}%" in text

    finished = tiny_run(tmp_path / "finished", ACCEPT)
    (whole,) = (path.parent for path in (tmp_path / "finished").rglob("results.json"))
    for row, end in zip(records, finished["rounds"], strict=False):
        for key in ("edges", "params", "prefix_validation_accuracy", "scales"):
            assert row[key] == end[key]
    with pytest.raises(RunError, match="not finished"):
        compare([run, whole], tmp_path / "page.html")
    capsys.readouterr()
    assert main([str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    assert f"not finished: {run}" in capsys.readouterr().err  # left out of the page, and said so
    assert "test images" in (tmp_path / "page.html").read_text()


@pytest.mark.report
def test_figures_of_an_unfinished_run_name_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = stopped_after(1, tmp_path, monkeypatch)
    text = write_report(run).read_text()
    assert "Accuracy on the validation part of each student" in text
    assert "test part of each student" not in text
    assert {path.stem for path in (run / "figures").glob("*.png")} == {"accuracy_students", "edges", "losses"}


def test_before_the_first_student_there_is_a_report_but_no_ensemble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single, "cards", lambda run: [])
    run = stopped_after(0, tmp_path, monkeypatch)
    with pytest.raises(RunError, match=r"ensemble\.json"):
        ProgressiveEnsemble.load(run)
    assert "0 of 3 rounds" in write_report(run).read_text()


def test_the_description_is_never_ahead_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, seen = loop_module.save_description, []

    def watched(directory: Path, scales: Any, *rest: Any) -> None:
        state = torch.load(directory.parent / "boosting.ckpt", weights_only=True)
        seen.append((len(scales), state["round"], (directory / f"{len(scales) - 1:02d}.json").exists()))
        save(directory, scales, *rest)

    monkeypatch.setattr(loop_module, "save_description", watched)
    tiny_run(tmp_path, ACCEPT)
    assert seen == [(1, 1, True), (2, 2, True), (3, 3, True)]


def test_rounds_started_anew_take_the_old_description_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = stopped_after(2, tmp_path, monkeypatch)
    (run / "boosting.ckpt").unlink()
    stopped_after(0, tmp_path, monkeypatch)
    assert not (run / "students" / "ensemble.json").exists()


def test_a_run_from_before_descriptions_gets_one_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped_after(2, tmp_path, monkeypatch)
    (run / "students" / "ensemble.json").unlink()
    (run / "progress.json").unlink()
    stopped_after(2, tmp_path, monkeypatch)
    assert len(ProgressiveEnsemble.load(run)) == 2
    assert (run / "progress.json").exists()


def test_an_observer_sees_each_round_and_may_end_the_run_which_then_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, bool]] = []

    def observe(results: Mapping[str, Any]) -> None:
        (run,) = tmp_path.glob("digits/*")
        state = torch.load(run / "boosting.ckpt", weights_only=True) if seen else {"round": 0}
        assert len(results["rounds"]) == state["round"]  # it is saved: nothing is lost by ending it
        seen.append((len(results["rounds"]), results["stop_reason"] is not None))
        if seen == [(0, False), (1, False), (2, False)]:
            raise Pruned("others are better")

    monkeypatch.setattr(distil, "this_trial", lambda: observe)
    with pytest.raises(Pruned):
        tiny_run(tmp_path, ACCEPT)
    assert len(tiny_run(tmp_path, ACCEPT)["rounds"]) == 3
    assert seen == [(0, False), (1, False), (2, False), (2, False), (3, True)]
