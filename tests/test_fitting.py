"""A fit equals a plain loop of optimiser steps, whatever is fetched, compiled, clipped or scheduled on the way."""

import json
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.nn import functional as F

from pkd_lightning.assembling import assemble
from pkd_lightning.boosting.combine import learned
from pkd_lightning.boosting.objectives import Additive
from pkd_lightning.boosting.options import BoostingConfig
from pkd_lightning.boosting.student import RoundTargets, StudentModule
from pkd_lightning.data import epochs
from pkd_lightning.data.epochs import EpochLoader
from pkd_lightning.data.module import Batch, BatchDataset, DataConfig, DataModule
from pkd_lightning.errors import ConfigError, RunError
from pkd_lightning.fit_module import FitModule
from pkd_lightning.fitting import Stage, fit, predict
from pkd_lightning.progress import FitProgress
from pkd_lightning.schedules import constant, cosine
from pkd_lightning.teacher import CachedTeacher, TeacherModule
from pkd_lightning.trainer import TrainerConfig
from tests.support import patterns, tiny_config

BATCH = 16
ADAM = partial(torch.optim.AdamW, lr=0.02)


def add_noise(images: Tensor, generator: torch.Generator) -> Tensor:
    return images + torch.randint(0, 9, images.shape, generator=generator).to(torch.uint8)


def images(**options: Any) -> DataModule:
    """441 training rows: 28 batches, the last of 9; one group of 16 batches and one of 12."""
    return DataModule(DataConfig(partial(patterns, samples=700), **options))


def settings(**options: Any) -> TrainerConfig:
    given = {"optimizer": ADAM, "schedule": cosine, "max_epochs": 2, "batch_size": BATCH, "progress": False}
    return TrainerConfig(**{**given, "accelerator": "cpu", **options})


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


def stage(tmp_path: Path) -> Stage:
    return Stage("teacher", 0, tmp_path / "metrics.jsonl")


def lines(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def plain_loop(
    data: DataModule, config: TrainerConfig, device: str = "cpu", scaler: torch.amp.GradScaler | None = None
) -> Iterator[dict[str, Tensor]]:
    """The weights after each epoch of what `fit` is to do, one batch of the DataLoader after the other."""
    model = network().to(device)
    optimizer = config.build_optimizer(model.parameters())
    base = optimizer.param_groups[0]["lr"]
    loader = data.training_loader(config.batch_size, 0, "teacher/0")
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(config.precision)
    scaler = scaler or torch.amp.GradScaler(device, enabled=half == torch.float16)
    step, total = 0, config.max_epochs * len(loader)
    for epoch in range(config.max_epochs):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            optimizer.param_groups[0]["lr"] = base * config.schedule(step / total)
            optimizer.zero_grad()
            with torch.autocast(device, half) if half else nullcontext():
                loss = F.cross_entropy(model(batch.inputs.to(device)), batch.labels.to(device))
            scaler.scale(loss).backward()
            if config.gradient_clip is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
            scaler.step(optimizer)
            scaler.update()
            step += 1
        yield {name: value.detach().clone() for name, value in model.state_dict().items()}


class Watch(L.Callback):
    """Keeps what the trainer says at the end of each epoch."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: FitModule) -> None:
        self.steps.append(trainer.global_step)
        self.weights.append({name: value.detach().clone() for name, value in pl_module.model.state_dict().items()})


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("options", "augment"),
    [
        ({}, None),
        ({"gradient_clip": None}, None),
        ({"gradient_clip": 0.01, "num_workers": 1}, add_noise),
        ({"optimizer": partial(torch.optim.AdamW, lr=0.02, fused=False), "batch_size": 441}, None),
        ({"optimizer": partial(torch.optim.RMSprop, lr=0.01)}, add_noise),
        ({"precision": "bf16-mixed", "gradient_clip": 0.1}, None),
    ],
)
def test_a_fit_gives_the_weights_of_a_plain_loop(options: dict[str, Any], augment: Any, tmp_path: Path) -> None:
    data, config, watch = images(augment=augment), settings(**options), Watch()
    module = TeacherModule(network(), config)
    result = fit(module, data, stage(tmp_path), callbacks=[watch])
    expected = list(plain_loop(data, config))
    assert all(same(one, other) for one, other in zip(watch.weights, expected, strict=True))
    assert same(module.model.state_dict(), expected[result.best_epoch])  # what is kept is the best epoch's
    steps = -(-441 // config.batch_size)
    assert watch.steps == [steps, 2 * steps]
    assert module.total_steps == 2 * steps


def test_the_plain_loop_notices_what_is_compared() -> None:
    data = images()
    (*_, base) = plain_loop(data, settings())
    for change in ({"gradient_clip": 0.1}, {"schedule": constant}, {"batch_size": 17}, {"precision": "bf16-mixed"}):
        (*_, other) = plain_loop(data, settings(**change))
        assert not same(base, other)


@pytest.mark.parametrize("augment", [None, add_noise])
@pytest.mark.parametrize(("group_bytes", "most"), [(1, 1), (3 * BATCH * 64 * 4, 3), (2**21, 16)])
def test_an_epochs_batches_are_those_of_the_data_loader(
    augment: Any, group_bytes: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[int] = []
    fetch = BatchDataset.__getitems__
    monkeypatch.setattr(BatchDataset, "__getitems__", lambda self, k: fetched.append(len(k)) or fetch(self, k))
    monkeypatch.setattr(epochs, "GROUP_BYTES", group_bytes)
    loader = images(augment=augment).training_loader(BATCH, 0, "teacher/0")
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        (ours,) = EpochLoader(loader)
        for one, other in zip(ours, loader, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert max(fetched) == most  # at once in memory
    assert sum(fetched) == 2 * 28


def refuse(delivered: int, kind: str) -> Callable[..., Tensor]:
    """`Tensor.share_memory_` as where /dev/shm has room for so many batches."""
    share, calls = Tensor.share_memory_, []

    def limited(tensor: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 3 * delivered:
            raise RuntimeError(f"unable to allocate {kind}(shm) for file </torch_1>: No space left on device (28)")
        return share(tensor)

    return limited


@pytest.mark.parametrize("augment", [None, add_noise])
@pytest.mark.parametrize("delivered", [0, 5])
def test_without_shared_memory_an_epoch_goes_on_in_this_process(
    delivered: int, augment: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Tensor, "share_memory_", refuse(delivered, "shared memory"))
    data = images(augment=augment)
    plain, loader = (data.training_loader(BATCH, 0, "teacher/0", workers) for workers in (0, 1))
    ours = EpochLoader(loader)
    for epoch in (0, 1):
        for one in (plain, ours):
            one.sampler.set_epoch(epoch)
        for found, expected in zip(next(iter(ours)), plain, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    (said,) = [record.message for record in caplog.records if "num_workers=1" in record.message]
    assert "No space left on device" in said
    assert "/dev/shm" in said


def test_without_shared_memory_a_loader_fails_and_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "share_memory_", refuse(5, "shared memory"))
    with pytest.raises(RuntimeError, match="No space left"):
        list(images().training_loader(BATCH, 0, "teacher/0", 1))


def test_without_semaphores_an_epoch_is_loaded_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> Any:
        raise OSError(28, "No space left on device")

    data = images()
    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter", full)
    (epoch,) = EpochLoader(data.training_loader(BATCH, 0, "teacher/0", 1))
    assert sum(len(batch.labels) for batch in epoch) == 441


def test_keys_reach_a_loader_process_without_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    key = next(iter(images(augment=add_noise).training_loader(BATCH, 0, "teacher/0", 1).sampler))

    def refused(tensor: Tensor) -> Any:
        raise AssertionError("in shared memory")

    monkeypatch.setattr("torch.multiprocessing.reductions.reduce_tensor", refused)
    monkeypatch.setitem(ForkingPickler._extra_reducers, Tensor, refused)
    found = pickle.loads(ForkingPickler.dumps(key))
    assert torch.equal(found.rows, key.rows)
    assert (type(found), found.augmentation_seed) == (type(key), key.augmentation_seed)


def test_other_faults_of_loader_processes_are_not_hidden(caplog: pytest.LogCaptureFixture) -> None:
    def broken(images: Tensor, generator: torch.Generator) -> Tensor:
        raise RuntimeError("made up")

    (epoch,) = EpochLoader(images(augment=broken).training_loader(BATCH, 0, "teacher/0", 1))
    with pytest.raises(RuntimeError, match="made up"):
        list(epoch)
    assert "/dev/shm" not in caplog.text  # nor taken for another fault


class Recorded(TeacherModule):
    """Keeps the learning rate of each step, and calls `watch` in it."""

    def __init__(self, config: TrainerConfig, watch: Callable[[], object] = lambda: None) -> None:
        super().__init__(network(), config)
        self.rates: list[float] = []
        self.watch = watch

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():
            self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            self.watch()
        return super().losses(batch)


def test_the_learning_rate_follows_the_schedule_step_by_step(tmp_path: Path) -> None:
    module = Recorded(settings())
    fit(module, images(), stage(tmp_path))
    assert module.rates == pytest.approx([0.02 * cosine(step / 56) for step in range(56)], rel=1e-12)
    assert lines(tmp_path)[-1]["lr"] == pytest.approx(0.02 * cosine(1.0))


def test_a_fit_without_progress_stops_early_in_the_middle_of_the_schedule(tmp_path: Path) -> None:
    module = Recorded(settings(optimizer=partial(torch.optim.SGD, lr=0.0), max_epochs=9, patience=2))
    result = fit(module, images(), stage(tmp_path))
    assert (result.epochs, result.best_epoch) == (3, 0)
    assert len(module.rates) == 3 * 28
    assert module.total_steps == 9 * 28


@pytest.mark.parametrize(("weights", "epoch"), [("best", 0), ("last", 2)])
def test_the_weights_of_the_best_epoch_are_kept_or_those_of_the_last(weights: str, epoch: int, tmp_path: Path) -> None:
    worse = partial(torch.optim.SGD, lr=0.05)
    config = settings(
        weights=weights, max_epochs=3, optimizer=worse, schedule=lambda progress: 1 if progress < 0.3 else -1
    )
    module, watch = TeacherModule(network(), config), Watch()
    result = fit(module, images(), stage(tmp_path), callbacks=[watch])
    assert (result.epochs, result.best_epoch) == (3, 0)  # the others climb
    assert same(module.model.state_dict(), watch.weights[epoch])
    again = TeacherModule(network(), config)  # what a fit leaves in its checkpoint
    place = replace(stage(tmp_path), checkpoint=tmp_path / "fit.ckpt")
    fit(again, images(), place)
    fit(third := TeacherModule(network(), config), images(), place)
    assert same(third.model.state_dict(), again.model.state_dict())
    assert same(again.model.state_dict(), watch.weights[epoch])


def test_the_epochs_lines_hold_the_means_over_all_samples(tmp_path: Path) -> None:
    data, config = images(), settings(optimizer=partial(torch.optim.SGD, lr=0.0), max_epochs=1)
    fit(TeacherModule(network(), config), data, stage(tmp_path))
    (line,) = lines(tmp_path)
    keys = ["stage", "attempt", "epoch", "train_loss", "validation_loss", "validation_accuracy", "lr", "seconds"]
    assert list(line) == keys
    model = network()
    for part, rows in (("train", data.training), ("validation", data.validation)):
        rows_ = slice(rows.start, rows.stop)
        logits, labels = model(data.task.prepare(data.inputs[rows_])).detach(), data.labels[rows_]
        assert line[f"{part}_loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert line["validation_accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))


def test_trackers_get_a_point_an_epoch_by_optimiser_step(tmp_path: Path) -> None:
    seen = []

    class Tracker(DummyLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            seen.append((step, metrics))

    fit(TeacherModule(network(), settings()), images(), stage(tmp_path), loggers=[Tracker()])
    assert [step for step, _ in seen] == [27, 55]
    assert [metrics["epoch"] for _, metrics in seen] == [0, 1]
    assert all(set(metrics) == {"train_loss", "validation_loss", "validation_accuracy", "epoch"} for _, metrics in seen)


def test_the_bar_shows_the_step_of_the_moment_it_is_drawn(tmp_path: Path) -> None:
    shown = []
    progress = FitProgress("teacher", 56)

    def draw() -> None:
        assert progress.progress is not None
        list(progress.progress.get_renderables())
        (task,) = progress.progress.tasks
        shown.append((task.completed, task.total))

    fit(Recorded(settings(), draw), images(), stage(tmp_path), callbacks=[progress])
    assert shown == [(step, 56) for step in range(56)]
    assert progress.progress is None


def test_the_bar_is_removed_after_an_error(tmp_path: Path) -> None:
    progress = FitProgress("teacher", 56)

    def fail() -> None:
        raise ArithmeticError("made up")

    with pytest.raises(ArithmeticError):
        fit(Recorded(settings(), fail), images(), stage(tmp_path), callbacks=[progress])
    assert progress.progress is None


def test_a_stop_signal_ends_the_fit_at_the_next_step(tmp_path: Path) -> None:
    module = Recorded(settings())
    module.watch = lambda: os.kill(os.getpid(), signal.SIGTERM) if len(module.rates) == 5 else None
    with pytest.raises(SystemExit) as stop:
        fit(module, images(), stage(tmp_path))
    assert stop.value.code == 128 + signal.SIGTERM
    assert len(module.rates) == 5


def test_a_student_learns_its_scales_with_its_weights(tmp_path: Path) -> None:
    data = images()
    rows = data.validation.stop
    torch.manual_seed(1)
    targets = RoundTargets(CachedTeacher(torch.randn(rows, 3)), torch.randn(rows, 3), torch.rand(rows, 3) > 0.5, 1.0, 1)
    module = StudentModule(network(), settings(), BoostingConfig(), Additive(), learned, targets)
    before, scales = network().state_dict(), module.scales
    fit(module, data, stage(tmp_path))
    assert all(not torch.equal(value, before[name]) for name, value in module.model.state_dict().items())
    assert all(abs(one - other) > 1e-3 for one, other in zip(module.scales, scales, strict=True))


# ---------------------------------------------------------------------------------- precision


class Seen(torch.autograd.Function):
    """The identity; notes whether autocast is on in its forward and its backward."""

    found: dict[str, bool]

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if x.requires_grad:
            Seen.found["forward"] = torch.is_autocast_enabled("cpu")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        Seen.found["backward"] = torch.is_autocast_enabled("cpu")
        return grad


class Watched(nn.Sequential):
    def forward(self, images: Tensor) -> Tensor:
        return Seen.apply(super().forward(images))


@pytest.mark.parametrize(("precision", "mixed"), [("32-true", False), ("bf16-mixed", True)])
def test_the_forward_pass_is_under_autocast_and_the_backward_pass_is_not(
    precision: str, mixed: bool, tmp_path: Path
) -> None:
    Seen.found = {}
    fit(TeacherModule(Watched(*network()), settings(precision=precision)), images(), stage(tmp_path))
    assert Seen.found == {"forward": mixed, "backward": False}


def test_bf16_learns_what_float32_learns(tmp_path: Path) -> None:
    for precision in ("32-true", "bf16-mixed"):
        fit(TeacherModule(network(), settings(precision=precision, max_epochs=4)), images(), stage(tmp_path))
    assert lines(tmp_path)[3]["validation_accuracy"] == 1.0
    assert lines(tmp_path)[7]["validation_accuracy"] == 1.0
    assert lines(tmp_path)[3]["train_loss"] != lines(tmp_path)[7]["train_loss"]


class Scaling(L.Callback):
    """Gives a fit on the CPU the gradient scaler that 16-mixed has on a GPU."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.precision_plugin.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_scaled_gradients_are_unscaled_before_they_are_clipped_and_used(
    clip: float | None, fused: bool, tmp_path: Path
) -> None:
    data, watch = images(), Watch()
    config = settings(optimizer=partial(torch.optim.SGD, lr=0.1, fused=fused), gradient_clip=clip)
    fit(TeacherModule(network(), config), data, stage(tmp_path), callbacks=[watch, Scaling()])
    scaled = list(plain_loop(data, config, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10)))
    (*_, unscaled) = plain_loop(data, config)
    assert all(same(one, other) for one, other in zip(watch.weights, scaled, strict=True))
    assert all(torch.allclose(watch.weights[1][name], value, atol=1e-5) for name, value in unscaled.items())


@pytest.mark.gpu
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_fit_on_the_gpu_gives_the_weights_of_a_plain_loop(precision: str, clip: float | None, tmp_path: Path) -> None:
    data = images()
    config = settings(accelerator="gpu", precision=precision, gradient_clip=clip)
    watch = Watch()
    fit(TeacherModule(network(), config), data, stage(tmp_path), callbacks=[watch])
    expected = list(plain_loop(data, config, "cuda"))
    assert all(same(one, other) for one, other in zip(watch.weights, expected, strict=True))


@pytest.mark.parametrize("before", ["highest", "medium"])
def test_matrix_products_have_the_fits_precision_during_the_fit_only(before: str, tmp_path: Path) -> None:
    original = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before)
    try:
        seen: set[str] = set()
        config = settings(matmul_precision="high")
        fit(Recorded(config, lambda: seen.add(torch.get_float32_matmul_precision())), images(), stage(tmp_path))
        assert seen == {"high"}
        assert torch.get_float32_matmul_precision() == before
        with pytest.raises(ZeroDivisionError):
            fit(Recorded(config, lambda: 1 / 0), images(), stage(tmp_path))
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision(original)


# ---------------------------------------------------------------------------------- optimisers


def fused(optimizer: Callable[..., Any]) -> Any:
    return settings(optimizer=optimizer).build_optimizer(network().parameters()).defaults.get("fused")


def test_optimisers_are_fused_unless_the_user_says_otherwise() -> None:
    for kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad):
        assert fused(partial(kind, lr=0.1)) is True
        assert fused(partial(kind, lr=0.1, fused=False)) is False
        assert not fused(partial(kind, lr=0.1, foreach=True))
        assert not fused(partial(kind, lr=0.1, foreach=False))
    assert fused(torch.optim.AdamW) is True
    assert fused(partial(torch.optim.RMSprop, lr=0.1)) is None  # has no fused form


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_a_fused_optimiser_takes_the_steps_of_the_plain_one(kind: Callable[..., Any], tmp_path: Path) -> None:
    weights = []
    for options in ({}, {"fused": False, "foreach": False}):
        config = settings(optimizer=partial(kind, lr=0.02, **options), max_epochs=1)
        module = TeacherModule(network(), config)
        fit(module, images(), stage(tmp_path))
        weights.append(module.model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------- torch.compile


def test_a_compiled_fit_learns_the_same_under_the_same_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    states = []
    for compile_ in (False, True, True):
        module = TeacherModule(network(), settings(compile=compile_))
        compiled = len(graphs)
        fit(module, images(), stage(tmp_path))
        assert (len(graphs) > compiled) == compile_  # every model anew
        states.append(module.state_dict())
    assert list(states[0]) == list(states[1]) == [f"model.{name}" for name in network().state_dict()]
    assert same(states[0], states[1])
    assert same(states[0], states[2])


def test_a_failure_of_torch_compile_says_how_to_do_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        raise OSError("no headers")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    with pytest.raises(ConfigError, match=r"no headers.*trainer\.compile=false"):
        fit(TeacherModule(network(), settings(compile=True)), images(), stage(tmp_path))


def test_compiling_without_a_compiler_is_found_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"compile=True: .*'no-such-compiler'.*compile=false"):
        settings(compile=True)
    assert settings().compile is False


@pytest.mark.slow
def test_the_default_backend_compiles_a_fit(tmp_path: Path) -> None:
    states = []
    for compile_ in (False, True):
        module = TeacherModule(network(), settings(compile=compile_))
        fit(module, images(), stage(tmp_path))
        states.append(module.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-3, atol=1e-3)


class Explodes(TeacherModule):
    """A batch with this sample has an infinite loss, as one image can have in a model without norms."""

    sample = 7

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, logits = super().losses(batch)
        return (loss * torch.inf if self.training and (batch.index == self.sample).any() else loss), logits


def test_a_step_without_a_finite_gradient_is_skipped(tmp_path, caplog):
    module = Explodes(network(), settings(gradient_clip=1.0))
    fit(module, images(), stage(tmp_path))
    assert all(value.isfinite().all() for value in module.state_dict().values())
    assert all(0 < line["train_loss"] < 2 for line in lines(tmp_path))
    assert [line["skipped_steps"] for line in lines(tmp_path)] == [1, 2]
    assert [record.message for record in caplog.records if "skipped 1 steps" in record.message] != []


def test_a_fit_whose_weights_are_lost_ends(tmp_path, caplog):
    module = Explodes(network(), settings(gradient_clip=None, max_epochs=5, patience=None))
    with pytest.raises(RunError, match="not finite in any epoch"):
        fit(module, images(), stage(tmp_path))
    assert len(lines(tmp_path)) == 1
    assert "weights are not finite" in caplog.text


# ---------------------------------------------------------------------------------- batches of one sample


class Normed(nn.Module):
    """Batch norm on one value per channel and image, as ResNet's last on small images; keeps its batches' sizes."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, num_classes))
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.sizes.append(len(images))
        return self.net(images)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("batch_size", "sizes"),
    [(88, [88, 88, 88, 88, 89]), (110, [110, 110, 110, 111]), (440, [441]), (441, [441]), (439, [439, 2])],
)
def test_a_last_batch_of_one_joins_the_one_before(
    batch_size: int, sizes: list[int], workers: int, tmp_path: Path
) -> None:
    data, model = images(), Normed((1, 8, 8), 3)
    module = TeacherModule(model, settings(batch_size=batch_size, num_workers=workers))
    fit(module, data, stage(tmp_path))
    assert model.sizes == 2 * sizes
    assert module.total_steps == 2 * len(sizes)
    loader = data.training_loader(batch_size, 0, "teacher/0")
    assert torch.equal(torch.cat([batch.index for batch in loader]).sort().values, torch.arange(441))


@pytest.mark.parametrize("batch_size", [1, 2, 7, 40, 440, 441, 1000])
def test_all_other_batches_are_equal_parts_of_the_order(batch_size: int) -> None:
    data = images()
    order = torch.cat([batch.index for batch in data.training_loader(1, 0, "teacher/0")])
    parts = list(order.split(batch_size))
    if batch_size in (2, 40, 440):  # 441 rows leave one over
        parts[-2:] = [torch.cat(parts[-2:])]
    found = [batch.index for batch in data.training_loader(batch_size, 0, "teacher/0")]
    assert all(torch.equal(one, other) for one, other in zip(found, parts, strict=True))


def test_evaluation_takes_a_last_batch_of_one(tmp_path: Path) -> None:
    data, model = images(validation_fraction=1 / 490), Normed((1, 8, 8), 3).eval()
    assert data.sizes == (489, 1, 210)
    by_size = [predict(model, data, data.training, torch.device("cpu"), batch_size=size) for size in (61, 489)]
    torch.testing.assert_close(*by_size)
    fit(TeacherModule(model.train(), settings()), data, stage(tmp_path))
    assert lines(tmp_path)[0]["validation_accuracy"] in (0.0, 1.0)


@pytest.mark.parametrize(
    "overrides",
    [("trainer.batch_size=1",), ("data.limit=4", "data.test_fraction=0.4", "data.validation_fraction=0.5")],
)
def test_a_model_that_cannot_train_on_one_sample_is_found_before_anything_is_trained(
    overrides: tuple[str, ...], tmp_path: Path
) -> None:
    experiment = assemble(tiny_config(tmp_path, *overrides))
    data = DataModule(experiment.data)
    experiment.check(data)  # models without batch norm train on one sample
    normed = replace(experiment, teacher=replace(experiment.teacher, model=partial(Normed)))
    with pytest.raises(
        ConfigError, match=r"teacher\.model: .* batch of one sample.*more than 1 value per channel"
    ) as error:
        normed.check(data)
    assert len(error.value.faults) == 1  # the students are not at fault
    checkpoint = replace(normed.teacher, checkpoint=__file__)
    replace(normed, teacher=checkpoint).check(data)  # is not trained
