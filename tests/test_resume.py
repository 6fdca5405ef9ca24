"""A run interrupted between stages continues to the same result; a finished one is only shown."""

import dataclasses
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pkd_lightning.boosting.loop import BoostingLoop
from pkd_lightning.data.images import ImageSet
from pkd_lightning.errors import RunError
from pkd_lightning.rundir import RunDirectory
from tests.support import ACCEPT, tiny_config, tiny_run

SAME = ("accuracy", "prefix_accuracy", "prefix_nll", "edges", "scales", "accepted_by", "validation_loss", "epochs")


class Stopped(Exception):
    """Stands for whatever ends a process between two rounds."""


def outcome(results: dict[str, Any]) -> Any:
    rows = [{key: row[key] for key in SAME} for row in results["rounds"]]
    return rows, results["teacher"]["nll"], results["ensemble"]["nll"]


@pytest.mark.parametrize("objective", ["anchored", "published"])
def test_stopped_between_rounds_resumes_to_the_uninterrupted_result(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = (f"boosting.objective={objective}", ACCEPT)
    whole = tiny_run(tmp_path / "whole", *chosen)

    advance = BoostingLoop.advance

    def advance_twice(self: BoostingLoop) -> None:
        if self.state.round == 2:
            raise Stopped
        advance(self)

    with monkeypatch.context() as patch:
        patch.setattr(BoostingLoop, "advance", advance_twice)
        with pytest.raises(Stopped):
            tiny_run(tmp_path / "parts", *chosen)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").rglob("0[01].safetensors")}
    assert len(before) == 2
    resumed = tiny_run(tmp_path / "parts", *chosen)

    assert outcome(resumed) == outcome(whole)
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").rglob("0[01].safetensors")}
    for student in ("00", "01", "02"):
        (one,) = (tmp_path / "whole").rglob(f"{student}.safetensors")
        (two,) = (tmp_path / "parts").rglob(f"{student}.safetensors")
        first, second = load_file(one), load_file(two)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_stopped_after_the_teacher_does_not_train_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: BoostingLoop, *given: object) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(BoostingLoop, "run", stop)
        with pytest.raises(Stopped):
            tiny_run(tmp_path)
    resumed = tiny_run(tmp_path)
    (metrics,) = tmp_path.rglob("metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert sum(line["stage"] == "teacher" for line in lines) == 1  # one epoch, trained once
    assert outcome(resumed) == outcome(tiny_run(tmp_path / "whole"))


def test_a_finished_run_is_shown_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tiny_run(tmp_path)
    monkeypatch.setattr("pkd_lightning.distil.prepare_teacher", None)  # anything that trains would fail
    monkeypatch.setattr("pkd_lightning.distil.DataModule", None)
    capsys.readouterr()
    assert tiny_run(tmp_path) == first
    shown = capsys.readouterr().out
    assert "report.html" in shown
    assert "teacher" in shown


def test_what_does_not_change_the_result_finds_the_same_directory(tmp_path: Path) -> None:
    same = [("trainer.progress=true",), ("logger=tensorboard",)]
    base = RunDirectory(tiny_config(tmp_path)).path
    for overrides in same:
        assert RunDirectory(tiny_config(tmp_path, *overrides)).path == base
    for override in (
        "threads=2",
        "data.root=elsewhere",
        "seed=1",
        "boosting.alpha=0.4",
        "trainer.max_epochs=2",
        "data.limit=100",
    ):
        assert RunDirectory(tiny_config(tmp_path, override)).path != base


def test_started_twice_the_second_process_stops_with_a_clear_error(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    path = RunDirectory(config).path
    path.mkdir(parents=True)
    with (path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another process is running this experiment"):
            tiny_run(tmp_path)
    with RunDirectory(config).open(config), pytest.raises(RunError) as refused:
        tiny_run(tmp_path)
    assert f"another process ({os.getpid()} on {socket.gethostname()}) is running this experiment" in str(refused.value)
    assert (path / ".lock").read_text() == ""
    assert tiny_run(tmp_path)["stop_reason"]


def test_another_teacher_under_the_same_students_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("pkd_lightning.distil.collect_results", lambda *args: (_ for _ in ()).throw(Stopped()))
        with pytest.raises(Stopped):
            tiny_run(tmp_path)
    (weights,) = tmp_path.rglob("teacher.safetensors")
    changed = {name: value + 0.01 for name, value in load_file(weights).items()}
    save_file(changed, weights)
    with pytest.raises(RunError, match="another teacher"):
        tiny_run(tmp_path)


def test_other_data_under_the_same_teacher_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import support

    with monkeypatch.context() as patch:
        patch.setattr(BoostingLoop, "run", lambda self, *given: (_ for _ in ()).throw(Stopped()))
        with pytest.raises(Stopped):
            tiny_run(tmp_path)
    original = support.patterns
    monkeypatch.setattr(support, "patterns", lambda root=None: relabelled(original(root)))
    with pytest.raises(RunError, match="other data"):
        tiny_run(tmp_path)


def relabelled(data: ImageSet) -> ImageSet:
    return dataclasses.replace(data, labels=(data.labels + 1) % data.num_classes)


def test_two_data_sets_do_not_share_a_run(tmp_path: Path) -> None:
    one, two = (tiny_config(tmp_path, f"data.root={root}") for root in ("a", "b"))
    assert RunDirectory(one).path != RunDirectory(two).path


def test_a_damaged_checkpoint_is_named_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("pkd_lightning.distil.collect_results", lambda *args: (_ for _ in ()).throw(Stopped()))
        with pytest.raises(Stopped):
            tiny_run(tmp_path)
    (checkpoint,) = tmp_path.rglob("boosting.ckpt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:200])
    with pytest.raises(RunError, match=r"boosting\.ckpt"):
        tiny_run(tmp_path)
    assert len(list(tmp_path.rglob("students/*.safetensors"))) == 3


def test_the_teachers_logits_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pkd_lightning.teacher as teacher_module

    calls = []
    predict = teacher_module.predict
    monkeypatch.setattr(teacher_module, "predict", lambda *args, **kwargs: calls.append(1) or predict(*args, **kwargs))
    advance = BoostingLoop.advance
    monkeypatch.setattr(BoostingLoop, "advance", lambda self: (_ for _ in ()).throw(Stopped()))
    for _ in range(2):
        with pytest.raises(Stopped):
            tiny_run(tmp_path)
    assert len(calls) == 1
    monkeypatch.setattr(BoostingLoop, "advance", advance)
    tiny_run(tmp_path)
    assert len(calls) == 1
