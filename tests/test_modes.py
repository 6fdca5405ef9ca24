"""Fits in which a batch is a training step of Lightning's: the same weights, with callbacks and arguments of users."""

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn

from pkd_lightning.assembling import assemble
from pkd_lightning.data.module import Batch, DataConfig, DataModule
from pkd_lightning.errors import ConfigError
from pkd_lightning.fitting import Stage, fit
from pkd_lightning.schedules import cosine
from pkd_lightning.teacher import TeacherModule
from pkd_lightning.trainer import TrainerConfig
from tests.outside.counting import Counting
from tests.support import ACCEPT, patterns, tiny_config, tiny_run
from tests.test_fit_resume import DROPOUT, timeless

BATCH = 16


def images() -> DataModule:
    return DataModule(DataConfig(partial(patterns, samples=300)))  # 12 batches of training


def settings(**options: Any) -> TrainerConfig:
    given = {"optimizer": partial(torch.optim.AdamW, lr=0.01), "schedule": cosine, "max_epochs": 2, "batch_size": BATCH}
    return TrainerConfig(**{**given, "progress": False, "accelerator": "cpu", **options})


class Watched(TeacherModule):
    """A small teacher; `change` sees each training loss, and what it gives is trained on."""

    def __init__(self, trainer: TrainerConfig, change: Callable[[Tensor], Tensor] = lambda loss: loss) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)), trainer)
        self.change = change

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, logits = super().losses(batch)
        return (self.change(loss) if torch.is_grad_enabled() else loss), logits


def fitted(tmp_path: Path, module: TeacherModule) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The weights, and the epochs' lines without their times."""
    stage = Stage("teacher", 0, tmp_path / "metrics.jsonl")
    stage.metrics.unlink(missing_ok=True)
    fit(module, images(), stage)
    lines = [json.loads(line) for line in stage.metrics.read_text().splitlines()]
    return {name: value.clone() for name, value in module.model.state_dict().items()}, timeless(lines)


@pytest.mark.parametrize(
    "options",
    [
        ("boosting.objective=additive", DROPOUT),
        ("boosting=paper", "boosting.weak_learner.check_every=1"),
        ("trainer.gradient_clip=null", "trainer.num_workers=1"),
    ],
)
def test_both_modes_give_the_same_bits(options: tuple[str, ...], tmp_path: Path) -> None:
    results = [
        timeless(tiny_run(tmp_path / mode, *options, ACCEPT, "trainer.max_epochs=2", f"trainer.mode={mode}"))
        for mode in ("fast", "step")
    ]
    for part in ("teacher", "rounds", "ensemble"):
        assert results[0][part] == results[1][part]


def test_a_step_whose_gradients_are_not_finite_is_skipped_in_both(tmp_path: Path) -> None:
    found = []
    for mode in ("fast", "step"):
        steps: list[int] = []

        def change(loss: Tensor, steps: list[int] = steps) -> Tensor:
            steps.append(1)
            return loss * float("nan") if len(steps) in (3, 4, 17) else loss

        found.append(fitted(tmp_path, Watched(settings(mode=mode), change)))
    (fast, lines), (step, others) = found
    assert lines == others
    assert [line["skipped_steps"] for line in lines] == [2, 3]
    assert all(torch.equal(fast[name], step[name]) for name in fast)
    assert all(value.isfinite().all() for value in fast.values())


COUNTING = "trainer.callbacks=[{_target_: tests.outside.counting.Counting}]"


def test_each_fit_has_callbacks_of_its_own_around_every_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Counting, "made", [])
    caplog.set_level(logging.INFO)
    tiny_run(tmp_path, COUNTING, "boosting.rounds=2", ACCEPT)
    used = [made for made in Counting.made if made.batches]
    assert len(used) == 3  # the teacher's, and that of each student
    assert {(made.batches, made.backwards, made.steps) for made in used} == {(7, 7, 7)}
    assert caplog.text.count("a training step a batch, with Lightning's hooks around it") == 3


def test_arguments_of_the_trainer_reach_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counting, "made", [])
    tiny_run(tmp_path, COUNTING, "+trainer.lightning.accumulate_grad_batches=3", "boosting.rounds=1", ACCEPT)
    used = [made for made in Counting.made if made.batches]
    assert {(made.batches, made.steps) for made in used} == {(7, 3)}


def test_accumulated_batches_are_one_step_on_one_schedule(tmp_path: Path) -> None:
    """Two halves of a batch, each of which counts for half, are that batch."""
    whole, lines = fitted(tmp_path, Watched(settings(mode="step", batch_size=2 * BATCH, gradient_clip=None)))
    halves, others = fitted(tmp_path, Watched(settings(lightning={"accumulate_grad_batches": 2}, gradient_clip=None)))
    assert [line["lr"] for line in lines] == pytest.approx([line["lr"] for line in others])
    assert [line["train_loss"] for line in lines] == pytest.approx([line["train_loss"] for line in others], rel=1e-2)
    for name, value in whole.items():  # an odd last batch counts for more than its samples
        torch.testing.assert_close(value, halves[name], rtol=0.1, atol=0.02)


class Mean(WeightAveraging):
    """The mean of the weights after every step."""


def test_the_weights_that_were_validated_are_kept(tmp_path: Path) -> None:
    """Averages, where a callback validates averages."""

    class Steps(L.Callback):
        def __init__(self) -> None:
            self.weights: list[Tensor] = []

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *given: Any) -> None:
            self.weights.append(pl_module.model[1].weight.detach().clone())

    steps = Steps()
    module = Watched(settings(callbacks=[Mean, lambda: steps], max_epochs=1))
    weights, _ = fitted(tmp_path, module)
    torch.testing.assert_close(weights["1.weight"], torch.stack(steps.weights).mean(0), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(weights["1.weight"], steps.weights[-1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.mode=slow", "trainer.mode='slow': must be one of auto, fast, step"),
        (
            "+trainer.lightning.acumulate_grad_batches=2",
            "trainer.lightning.acumulate_grad_batches: no such option. Did",
        ),
        ("+trainer.lightning.max_epochs=2", "trainer.lightning.max_epochs: is set by `trainer.max_epochs`"),
        ("+trainer.lightning.max_steps=2", "trainer.lightning.max_steps: a fit is built on what it sets itself"),
        ("trainer.lightning=3", "trainer.lightning=3: must be a mapping"),
        ("trainer.callbacks=[{_target_: torch.nn.Identity}]", "trainer.callbacks.0: must be the `_target_` of a"),
        (
            "trainer.callbacks=[{_target_: lightning.pytorch.callbacks.Timer, durtion: 3}]",
            "callbacks.0: cannot be made",
        ),
        ("trainer.callbacks=[{_target_: lightning.pytorch.callbacks.Tmer}]", "trainer.callbacks: "),
        ("trainer.callbacks=all", "trainer.callbacks='all': must be a list"),
        ("trainer.callbacks=[3]", "trainer.callbacks.0: must be the `_target_` of a Lightning callback, not 3"),
    ],
)
def test_what_cannot_be_passed_on_is_a_fault(override: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        assemble(tiny_config(tmp_path, override))
    assert said in str(error.value)


def test_the_fast_mode_is_refused_where_something_needs_the_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.mode='fast': must be auto or step with callbacks"):
        assemble(tiny_config(tmp_path, COUNTING, "trainer.mode=fast"))
    modes = [
        assemble(tiny_config(tmp_path, *flags)).trainer.by_step for flags in ((), ("trainer.mode=step",), (COUNTING,))
    ]
    assert modes == [False, True, True]


@pytest.mark.parametrize(
    "override",
    [
        "trainer.callbacks=[{_target_: lightning.pytorch.callbacks.LearningRateMonitor}]",
        "+trainer.lightning.profiler=x",
        "trainer.callbacks=[{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: validation_loss}]",
    ],
)
def test_what_lightning_refuses_is_one_error(override: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trainer: Lightning refuses it: "):
        tiny_run(tmp_path, override)


@pytest.mark.parametrize(
    ("callback", "use"),
    [
        ("ModelCheckpoint", "fits are saved by trainer.checkpoint_every"),
        ("GradientAccumulationScheduler, scheduling: {0: 2}", r".trainer\.lightning\.accumulate_grad_batches=N"),
    ],
)
def test_a_callback_that_has_an_option_of_its_own_is_refused(callback: str, use: str, tmp_path: Path) -> None:
    name = callback.split(",")[0]
    with pytest.raises(ConfigError, match=rf"trainer\.callbacks: {name}: .*{use}"):
        tiny_run(tmp_path, f"trainer.callbacks=[{{_target_: lightning.pytorch.callbacks.{callback}}}]")


@pytest.mark.parametrize(
    "given",
    [
        {"limit_train_batches": 2},
        {"limit_train_batches": 0.3},
        {"limit_train_batches": 1000},
        {"limit_train_batches": 0.7, "accumulate_grad_batches": 2},
    ],
)
def test_the_schedule_ends_with_the_last_step(given: dict[str, float], tmp_path: Path) -> None:
    schedule = "trainer.schedule={_target_: pkd_lightning.schedules.cosine, _partial_: true, warmup: 0.0, final: 0.0}"
    options = [f"+trainer.lightning.{key}={value}" for key, value in given.items()]
    tiny_run(tmp_path, ACCEPT, "boosting.rounds=1", "trainer.max_epochs=4", schedule, *options)
    (lines,) = tmp_path.rglob("metrics.jsonl")
    rates = [row["lr"] for row in map(json.loads, lines.read_text().splitlines()) if row["stage"] == "round-00"]
    assert len(rates) == 4
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert rates[1] > 0.003
