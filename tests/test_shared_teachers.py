"""Runs that want the same teacher train it once: they find it, wait for it, and take its training over."""

import fcntl
import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from safetensors.torch import load_file, save_file

from pkd_lightning import teacher
from pkd_lightning.boosting.loop import BoostingLoop
from pkd_lightning.errors import RunError
from pkd_lightning.fit_checkpoint import Saving
from pkd_lightning.rundir import RunDirectory
from pkd_lightning.shared_teacher import add_lines
from tests import support
from tests.support import ACCEPT, tiny_config, tiny_run
from tests.test_fit_resume import Killed, assert_same, killed_at, students
from tests.test_resume import relabelled

ONE = ("boosting.rounds=1", ACCEPT)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The directories of the teachers that are trained."""
    places: list[Path] = []
    train = teacher.train

    def counted(model: Any, settings: Any, data: Any, place: Any, *rest: Any) -> Any:
        places.append(place.metrics.parent)
        return train(model, settings, data, place, *rest)

    monkeypatch.setattr(teacher, "train", counted)
    return places


def curve(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["stage"] == "teacher"]


def directory(root: Path, *flags: str) -> Path:
    return RunDirectory(tiny_config(root, *flags)).path


def shared_files(root: Path) -> dict[str, Path]:
    (place,) = (root / "teachers").iterdir()
    return {path.name: path for path in place.iterdir()}


def test_nine_jobs_over_students_options_and_seeds_train_three_teachers(tmp_path: Path, trained: list[Path]) -> None:
    settings = ("boosting.alpha=0.4", "boosting.objective=additive", "student.common.d_state=3")
    flags = [(*ONE, "teacher.trainer.max_epochs=2", option, f"seed={seed}") for option in settings for seed in range(3)]
    results = [tiny_run(tmp_path, *job) for job in flags]
    assert len(trained) == len(set(trained)) == 3
    for seed in range(3):
        of_seed = results[seed::3]
        assert len({row["teacher"]["nll"] for row in of_seed}) == 1
        (seconds,) = {row["wall_seconds"]["teacher"] for row in of_seed}  # whoever trained it
        assert seconds > 0
    for job in flags:
        assert [line["epoch"] for line in curve(directory(tmp_path, *job))] == [0, 1]
    weights = [directory(tmp_path, *job) / "teacher" / "teacher.safetensors" for job in flags]
    assert len({path.stat().st_ino for path in weights}) == 3  # links
    for job in (flags[3], flags[8]):  # neither has trained its teacher
        tiny_run(tmp_path / "alone", *job)
        alone, beside = directory(tmp_path / "alone", *job), directory(tmp_path, *job)
        assert_same(alone, beside)
        assert (alone / "teacher/teacher.safetensors").read_bytes() == (
            beside / "teacher/teacher.safetensors"
        ).read_bytes()


def test_what_determines_the_teacher_names_its_directory(tmp_path: Path) -> None:
    def place(*flags: str, data: str = "data") -> Path:
        return RunDirectory(tiny_config(tmp_path, *flags)).shared_teacher(data)

    base = place()
    assert base.parent == tmp_path / "teachers"
    for same in (
        "name=other", "boosting.alpha=0.4", "boosting=paper", "student.common.d_state=3", "logger=tensorboard",
        "teacher.online=true", "trainer.checkpoint_every=3", "teacher.trainer.num_workers=2", "objective=attention",
    ):  # fmt: skip
        assert place(same) == base, same
    others = [
        place(flag)
        for flag in (
            "seed=1", "threads=2", "data.limit=100", "data.split_seed=1", "teacher.model.d_state=3",
            "teacher.trainer.max_epochs=3", "teacher.trainer.optimizer.lr=0.5", "teacher.trainer.precision=bf16-mixed",
            "+data.source.noise=5",
        )
    ]  # fmt: skip
    others += [place(data="other files"), place().parent]
    assert len({base, *others}) == len(others) + 1


def test_other_files_under_the_same_names_have_another_teacher(
    tmp_path: Path, trained: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_run(tmp_path, *ONE)
    original = support.patterns
    monkeypatch.setattr(support, "patterns", lambda root=None: relabelled(original(root)))
    tiny_run(tmp_path, *ONE, "name=other")
    assert len(set(trained)) == 2


def test_a_run_keeps_a_teacher_of_its_own(tmp_path: Path, trained: list[Path]) -> None:
    """Where links fail, it is a copy; and the run goes on without the directory beside it."""

    def stopped(self: BoostingLoop, *given: object) -> None:
        raise Killed

    first = tiny_run(tmp_path, *ONE, "teacher.trainer.max_epochs=2")
    flags = (*ONE, "teacher.trainer.max_epochs=2", "boosting.alpha=0.4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BoostingLoop, "run", stopped)
        patch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("no links")))
        with pytest.raises(Killed):
            tiny_run(tmp_path, *flags)
    run = directory(tmp_path, *flags)
    weights = run / "teacher" / "teacher.safetensors"
    assert weights.stat().st_nlink == 1
    assert weights.read_bytes() == shared_files(tmp_path)["weights.safetensors"].read_bytes()
    shutil.rmtree(tmp_path / "teachers")
    results = tiny_run(tmp_path, *flags)
    assert len(trained) == 1
    assert results["teacher"]["nll"] == first["teacher"]["nll"]
    assert [line["epoch"] for line in curve(run)] == [0, 1]  # once, although it was resumed
    tiny_run(tmp_path, *ONE, "teacher.trainer.max_epochs=2", "boosting.alpha=0.3")  # made anew
    assert len(trained) == 2


@pytest.mark.parametrize("how", ["truncated", "other weights", "no weights", "record", "no record", "other data"])
def test_a_damaged_one_is_trained_again(
    how: str, tmp_path: Path, trained: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    first = tiny_run(tmp_path, *ONE)
    files = shared_files(tmp_path)
    weights, record = files["weights.safetensors"], files["teacher.json"]
    whole = weights.read_bytes()
    if how == "truncated":
        weights.write_bytes(whole[:-10])
    elif how == "other weights":  # valid, without a hash: as a user writes them into the run's file, a hard link
        changed = {name: value + 0.01 for name, value in load_file(weights).items()}
        save_file(changed, tmp_path / "changed")
        weights.write_bytes((tmp_path / "changed").read_bytes())
    elif how == "no weights":
        weights.unlink()
    elif how == "record":
        record.write_text(record.read_text().replace('"epochs": 1', '"epochs": 9'))
    elif how == "no record":
        record.write_text("{}")
    else:  # as where a directory was renamed
        content = {**json.loads(record.read_text()), "data": "other"}
        del content["blake2b"]
        record.write_text(json.dumps(content))
    second = tiny_run(tmp_path, *ONE, "boosting.alpha=0.4")
    assert len(trained) == 2
    assert "the teacher is trained again" in caplog.text
    assert weights.read_bytes() == whole
    assert second["teacher"]["nll"] == first["teacher"]["nll"]
    assert len(files["epochs.jsonl"].read_text().splitlines()) == 1
    tiny_run(tmp_path, *ONE, "boosting.alpha=0.3")
    assert len(trained) == 2


def test_a_killed_training_is_gone_on_with_by_whichever_run_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flags = (*ONE, "trainer.max_epochs=3")
    alphas = [f"boosting.alpha=0.{digit}" for digit in (2, 3, 4)]
    caplog.set_level(logging.INFO)
    with killed_at(11, monkeypatch):  # 8 steps an epoch, and one batch of validation
        for alpha in alphas[:2]:
            with pytest.raises(Killed):
                tiny_run(tmp_path, *flags, alpha)
    assert "this run takes it over" in caplog.text
    for alpha in reversed(alphas):
        tiny_run(tmp_path, *flags, alpha)
        tiny_run(tmp_path / "whole", *flags, alpha)
        one, other = (directory(root, *flags, alpha) for root in (tmp_path, tmp_path / "whole"))
        assert_same(one, other)
        assert [line["epoch"] for line in curve(one)] == [0, 1, 2]
        assert [line["train_loss"] for line in curve(one)] == [line["train_loss"] for line in curve(other)]
    assert not list(shared_files(tmp_path)["fits"].iterdir())
    assert "goes on in epoch 2, after" in caplog.text


def in_a_process(root: Path, *flags: str, die_at: int = 0) -> multiprocessing.Process:
    """A run in a process of its own, which waits for `root`/go at a step of its teacher, and kills itself there."""

    def work() -> None:
        count, after_step = 0, Saving.after_step

        def after(self: Saving, trainer: L.Trainer, module: L.LightningModule) -> None:
            nonlocal count
            count += 1
            after_step(self, trainer, module)
            if count == die_at:
                (root / "training").touch()
                while not (root / "go").exists():
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)

        Saving.after_step = after  # type: ignore[method-assign]
        tiny_run(root, *flags)

    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    return process  # type: ignore[return-value]


def test_it_is_waited_for_and_taken_over_where_its_trainer_dies(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = (*ONE, "trainer.max_epochs=3", "trainer.checkpoint_every=1 epochs")
    process = in_a_process(tmp_path, *flags, die_at=21)
    while not (tmp_path / "training").exists():
        assert process.is_alive()
        time.sleep(0.01)

    def end_it() -> None:
        while "waiting for the teacher" not in caplog.text:
            time.sleep(0.01)
        (tmp_path / "go").touch()

    caplog.set_level(logging.INFO)
    thread = threading.Thread(target=end_it, daemon=True)
    thread.start()
    tiny_run(tmp_path, *flags, "boosting.alpha=0.4")
    process.join()
    assert process.exitcode == -signal.SIGKILL
    holder = f"which another run trains: process {process.pid} on {socket.gethostname()}"
    assert caplog.text.count(holder) == 1
    assert "this run takes it over" in caplog.text
    assert "goes on in epoch 3, after 0 of its batches" in caplog.text
    tiny_run(tmp_path / "whole", *flags, "boosting.alpha=0.4")
    assert_same(tmp_path / "whole", directory(tmp_path, *flags, "boosting.alpha=0.4"))


def test_started_at_once_they_train_it_once(tmp_path: Path) -> None:
    alphas = [f"boosting.alpha=0.{digit}" for digit in (2, 3, 4)]
    processes = [in_a_process(tmp_path, *ONE, "trainer.max_epochs=2", alpha) for alpha in alphas]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(shared_files(tmp_path)["epochs.jsonl"].read_text().splitlines()) == 2
    assert len(students(tmp_path)) == 3
    for alpha in alphas:
        assert [line["epoch"] for line in curve(directory(tmp_path, *ONE, "trainer.max_epochs=2", alpha))] == [0, 1]


def test_an_old_run_has_its_teacher_in_its_directory_and_goes_on_with_it(
    tmp_path: Path, trained: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(BoostingLoop, "run", lambda self, *given: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            tiny_run(tmp_path, *ONE)
    run, files = directory(tmp_path, *ONE), shared_files(tmp_path)
    files["logits.safetensors"].rename(run / "teacher" / "logits.safetensors")
    record = json.loads((run / "teacher" / "teacher.json").read_text())
    del record["weights"], record["blake2b"]  # as the first version wrote it
    (run / "teacher" / "teacher.json").write_text(json.dumps(record))
    shutil.rmtree(tmp_path / "teachers")
    monkeypatch.setattr(teacher, "write_logits", None)
    results = tiny_run(tmp_path, *ONE)
    assert len(trained) == 1
    assert results["wall_seconds"]["teacher"] == record["seconds"]
    assert not (tmp_path / "teachers").exists()
    assert not (run / "teacher" / "logits.safetensors").exists()  # finished


def test_an_old_run_goes_on_in_the_middle_of_its_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flags = (*ONE, "trainer.max_epochs=3")
    with killed_at(15, monkeypatch), pytest.raises(Killed):
        tiny_run(tmp_path, *flags)
    run, files = directory(tmp_path, *flags), shared_files(tmp_path)
    files["fits"].rename(run / "fits")
    shutil.rmtree(tmp_path / "teachers")
    caplog.set_level(logging.INFO)
    tiny_run(tmp_path, *flags)
    assert "goes on in epoch 2, after" in caplog.text
    tiny_run(tmp_path / "whole", *flags)
    assert_same(tmp_path / "whole", run)
    tiny_run(tmp_path, *flags, "boosting.alpha=0.4")
    for one in (run, directory(tmp_path, *flags, "boosting.alpha=0.4")):
        assert [line["epoch"] for line in curve(one)] == [0, 1, 2]


def test_without_locks_each_run_trains_in_its_own_directory_and_still_finds_what_is_there(
    tmp_path: Path, trained: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    tiny_run(tmp_path, *ONE)
    tiny_run(tmp_path, *ONE, "boosting.alpha=0.4")
    assert trained == [directory(tmp_path, *ONE)]
    for flags in (ONE, (*ONE, "boosting.alpha=0.4")):
        assert [line["epoch"] for line in curve(directory(tmp_path, *flags))] == [0]


@pytest.mark.parametrize("what", ["file", "read-only"])
def test_a_directory_that_cannot_be_written_is_one_error(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "file":
        (tmp_path / "teachers").write_text("a file where a directory should be")
    else:
        open_ = Path.open

        def refused(self: Path, *arguments: Any, **options: Any) -> Any:
            if self.name == ".lock" and "teachers" in self.parts:
                raise PermissionError(13, "Permission denied")
            return open_(self, *arguments, **options)

        monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(RunError, match=r"teachers/\w+: cannot be written \(.*choose another run_root"):
        tiny_run(tmp_path, *ONE)


def test_the_curves_go_to_the_tracker_of_the_run_that_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for alpha in ("0.2", "0.3"):
        tiny_run(tmp_path, *ONE, f"boosting.alpha={alpha}", "logger=tensorboard")
    assert len(list(tmp_path.rglob("tensorboard/teacher"))) == 1
    assert len(list(tmp_path.rglob("tensorboard/round-00"))) == 2
    assert "trained before" in caplog.text
    assert "a tracker has its curves in the run that trained it" in caplog.text


def test_the_curve_grows_in_the_run_that_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags, seen = (*ONE, "trainer.max_epochs=3"), []
    after_step = Saving.after_step

    def after(self: Saving, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.name == "teacher":
            run = directory(tmp_path, *flags)
            seen.append((trainer.current_epoch, len(curve(run)) if (run / "metrics.jsonl").exists() else 0))
        after_step(self, trainer, module)

    monkeypatch.setattr(Saving, "after_step", after)
    tiny_run(tmp_path, *flags)
    assert set(seen) == {(0, 0), (1, 1), (2, 2)}


def test_lines_are_added_once_and_torn_ones_are_not(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    lines = [{"stage": "teacher", "epoch": epoch, "train_loss": 0.1 * epoch, "seconds": 1.0} for epoch in range(3)]
    texts = [json.dumps(line) for line in [*lines, {"stage": "round-00", "epoch": 0}]]
    source.write_text("\n".join([texts[0], "[1]", "[" * 100_000, *texts[1:], texts[2][:9]]))
    target.write_text(json.dumps({**lines[0], "seconds": 2.0}) + "\n" + json.dumps({**lines[1], "train_loss": 7}))
    for _ in range(2):
        add_lines(source, target, "teacher")
        rows = [json.loads(text) for text in target.read_text().splitlines()]
        assert [(row["epoch"], row["train_loss"]) for row in rows] == [(0, 0.0), (1, 7), (1, 0.1), (2, 0.2)]
    add_lines(source, source, "teacher")
    add_lines(tmp_path / "nowhere", tmp_path / "new", "teacher")
    assert not (tmp_path / "new").exists()
