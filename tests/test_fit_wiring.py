"""Who is told what in a fit, its checkpoints, the shared teacher and the evaluation: lines no result depends on."""

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from pkd_lightning import evaluate as evaluation
from pkd_lightning import fitting
from pkd_lightning.assembling import assemble
from pkd_lightning.checkpoint import read_json
from pkd_lightning.cost import Cost
from pkd_lightning.data.module import DataConfig, DataModule
from pkd_lightning.errors import ConfigError
from pkd_lightning.fit_checkpoint import FitCheckpoint, Saving
from pkd_lightning.fit_module import FitModule
from pkd_lightning.fitting import FitTrainer, Stage, compile_errors, fit
from pkd_lightning.loggers import NoTracker
from pkd_lightning.process import stop
from pkd_lightning.shared_teacher import SharedTeacher
from pkd_lightning.tasks import ImageClassification, SignalClassification
from pkd_lightning.teacher import TeacherModule, fingerprint, prepare_teacher
from pkd_lightning.trainer import Interval
from tests.support import patterns, tiny_config
from tests.test_evaluate import evaluated, parts
from tests.test_fitting import images, network, settings, stage

__all__ = ["parts"]
STEPS = 28  # of an epoch of `images()`
CHECKPOINT = {"checkpoint_every": "1 epochs"}


# ---------------------------------------------------------------------------------- a fit


def test_lightning_says_no_more_than_warnings() -> None:
    assert logging.getLogger("lightning.pytorch").level == logging.WARNING


def test_a_failure_of_the_compiler_is_its_first_two_lines() -> None:
    with pytest.raises(ConfigError, match=r"\(first second\); trainer.compile=false"), compile_errors():
        raise TorchDynamoException("first\nsecond\nthird")


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_where_it_is_asked_for(
    progress: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[Any, ...]] = []
    monkeypatch.setattr(fitting, "progress_of", lambda *given: shown.append(given) or L.Callback())
    fit(TeacherModule(network(), settings(progress=progress, max_epochs=1)), images(), stage(tmp_path))
    assert shown == ([("teacher", STEPS)] if progress else [])


def test_the_trainer_is_told_to_do_no_more_than_a_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    class Trainer(FitTrainer):
        def __init__(self, **arguments: Any) -> None:
            told.update(arguments)
            super().__init__(**arguments)
            told["checkpoints"] = self.checkpoint_callbacks

    monkeypatch.setattr(fitting, "FitTrainer", Trainer)
    fit(TeacherModule(network(), settings(max_epochs=1)), images(), stage(tmp_path))
    assert (told["devices"], told["accelerator"], told["num_sanity_val_steps"]) == (1, "cpu", 0)
    assert not any(told[f"enable_{name}"] for name in ("progress_bar", "model_summary"))
    assert [type(one) for one in told["checkpoints"]] == [Saving]  # none of Lightning's own
    assert told["logger"] is False
    assert told["default_root_dir"] == tmp_path / "lightning"
    assert not (tmp_path / "lightning").exists()


class Positions(Saving):
    """Notes how many batches of the epoch are done whenever it is asked to save."""

    seen: list[tuple[int, bool]]

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, FitModule)
        self.seen.append((pl_module._batch, trainer.validating or trainer.state.stage == "validate"))
        super().after_step(trainer, pl_module)


@pytest.mark.parametrize("mode", ["fast", "step"])
def test_a_fit_looks_whether_to_save_after_every_step(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "Saving", Positions)
    monkeypatch.setattr(Positions, "seen", [], raising=False)
    module = TeacherModule(network(), settings(mode=mode, max_epochs=1))
    assert module.progress()["batch"] == 0
    trained: list[int] = []
    monkeypatch.setattr(module, "_trained", lambda: trained.append(module._batch))
    fit(module, images(), stage(tmp_path))
    assert trained == [STEPS]
    steps = [batch for batch, validating in Positions.seen if not validating]
    # in the step mode not after the last: the epoch's end follows
    assert steps == [*range(1, STEPS + (mode == "fast"))]
    validated = [batch for batch, validating in Positions.seen if validating]
    assert validated == ([STEPS] if mode == "fast" else [])


# ---------------------------------------------------------------------------------- its checkpoints


def test_what_writing_takes_is_measured(tmp_path: Path) -> None:
    times = iter([10.0, 20.0, 23.5])
    checkpoint = FitCheckpoint(tmp_path / "fit.ckpt", Interval.of("auto"), "mine", lambda: next(times))
    checkpoint.write({"epoch": 1})
    assert (checkpoint.last, checkpoint.cost) == (23.5, 3.5)


class Scaler:
    """A gradient scaler's state."""

    def __init__(self) -> None:
        self.loaded: Any = None

    def load_state_dict(self, state: Any) -> None:
        self.loaded = state


class Kept(L.Callback):
    """Notes what it is given when a fit is saved and resumed."""

    def __init__(self) -> None:
        self.given: list[tuple[type, ...]] = []

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        self.given.append((type(trainer), type(pl_module), type(checkpoint)))

    on_load_checkpoint = on_save_checkpoint


def test_a_resumed_fit_restores_scaler_and_callbacks() -> None:
    callback, scaler = Kept(), Scaler()
    saving = Saving("teacher", None, [callback])
    module = TeacherModule(network(), settings())
    saving.resumed = {
        "module": {"state_dict": module.state_dict()}, "optimizers": [], "schedules": [], "scaler": {"scale": 2.0},
        "callbacks": {callback.state_key: {}}, "progress": {**module.progress(), "batch": 5},
    }  # fmt: skip
    trainer: Any = SimpleNamespace(
        optimizers=[], lr_scheduler_configs=[], precision_plugin=SimpleNamespace(scaler=scaler)
    )
    saving.on_train_start(trainer, module)
    assert scaler.loaded == {"scale": 2.0}
    assert callback.given == [(SimpleNamespace, TeacherModule, dict)]
    assert module.progress()["batch"] == 5


def test_callbacks_are_given_the_trainer_the_module_and_the_checkpoint(tmp_path: Path) -> None:
    callback = Kept()
    place = Stage("teacher", 0, tmp_path / "metrics.jsonl", checkpoint=tmp_path / "fit.ckpt")
    fit(TeacherModule(network(), settings(max_epochs=2, **CHECKPOINT)), images(), place, (), [callback])
    assert callback.given == [(FitTrainer, TeacherModule, dict)]


@pytest.mark.parametrize("mode", ["fast", "step"])
def test_only_batches_of_the_step_mode_are_counted_for_lightning(mode: str, tmp_path: Path) -> None:
    module = TeacherModule(network(), settings(mode=mode))
    saving = Saving("teacher", None, [])
    trainer = FitTrainer(max_epochs=2, logger=False, enable_checkpointing=False, accelerator="cpu")
    loader: Any = SimpleNamespace(sampler=SimpleNamespace(left_out=None))
    saving.resume(trainer, module, loader, {"epoch": 1, "steps": 30, "seconds": 2.0, "progress": {"batch": 7}})
    assert saving.left_out == (7 if mode == "step" else 0)
    assert loader.sampler.left_out == (1, 7)
    loops = trainer.fit_loop.epoch_loop
    manual, automatic = loops.manual_optimization.optim_step_progress, loops.automatic_optimization.optim_progress
    assert (automatic.optimizer.step if mode == "step" else manual).total.completed == 30
    assert trainer.current_epoch == 1
    assert saving.seconds >= 2.0


@pytest.mark.parametrize("kept", [True, False])
def test_a_signal_at_the_end_of_an_epoch_ends_the_fit_there(kept: bool, tmp_path: Path) -> None:
    class Signal(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 1:
                stop.signal = 15

    place = Stage("teacher", 0, tmp_path / "metrics.jsonl", checkpoint=tmp_path / "fit.ckpt" if kept else None)
    module = TeacherModule(network(), settings(max_epochs=9, checkpoint_every=60))
    with pytest.raises(SystemExit) as end:
        fit(module, images(), place, (), [Signal()])
    assert end.value.code == 143
    assert stop.signal is None
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "fit.ckpt").exists() == kept
    if kept:
        assert torch.load(tmp_path / "fit.ckpt", weights_only=True)["epoch"] == 2


# ---------------------------------------------------------------------------------- teachers


def made(tmp_path: Path, shared: Path | None = None) -> tuple[Any, DataModule, Path]:
    """A teacher trained for an epoch, its data, and the run's directory."""
    config = assemble(tiny_config(tmp_path)).teacher
    data, run = DataModule(DataConfig(patterns)), tmp_path / "run"
    place = Stage("teacher", 0, run / "metrics.jsonl", checkpoint=run / "fits" / "teacher.ckpt")
    run.mkdir(parents=True)
    tracker = NoTracker(run, None, {})  # type: ignore[arg-type]
    return prepare_teacher(config, data, run / "teacher", shared or tmp_path / "shared", place, tracker), data, run


def test_a_teacher_is_in_evaluation_and_has_no_gradients(tmp_path: Path) -> None:
    teacher, _, _ = made(tmp_path)
    assert not any(module.training for module in teacher.model.modules())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_the_fingerprint_of_a_teacher_is_what_it_was() -> None:
    """Students and logits are found by it: another hash of the same would train them all again."""
    model = nn.Linear(2, 1)
    model.load_state_dict({"weight": torch.tensor([[0.5, -1.0]]), "bias": torch.tensor([0.25])})
    data: Any = SimpleNamespace(fingerprint="data")
    assert fingerprint(model, data) == "2905d7d32439836a47897db9540475af"


def test_the_files_of_a_shared_teacher(tmp_path: Path) -> None:
    _, data, run = made(tmp_path)
    shared = tmp_path / "shared"
    names = {path.name for path in shared.iterdir()}
    assert {"epochs.jsonl", "weights.safetensors", "teacher.json", "logits.safetensors"} <= names
    for path in (shared / "teacher.json", run / "teacher" / "teacher.json"):  # each can be checked
        text = json.loads(path.read_text())
        assert "blake2b" in text
        assert text["data"] == data.fingerprint
        path.write_text(path.read_text().replace('"epochs": 1', '"epochs": 7'))
        with pytest.raises(Exception, match="damaged"):
            read_json(path)
    (line,) = [json.loads(line) for line in (shared / "epochs.jsonl").read_text().splitlines()]
    (own,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {**line, "seconds": 0} == {**own, "seconds": 0}


def test_a_run_that_finds_a_teacher_gets_its_lines(tmp_path: Path) -> None:
    made(tmp_path / "one", tmp_path / "shared")
    _, _, run = made(tmp_path / "two", tmp_path / "shared")
    assert [json.loads(line)["stage"] for line in (run / "metrics.jsonl").read_text().splitlines()] == ["teacher"]
    assert os.path.samefile(tmp_path / "shared" / "weights.safetensors", run / "teacher" / "teacher.safetensors")


def test_a_training_begins_in_the_shared_directory_and_takes_what_the_run_has_begun(tmp_path: Path) -> None:
    teacher = SharedTeacher(tmp_path / "shared", "data")
    (tmp_path / "shared").mkdir()
    own = tmp_path / "fits" / "teacher.ckpt"
    own.parent.mkdir()
    own.write_bytes(b"begun")
    place = teacher.begin(Stage("teacher", 0, tmp_path / "metrics.jsonl", checkpoint=own))
    assert place.metrics == tmp_path / "shared" / "epochs.jsonl"
    assert place.checkpoint == tmp_path / "shared" / "fits" / "teacher.ckpt"
    assert place.checkpoint.read_bytes() == b"begun"
    assert not own.exists()
    own.write_bytes(b"another")  # what is there already stays
    teacher.begin(Stage("teacher", 0, tmp_path / "metrics.jsonl", checkpoint=own))
    assert place.checkpoint.read_bytes() == b"begun"
    assert own.exists()


def test_a_damaged_teacher_without_lines_is_one_that_is_not_there(tmp_path: Path) -> None:
    made(tmp_path)
    shared = tmp_path / "shared"
    teacher = SharedTeacher(shared, "other data")
    (shared / "epochs.jsonl").unlink()
    assert not teacher.found()
    assert not (shared / "teacher.json").exists()


# ---------------------------------------------------------------------------------- the experiment's checks


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_ladder_must_have_rungs_for_the_new_rounds_only(rounds: int, tmp_path: Path) -> None:
    """Of a run that grows from another one, whose rounds need none."""
    flags = ("student.rungs=[{n_blocks: 1, d_model: 3}]", f"boosting.rounds={rounds}")
    data = DataModule(DataConfig(patterns))
    if rounds == 1:
        assemble(tiny_config(tmp_path, *flags)).check(data)
        return
    with pytest.raises(ConfigError, match="student"):
        assemble(tiny_config(tmp_path, *flags)).check(data)
    for name in ("config.yaml", "boosting.ckpt", "students"):
        (tmp_path / name).mkdir()
    assemble(tiny_config(tmp_path, *flags, f"boosting.grow_from={tmp_path}")).check(data)


@pytest.mark.parametrize("weights", ["none", "samples"])
def test_a_loss_is_tried_with_weights_where_it_gets_some(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pkd_lightning.boosting.objectives import Independent

    given: list[Any] = []
    loss = Independent.loss
    monkeypatch.setattr(Independent, "loss", lambda self, batch: given.append(batch.weight) or loss(self, batch))
    experiment = assemble(tiny_config(tmp_path, "boosting.objective=independent", f"boosting.weights={weights}"))
    experiment.check(DataModule(DataConfig(patterns)))
    (weight,) = given  # once: it needs no features, so that it is the same for all rungs
    assert (weight is None) == (weights == "none")


@pytest.mark.parametrize(("a", "c", "fails"), [(1.0, 1.0, False), (1.0, 0.0, True), (0.0, 1.0, True)])
def test_scales_must_begin_above_0(a: float, c: float, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from pkd_lightning import experiment
    from pkd_lightning.boosting.combine import Combination

    monkeypatch.setattr(experiment, "combination_of", lambda config: Combination(lambda round_: (a, c)))
    tried: Any = SimpleNamespace(boosting=None)
    if fails:
        with pytest.raises(ConfigError, match="not two positive numbers"):
            experiment.Experiment._try_combination(tried)
    else:
        experiment.Experiment._try_combination(tried)


# ---------------------------------------------------------------------------------- evaluation and tasks


@pytest.mark.parametrize(("part", "whole", "expected"), [(1, 4, 0.25), (None, 4, None), (3, None, None), (5, 0, 5.0)])
def test_a_part_of_the_teachers_cost(part: int | None, whole: int | None, expected: float | None) -> None:
    assert evaluation._fraction(part, whole) == expected


def test_the_ensembles_cost_is_the_sum_of_its_students(parts: Any, tmp_path: Path) -> None:
    _, teacher, ensemble = parts
    found = evaluated(parts, tmp_path)
    each = sum(parameter.numel() for parameter in ensemble.members[0].parameters())
    assert found["ensemble"]["params"] == 3 * each
    assert found["ensemble"]["fraction_of_teacher"]["params"] == 3.0
    assert [row["params"] for row in found["rounds"]] == [each] * 3
    costs = [Cost(row["params"], row["flops_published"], row["macs_total"]) for row in found["rounds"]]
    assert (costs[0] + costs[1] + costs[2]).macs_total == found["ensemble"]["macs_total"]
    assert not any(parameter.is_cuda for parameter in teacher.model.parameters())


def test_latency_is_of_one_image(parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = parts[0]
    asked: list[torch.Tensor] = []
    from pkd_lightning.cost import Latency

    monkeypatch.setattr(evaluation, "latency", lambda forward, image: asked.append(image) or Latency(1.0, False))
    evaluated(parts, tmp_path)
    first = data.task.prepare(data.inputs[data.test.start : data.test.start + 1])
    assert len(asked) == 7
    assert all(image.equal(first) for image in asked)


def test_the_hardware_of_a_result_is_named() -> None:
    found = evaluation.hardware()
    assert found["cpu"]
    assert (found["cores"], found["threads"]) == (os.cpu_count(), torch.get_num_threads())
    assert (found["gpu"] is None) == (not torch.cuda.is_available())


def test_preparing_signals_leaves_them_as_they_are() -> None:
    signals = torch.rand(4, 1, 16)
    before = signals.clone()
    task = SignalClassification.fitted(signals, 3)
    assert not task.prepare(signals).equal(before)
    assert signals.equal(before)


def test_the_statistics_of_images_are_of_pixels_from_0_to_1() -> None:
    images = torch.tensor([0, 51, 255, 102], dtype=torch.uint8).view(1, 1, 2, 2)
    task = ImageClassification.fitted(images, 3)
    assert float(task.mean) == pytest.approx(0.4)
    assert float(task.std) == pytest.approx(((0.16 + 0.04 + 0.36 + 0.0) / 4) ** 0.5)
