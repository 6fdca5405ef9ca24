"""A fit that is stopped anywhere goes on from its checkpoint, to the same bits."""

import json
import logging
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from safetensors.torch import load_file

from pkd_lightning import fit_checkpoint, fitting, rundir
from pkd_lightning.assembling import assemble
from pkd_lightning.boosting.loop import BoostingLoop
from pkd_lightning.errors import ConfigError
from pkd_lightning.fit_checkpoint import FitCheckpoint, Saving, flat, remove_all
from pkd_lightning.fitting import EpochLines
from pkd_lightning.process import stop, stopped_by_signals
from pkd_lightning.rundir import RunDirectory
from pkd_lightning.trainer import Interval
from tests.support import ACCEPT, TINY, stopped_by, tiny_config, tiny_run

ROOT = Path(__file__).parent.parent
TIMES = ("seconds", "latency")


class Killed(BaseException):
    """Stands for whatever ends a process."""


def timeless(value: Any) -> Any:
    """Without what differs from one run to the next."""
    if isinstance(value, dict):
        return {key: timeless(inner) for key, inner in value.items() if not any(word in key for word in TIMES)}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def students(root: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(path) for path in sorted(root.rglob("students/*.safetensors"))]


def assert_same(one: Path, other: Path) -> None:
    """That two runs gave the same, to the last bit."""
    for path in ("results.json", "progress.json"):
        for first, second in zip(one.rglob(path), other.rglob(path), strict=True):
            assert timeless(json.loads(first.read_text())) == timeless(json.loads(second.read_text()))
    assert len(students(one)) == len(students(other)) > 0
    for mine, its in zip(students(one), students(other), strict=True):
        assert all(torch.equal(mine[name], its[name]) for name in mine)


@contextmanager
def killed_at(every: int, patch: pytest.MonkeyPatch, save: bool = True) -> Iterator[list[str]]:
    """Each process is killed after so many steps and batches of validation, where it has just been saved, or not."""
    after_step = Saving.after_step
    kills: list[str] = []
    count = 0

    def after(self: Saving, trainer: L.Trainer, module: L.LightningModule) -> None:
        nonlocal count
        count += 1
        if count % every == 0:
            kills.append(f"{self.name} {trainer.current_epoch}")
            if save:
                self.save(trainer, module, trainer.current_epoch)
            raise Killed
        after_step(self, trainer, module)

    with patch.context() as patched:
        patched.setattr(Saving, "after_step", after)
        yield kills


def run_until_done(root: Path, *flags: str) -> dict[str, Any]:
    for _ in range(200):
        try:
            return tiny_run(root, *flags)
        except Killed:
            pass
    raise AssertionError("the run never ends")


DROPOUT = "+student.common.mixer=tests.test_fit_resume.Dropping"


class Dropping(torch.nn.Module):
    """A mixer that draws random numbers in training."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(d_model, d_model), torch.nn.Dropout(0.3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.layers(tokens)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("every", "options"),
    [
        (3, ("trainer.max_epochs=2",)),
        (9, ("trainer.max_epochs=3", DROPOUT, "boosting.objective=additive")),
        (5, ("boosting=paper", "trainer.max_epochs=3", "boosting.weak_learner.check_every=1")),
        (5, ("trainer.max_epochs=3", "trainer.mode=step")),
        (5, ("trainer.max_epochs=3", DROPOUT, "+trainer.lightning.accumulate_grad_batches=2",
             "trainer.callbacks=[{_target_: lightning.pytorch.callbacks.EMAWeightAveraging, decay: 0.8}]")),
        (23, ("trainer.max_epochs=4", "trainer.patience=1", "boosting.weak_learner.max_attempts=2",
              "boosting.weak_learner.min_improvement=0.9")),
    ],
)  # fmt: skip
def test_killed_after_any_step_it_gives_the_same_bits(
    every: int, options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (ACCEPT, *options)
    tiny_run(tmp_path / "whole", *flags)
    with killed_at(every, monkeypatch) as kills:
        run_until_done(tmp_path / "parts", *flags)
    assert len(kills) > 5
    assert {kill.split()[0] for kill in kills} >= {"teacher", "round-02"}
    assert_same(tmp_path / "whole", tmp_path / "parts")
    assert not list(tmp_path.rglob("fits/*"))


STOPPING = (
    "trainer.callbacks=[{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: validation_loss, patience: 1}]"
)


@pytest.mark.parametrize("stopping", [("trainer.patience=1",), ("trainer.patience=null", STOPPING)])
def test_killed_after_each_epochs_checkpoint_it_stops_as_early(
    stopping: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The callbacks that stop early have looked at the epoch that is saved."""
    flags = (ACCEPT, "boosting.rounds=1", "trainer.max_epochs=30", "trainer.optimizer.lr=0.1", *stopping,
             "trainer.checkpoint_every=1 epochs")  # fmt: skip
    whole = tiny_run(tmp_path / "whole", *flags)
    save = Saving.save
    kills = []

    def saved(self: Saving, trainer: L.Trainer, module: L.LightningModule, epoch: int) -> None:
        save(self, trainer, module, epoch)
        kills.append(epoch)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Saving, "save", saved)
        run_until_done(tmp_path / "parts", *flags)
    assert whole["rounds"][0]["epochs"] < 30
    assert len(kills) > 4
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_an_epochs_seconds_are_those_of_all_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(fitting, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    trainer: Any = SimpleNamespace(
        callback_metrics={}, current_epoch=3, optimizers=[SimpleNamespace(param_groups=[{"lr": 1}])]
    )
    module: Any = None

    def later(lines: EpochLines, seconds: float, *hooks: str) -> None:
        for hook in hooks:
            clock[0] += seconds
            getattr(lines, hook)(trainer, module)

    first, second = (EpochLines(tmp_path / "metrics.jsonl", "round-00", 0) for _ in range(2))
    assert first.state_dict() == {"seconds": 0.0}  # saved before it begins
    later(first, 2, "on_train_epoch_start", "on_validation_end", "on_train_epoch_start")
    clock[0] += 4
    second.load_state_dict(first.state_dict())
    clock[0] += 1000  # until it is resumed
    later(second, 8, "on_train_epoch_start", "on_validation_end")
    assert second.state_dict() == {"seconds": 0.0}
    later(second, 16, "on_train_epoch_start", "on_validation_end")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["seconds"] for line in lines] == [2, 4 + 8, 16]


def test_without_checkpoints_a_fit_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = (ACCEPT, "boosting.rounds=2", "trainer.checkpoint_every=null")
    tiny_run(tmp_path / "whole", *flags)
    with killed_at(13, monkeypatch, save=False) as kills:
        run_until_done(tmp_path / "parts", *flags)
    assert kills
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_a_fit_that_has_ended_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt that failed, while the next one is under way; and one that is not yet in the residual matrices."""
    flags = ("boosting.rounds=2", "boosting.weak_learner.max_attempts=3", "boosting.weak_learner.min_improvement=0.9",
             "boosting=paper", "boosting.weak_learner.require=improvement")  # fmt: skip
    monkeypatch.setattr(fit_checkpoint, "FIRST_COST", 0.0)  # however short the fit was
    tiny_run(tmp_path / "whole", *flags)
    accept = BoostingLoop.accept

    def killed(self: BoostingLoop, *given: Any) -> None:
        if self.state.round == 1:
            raise Killed
        accept(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(BoostingLoop, "accept", killed)
        with pytest.raises(Killed):
            tiny_run(tmp_path / "parts", *flags)
    (metrics,) = (tmp_path / "parts").rglob("metrics.jsonl")
    before = metrics.read_text()
    assert before.count('"round-01"') == 3
    tiny_run(tmp_path / "parts", *flags)
    assert metrics.read_text() == before  # no epoch more
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_a_fit_that_failed_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("trainer.optimizer.lr=1e30", "trainer.gradient_clip=null", "boosting.rounds=1", ACCEPT,
             "teacher.trainer.optimizer.lr=0.01")  # fmt: skip
    monkeypatch.setattr(fit_checkpoint, "FIRST_COST", 0.0)
    with pytest.raises(Exception, match="no student at all"):
        tiny_run(tmp_path, *flags)


def damaged(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = bytearray()
    else:
        content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped"])
@pytest.mark.parametrize("which", ["newest", "both"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(
    how: str, which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flags = (ACCEPT, "boosting.rounds=1", "trainer.max_epochs=4", "trainer.checkpoint_every=1 epochs")
    tiny_run(tmp_path / "whole", *flags)
    with killed_at(3 * 8 + 3, monkeypatch, save=False), pytest.raises(Killed):  # in the teacher's fourth epoch
        tiny_run(tmp_path / "parts", *flags)
    (newest,) = tmp_path.rglob("fits/teacher.ckpt")
    previous = newest.with_name("teacher.ckpt.previous")
    for path in (newest, previous) if which == "both" else (newest,):
        damaged(path, how)
    caplog.set_level(logging.INFO)
    tiny_run(tmp_path / "parts", *flags)
    assert "teacher.ckpt: this checkpoint is damaged" in caplog.text
    assert ("the one before it is used" in caplog.text) == (which == "newest") or "none is used" in caplog.text
    assert ("goes on in epoch 3, after 0 of its batches" in caplog.text) == (which == "newest")
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_a_fit_goes_on_where_the_gpus_that_saved_it_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flags = (ACCEPT, "boosting.rounds=1", "trainer.max_epochs=4", "trainer.checkpoint_every=1 epochs")
    tiny_run(tmp_path / "whole", *flags)
    elsewhere = [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 1)
    with pytest.MonkeyPatch.context() as saving, killed_at(3 * 8 + 3, monkeypatch, save=False):
        saving.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")
        saving.setattr(torch.cuda, "get_rng_state_all", lambda: elsewhere)
        with pytest.raises(Killed):
            tiny_run(tmp_path / "parts", *flags)
    restored: list[int] = []  # Lightning restores what it has taken itself
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda states: restored.append(len(states)))
    caplog.set_level(logging.INFO)
    tiny_run(tmp_path / "parts", *flags)
    assert "goes on in epoch 4, after 0 of its batches" in caplog.text
    assert len(elsewhere) not in restored
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_a_fit_saved_without_a_gradient_scaler_goes_on_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a GPU, what a CPU has saved at `16-mixed`."""
    flags = (ACCEPT, "boosting.rounds=1", "trainer.precision=16-mixed", "trainer.checkpoint_every=1 epochs")
    with killed_at(2 * 8 + 3, monkeypatch, save=False), pytest.raises(Killed):
        tiny_run(tmp_path, *flags, "trainer.max_epochs=3")
    make, scalers = fitting._trainer, []

    def scaled(*arguments: Any) -> L.Trainer:
        trainer: Any = make(*arguments)
        scalers.append(torch.amp.GradScaler("cpu", init_scale=2.0))
        trainer.precision_plugin.scaler = scalers[-1]
        return trainer

    monkeypatch.setattr(fitting, "_trainer", scaled)
    caplog.set_level(logging.INFO)
    tiny_run(tmp_path, *flags, "trainer.max_epochs=3")
    assert "goes on in epoch 3, after 0 of its batches" in caplog.text
    assert scalers[0].get_scale() == 2.0  # its own


def test_a_run_goes_on_in_the_directory_of_another_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As the guide says: started, stopped, and the old directories copied over the new ones."""
    flags = (ACCEPT, "boosting.rounds=1", "trainer.max_epochs=4", "trainer.checkpoint_every=1 epochs")
    tiny_run(tmp_path / "whole", *flags)

    def killed(steps: int) -> set[Path]:
        with killed_at(steps, monkeypatch, save=False), pytest.raises(Killed):
            tiny_run(tmp_path / "parts", *flags)
        return {path for path in (tmp_path / "parts").glob("*/*") if path.is_dir() and path.parent.name != "latest"}

    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(rundir, "device_of", lambda accelerator: "gpu")
        before = killed(60)  # in the student's last epoch
    new = {path.parent: path for path in killed(2) - before}
    for path in before:
        shutil.copytree(path, new[path.parent], dirs_exist_ok=True)
        shutil.rmtree(path)
    caplog.set_level(logging.INFO)
    tiny_run(tmp_path / "parts", *flags)
    assert "round-00: goes on in epoch 4" in caplog.text
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_between_the_two_moves_of_a_write_the_one_before_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = FitCheckpoint(tmp_path / "fit.ckpt", Interval(automatic=True), "mine")
    checkpoint.write({"epoch": 1})
    replace = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if target == checkpoint.path:
            raise Killed
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(Killed):
        checkpoint.write({"epoch": 2})
    monkeypatch.undo()
    assert checkpoint.read() == {"epoch": 1}
    checkpoint.write({"epoch": 3})
    assert checkpoint.read() == {"epoch": 3}
    remove_all(tmp_path)
    assert checkpoint.read() is None
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_fit_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    FitCheckpoint(tmp_path / "fit.ckpt", Interval(automatic=True), "mine").write({"epoch": 1, "weights": torch.ones(2)})
    assert FitCheckpoint(tmp_path / "fit.ckpt", Interval(automatic=True), "another").read() is None
    assert "is of another fit" in caplog.text


def test_what_a_checkpoint_cannot_hold_is_said() -> None:
    assert dict(flat({"a": [1, {"b": None}], "c": {}})).keys() == {"{}", ".a[]", ".a.0", ".a.1{}", ".a.1.b", ".c{}"}
    with pytest.raises(TypeError, match=r"callbacks\.Mine is a object, no tensor and no number"):
        dict(flat({"callbacks": {"Mine": object()}}))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_when_a_checkpoint_is_due(tmp_path: Path) -> None:
    clock = Clock()

    def checkpoint(every: object) -> FitCheckpoint:
        return FitCheckpoint(tmp_path / "fit.ckpt", Interval.of(every), "", clock)

    automatic, minutes, epochs, never = map(checkpoint, ("auto", 2, "3 epochs", None))
    for now, due in ((29.0, []), (30.0, [automatic]), (119.0, [automatic]), (120.0, [automatic, minutes])):
        clock.now = now
        assert [one for one in (automatic, minutes, epochs, never) if one.due()] == due
    assert [epochs.due_after(count) for count in (1, 2, 3, 4, 6)] == [False, False, True, False, True]
    assert [never.due_after(3), never.worth_keeping(), epochs.worth_keeping()] == [False, False, True]
    clock.now = 1000.0
    automatic.write({"epoch": 1})
    for cost, wait in ((0.1, 30), (2.0, 100), (60.0, 300)):  # 2%, but not more than five minutes
        automatic.last, automatic.cost = clock.now, cost
        clock.now += wait - 1
        assert not automatic.due()
        clock.now += 1
        assert automatic.due()
    automatic.last, automatic.cost = clock.now, 1.0
    clock.now += 49
    assert not automatic.worth_keeping()
    clock.now += 1
    assert automatic.worth_keeping()


@pytest.mark.parametrize("value", ["often", "0 epochs", "-1", "0", "true", ".inf", "'3 minutes'", "[1]"])
def test_what_is_no_interval_is_a_fault(value: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.checkpoint_every=.*: must be auto, a number of minutes above 0"):
        assemble(tiny_config(tmp_path, f"++trainer.checkpoint_every={value}"))


def test_how_often_a_fit_is_saved_does_not_name_another_run(tmp_path: Path) -> None:
    places = {
        RunDirectory(
            tiny_config(tmp_path, *(f"++{of}trainer.checkpoint_every={value}" for of in ("", "teacher.")))
        ).path
        for value in ("auto", "5", "'3 epochs'", "null")
    }
    assert len(places) == 1


def test_a_signal_outside_of_a_step_waits_for_its_end(tmp_path: Path) -> None:
    inherited = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    done = []

    def step(signals: int) -> None:
        with stopped_by_signals(), stop.deferred():
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGUSR1)
            done.append(signals)

    try:
        with pytest.raises(SystemExit) as end:
            step(1)
        assert (end.value.code, done, stop.signal) == (138, [1], None)
        with pytest.raises(SystemExit):
            step(2)  # the second one is not waited for
        assert (done, stop.signal, stop.deferring) == ([1], None, False)
    finally:
        signal.signal(signal.SIGUSR1, inherited)


def test_an_end_of_lightnings_own_by_a_signal_has_the_signals_exit_code() -> None:
    inherited = signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def fit() -> None:
        with stopped_by_signals(), stop.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            raise SIGTERMException

    try:
        with pytest.raises(SystemExit) as end:
            fit()
        assert (end.value.code, stop.signal, stop.deferring) == (143, None, False)
    finally:
        signal.signal(signal.SIGTERM, inherited)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_saves_the_fit_first(number: int, code: int, tmp_path: Path) -> None:
    flags = [
        *TINY,
        "trainer.max_epochs=400",
        "trainer.patience=null",
        "boosting.rounds=1",
        "teacher.trainer.max_epochs=1",
    ]
    stopped, out, said = stopped_by(number, tmp_path, flags, lambda lines: sum("round-00" in one for one in lines) > 3)
    assert stopped == code
    assert f"round-00: stopped by {number.name}; saved in epoch" in out
    assert "the same command goes on" in said
    trained = [json.loads(line) for path in tmp_path.rglob("metrics.jsonl") for line in path.read_text().splitlines()]
    (path,) = tmp_path.rglob("fits/round-00-0.ckpt")
    assert torch.load(path, weights_only=True)["epoch"] >= trained[-1]["epoch"] > 2
