"""Settings and wiring that no other test names: who is given which rows, seeds, scales and constants."""

import copy
import json
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn

from pkd_lightning import evaluate as evaluation
from pkd_lightning import schedules
from pkd_lightning import teacher as teacher_of
from pkd_lightning.assembling import assemble, open_tracker
from pkd_lightning.boosting import combine, objectives
from pkd_lightning.boosting import loop as boosting_loop
from pkd_lightning.boosting import round as boosting_round
from pkd_lightning.boosting.loop import BoostingLoop
from pkd_lightning.boosting.options import BoostingConfig
from pkd_lightning.boosting.residuals import theoretical_eta
from pkd_lightning.boosting.round import Attempt
from pkd_lightning.boosting.student import RoundTargets, StudentModule
from pkd_lightning.boosting.weak_learner import WeakLearnerCheck, describe, fit_scales
from pkd_lightning.checkpoint import read_json
from pkd_lightning.cli import load_config
from pkd_lightning.cost import Latency
from pkd_lightning.data.module import Batch, DataConfig, DataModule
from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.errors import ConfigError, RunError
from pkd_lightning.fitting import BestWeights, FitResult, Stage, predict
from pkd_lightning.losses import distillation_loss
from pkd_lightning.metrics import calibration_error, quality
from pkd_lightning.models.ladder import Ladder
from pkd_lightning.naming import Naming
from pkd_lightning.seeding import derive
from pkd_lightning.tasks import SignalClassification
from pkd_lightning.teacher import CachedTeacher, Teacher
from pkd_lightning.trainer import TrainerConfig
from tests.support import ACCEPT, patterns, tiny_config, tiny_run

# ---------------------------------------------------------------------------------- schedules and published settings


def test_the_learning_rate_rises_linearly_then_falls_to_its_final_part() -> None:
    cosine = schedules.cosine
    assert [cosine(progress) for progress in (0.0, 0.05, 0.1)] == pytest.approx([0.0, 0.5, 1.0])
    assert cosine(0.55) == pytest.approx(0.01 + 0.99 * 0.5)
    assert cosine(1.0) == pytest.approx(0.01)
    assert cosine(0.25, warmup=0.5, final=0.2) == pytest.approx(0.5)
    assert cosine(0.625, warmup=0.5, final=0.2) == pytest.approx(0.2 + 0.8 * (0.5 + math.sqrt(0.5) / 2))
    assert cosine(1.0, warmup=0.5, final=0.2) == pytest.approx(0.2)


def test_decay_is_exponential_constant_is_one_and_linear_is_a_line() -> None:
    assert [schedules.decay(progress) for progress in (0.0, 0.5, 1.0)] == pytest.approx([1.0, math.sqrt(0.1), 0.1])
    assert schedules.decay(0.5, final=0.04) == pytest.approx(0.2)
    assert [schedules.constant(progress) for progress in (0.0, 0.3, 1.0)] == [1.0] * 3
    assert [schedules.linear(progress) for progress in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]
    assert [schedules.linear(progress, start=0.0, final=2.0) for progress in (0.0, 0.25, 1.0)] == [0.0, 0.5, 2.0]


def test_the_published_settings_are_those_of_the_paper() -> None:
    """Mamba-PKD (arXiv 2503.01727), sections 4.1 and 4.2; what it leaves open is said in conf/ and in the studies."""
    config = load_config("experiment=mnist_paper", "logger=none")
    trainer, boosting = (OmegaConf.to_container(config[key], resolve=True) for key in ("trainer", "boosting"))
    optimizer, schedule = trainer["optimizer"], trainer["schedule"]
    assert (optimizer["_target_"], optimizer["lr"], optimizer["weight_decay"]) == ("torch.optim.Adam", 1e-4, 0.0)
    assert (schedule["_target_"], schedule["final"]) == ("pkd_lightning.schedules.decay", 0.1)
    assert (trainer["max_epochs"], trainer["patience"], trainer["batch_size"]) == (50, 5, 32)
    assert trainer["gradient_clip"] is None
    assert trainer["precision"] == "32-true"
    assert (boosting["objective"], boosting["combine"], boosting["rounds"]) == ("published", "mean", 7)
    assert (boosting["temperature"], boosting["alpha"], boosting["gamma"]) == (2.0, 0.5, 1.0)
    assert (boosting["first_term"], boosting["eta"], boosting["weights"]) == ("soft", None, "none")
    assert boosting["bound_quantile"] == 0.999
    assert boosting["weak_learner"] == {
        "require": "auto", "fraction": 1.0, "margin": 0.0, "min_improvement": 0.0, "check_every": 10,
        "max_attempts": 1, "on_failure": "accept",
    }  # fmt: skip
    assert (config.data.split, config.data.test_fraction) == ("paper", 0.3)


def test_eta_is_that_of_the_theory() -> None:
    """sqrt(log(2N) / T) / B: N = 50 samples, so log 100."""
    assert theoretical_eta(50, 7, 3.0) == pytest.approx(math.sqrt(4.605170185988092 / 7) / 3.0, rel=1e-15)


# ---------------------------------------------------------------------------------- one round of the loop


class Linear(nn.Module):
    """A small student with dropout, which is off where it is only asked."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, width: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(math.prod(image_shape), width), nn.Dropout(0.5), nn.Linear(width, num_classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)  # type: ignore[no-any-return]


def trainer_config(**options: Any) -> TrainerConfig:
    config = TrainerConfig(
        optimizer=partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1), schedule=schedules.constant, max_epochs=1,
        batch_size=16, accelerator="cpu", progress=False,
    )  # fmt: skip
    return replace(config, **options)


def make_loop(directory: Path, seed: int = 0, trainer: TrainerConfig | None = None, **options: Any) -> BoostingLoop:
    """A loop on patterns with a teacher of random logits; nothing is trained."""
    data = DataModule(DataConfig(partial(patterns, samples=200)))
    rows = data.validation.stop
    logits = torch.randn(rows, 3, generator=torch.Generator().manual_seed(5)) + 2 * F.one_hot(data.labels[:rows], 3)
    teacher = Teacher(nn.Identity(), logits, "made up", 0.0)
    ladder = Ladder(f"{__name__}.Linear", rungs=[{"width": 4}, {"width": 5}, {"width": 6}])
    tracker = SimpleNamespace(stage=lambda name, attempt=0: nullcontext([]), progress=lambda results: None)
    config = BoostingConfig(**{"rounds": 3, **options})
    directory.mkdir(parents=True, exist_ok=True)
    return BoostingLoop(
        config, ladder, trainer or trainer_config(), data, teacher, directory, seed, tracker  # type: ignore[arg-type]
    )  # fmt: skip


def in_second_round(loop: BoostingLoop) -> BoostingLoop:
    """As after a first student of random logits."""
    rows = loop.data.validation.stop
    loop.state.add_logits(torch.randn(rows, 3, generator=torch.Generator().manual_seed(6)), (0.0, 1.0))
    loop.state.round, loop.state.rung, loop.state.bound = 1, 1, 4.0
    return loop


def started(
    monkeypatch: pytest.MonkeyPatch, loop: BoostingLoop, attempt: int = 0, before: int = 0
) -> dict[str, Tensor]:
    """The weights that a candidate starts from."""
    found: dict[str, Tensor] = {}

    def no_fit(module: StudentModule, *args: Any) -> FitResult:
        found.update({name: value.clone() for name, value in module.model.state_dict().items()})
        return FitResult(1, 0, 0.0)

    monkeypatch.setattr(boosting_loop, "fit", no_fit)
    loop.train(before, attempt)
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_student_starts_from_weights_of_its_seed_round_and_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = started(monkeypatch, make_loop(tmp_path))
    torch.manual_seed(123)  # what else has drawn numbers changes nothing
    assert same(started(monkeypatch, make_loop(tmp_path)), reference)
    others = [
        started(monkeypatch, make_loop(tmp_path, seed=1)),
        started(monkeypatch, make_loop(tmp_path), attempt=1),
        started(monkeypatch, make_loop(tmp_path), before=2),
    ]
    later = make_loop(tmp_path)
    later.state.round = 1  # in the same class
    others.append(started(monkeypatch, later))
    assert not any(same(other, reference) for other in others)
    assert not any(same(one, other) for i, one in enumerate(others) for other in others[:i])


def test_a_fit_draws_numbers_of_its_seed_and_attempt(tmp_path: Path) -> None:
    """Dropout draws them."""

    def trained(seed: int = 0, attempt: int = 0) -> Tensor:
        return make_loop(tmp_path, seed).train(0, attempt).logits.clone()

    reference = trained()
    torch.manual_seed(123)
    assert torch.equal(trained(), reference)
    assert not torch.equal(trained(seed=1), reference)
    assert not torch.equal(trained(attempt=1), reference)


@pytest.mark.parametrize("objective", ["independent", "anchored"])
def test_learned_scales_are_fitted_on_training_rows_and_judged_on_validation_rows(
    objective: str, tmp_path: Path
) -> None:
    def trained(spoilt: str | None = None) -> Any:
        loop = in_second_round(make_loop(tmp_path, objective=objective, combine="learned"))
        rows = loop.data.validation
        if spoilt == "logits":
            loop.teacher.logits[rows.start :] += 3 * torch.randn(len(rows), 3)
        elif spoilt == "labels":
            loop.data.labels[rows.start : rows.stop] = (loop.data.labels[rows.start : rows.stop] + 1) % 3
        return loop, loop.train(0, 0)

    loop, candidate = trained()
    n, config = len(loop.data.training), loop.config
    ensemble, labels = loop.state.ensemble_logits, loop.data.labels
    expected = fit_scales(ensemble[:n], candidate.logits[:n], loop.teacher.logits[:n], labels[:n], config)
    assert candidate.scales == expected
    assert candidate.scales[0] != pytest.approx(candidate.scales[1], rel=1e-3)
    for spoilt in ("logits", "labels"):
        other = trained(spoilt)[1]
        assert torch.equal(other.logits, candidate.logits)
        assert other.scales == candidate.scales
        assert other.validation_loss != candidate.validation_loss


@pytest.mark.parametrize("objective", ["independent", "anchored"])
def test_held_out_scales_are_fitted_on_validation_rows_alone(objective: str, tmp_path: Path) -> None:
    loop = in_second_round(make_loop(tmp_path, objective=objective, combine="held_out"))
    candidate = loop.train(0, 0)
    ensemble, labels, rows = loop.state.ensemble_logits, loop.data.labels, loop.data.validation
    parts = (matrix[rows.start : rows.stop] for matrix in (ensemble, candidate.logits, loop.teacher.logits, labels))
    expected = fit_scales(*parts, loop.config)
    assert candidate.scales == expected
    for matrix in (ensemble, candidate.logits, loop.teacher.logits):
        matrix[: rows.start] += 3
    assert loop.round().scales(candidate.logits, (1.0, 1.0)) == expected


@pytest.mark.parametrize("seed", range(5))
def test_held_out_scales_make_no_useless_student_an_improvement(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by having seen the rows, nor by mending the ensemble's scale, which is too large here."""
    loop = in_second_round(make_loop(tmp_path, objective="independent", combine="held_out"))
    loop.state.ensemble_logits.copy_(9 * loop.teacher.logits[: len(loop.state.ensemble_logits)])
    draws = torch.Generator().manual_seed(seed)
    noise = torch.randn(loop.data.validation.stop, 3, generator=draws)
    better = F.one_hot(loop.data.labels[: len(noise)], 3) + 0.1 * noise

    def judged(logits: Tensor) -> Any:
        attempt = loop.round().attempt(Linear(loop.data.task.input_shape, 3), loop.trainer)
        monkeypatch.setattr(boosting_round, "predict", lambda *args, out: out.copy_(logits))
        return attempt.judged(FitResult(1, 0, 0.0), "by hand")

    useless, useful = judged(noise), judged(better)
    assert useless.validation_loss < loop.round().validation_loss(noise, (1.0, 0.0))  # its scales have seen the rows
    assert useless.accepted_by is None
    assert useful.accepted_by == "improvement"


def test_held_out_scales_are_judged_on_the_half_they_were_not_solved_for(tmp_path: Path) -> None:
    loop = in_second_round(make_loop(tmp_path, combine="held_out"))
    rows, labels = loop.data.validation, loop.data.labels
    logits = torch.randn(rows.stop, 3, generator=torch.Generator().manual_seed(7))
    ensemble, teacher = loop.state.ensemble_logits, loop.teacher.logits
    halves = [slice(rows.start, rows.stop, 2), slice(rows.start + 1, rows.stop, 2)]
    total = 0.0
    for half, other in (halves, halves[::-1]):
        a, c = fit_scales(ensemble[other], logits[other], teacher[other], labels[other], loop.config)
        mixed = a * ensemble[half] + c * logits[half]
        loss = distillation_loss(mixed, teacher[half], labels[half], loop.config.alpha, loop.config.temperature)
        total += float(loss) * len(mixed)
    assert loop.round().judged_losses(logits, (1.0, 1.0))[0] == pytest.approx(total / len(rows), rel=1e-6)


@pytest.mark.parametrize("before", [0, 1, 6, 7])
def test_the_halves_do_not_depend_on_the_number_of_processes(
    before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of even number in the whole validation part, of which other processes have the first, are one half."""
    loop, solved = in_second_round(make_loop(tmp_path, combine="held_out")), []
    rows = loop.data.validation
    monkeypatch.setattr(boosting_round.ranks, "own", lambda total: range(before, 99))
    monkeypatch.setattr(
        boosting_round, "fit_scales", lambda ensemble, logits, *_: solved.append(logits[:, 0].tolist()) or (1.0, 1.0)
    )
    numbers = torch.arange(rows.stop) - rows.start + before
    loop.round().judged_losses(numbers[:, None].expand(-1, 3).float(), (1.0, 1.0))
    assert {number % 2 for number in solved[0]} == {1}
    assert {number % 2 for number in solved[1]} == {0}
    assert len(solved[0]) + len(solved[1]) == len(rows)


def test_the_loss_a_candidate_is_judged_by_is_that_of_the_ensemble_on_validation_rows(tmp_path: Path) -> None:
    loop = in_second_round(make_loop(tmp_path, alpha=0.3, temperature=3.0))
    rows = slice(loop.data.validation.start, loop.data.validation.stop)
    logits = torch.randn(rows.stop, 3, generator=torch.Generator().manual_seed(7))
    mixed, teacher = (0.7 * loop.state.ensemble_logits + 0.2 * logits)[rows], loop.teacher.logits[rows]
    hard = F.cross_entropy(mixed, loop.data.labels[rows])
    soft = 9 * F.kl_div(F.log_softmax(mixed / 3, -1), F.softmax(teacher / 3, -1), reduction="batchmean")
    found = loop.round().validation_loss(logits, (0.7, 0.2))
    assert found == pytest.approx(float(0.3 * hard + 0.7 * soft), rel=1e-5)
    for matrix in (logits, loop.state.ensemble_logits, loop.teacher.logits):
        matrix[: rows.start] += 1
    loop.data.labels[: rows.start] = 0
    assert loop.round().validation_loss(logits, (0.7, 0.2)) == found


@pytest.mark.parametrize("eta", [None, 0.25])
def test_an_accepted_student_moves_the_residuals_by_eta(eta: float | None, tmp_path: Path) -> None:
    loop = make_loop(tmp_path, eta=eta, combine="mean", objective="independent")
    candidate = loop.train(0, 0)
    loop.accept(candidate, 4, 12.5)
    n = len(loop.data.training)
    residual = candidate.logits - loop.teacher.logits[: loop.data.validation.stop]
    bound = float(residual[:n].abs().max())
    step = math.sqrt(math.log(2 * n) / 3) / bound if eta is None else eta
    torch.testing.assert_close(loop.state.residuals.S, step * residual[:n])
    torch.testing.assert_close(loop.state.validation_residuals.S, step * residual[n:])
    (record,) = loop.state.records
    assert (record["attempts"], record["seconds"], record["eta"]) == (4, 12.5, pytest.approx(step))
    assert record["bound"] == record["largest_residual"] == pytest.approx(bound)
    validation = slice(n, loop.data.validation.stop)
    labels = loop.data.labels[validation]
    expected = float((candidate.logits[validation].argmax(-1) == labels).float().mean())
    assert record["validation_accuracy"] == record["prefix_validation_accuracy"] == expected
    assert record["config"] == {"width": 4}
    assert record["params"] == sum(parameter.numel() for parameter in candidate.model.parameters())


def test_the_bound_of_a_round_is_the_largest_so_far(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, objective="published", combine="mean")
    candidate = loop.train(0, 0)
    n = len(loop.data.training)
    loop.state.bound = 1e6
    loop.accept(candidate, 1, 0.0)
    assert loop.state.bound == 1e6
    assert loop.state.records[0]["largest_residual"] == pytest.approx(
        float((candidate.logits - loop.teacher.logits)[:n].abs().max())
    )


def test_a_candidate_is_judged_without_a_trainer(tmp_path: Path) -> None:
    """What a fit leaves is the module's weights; all that follows is arithmetic on its logits."""
    loop = in_second_round(make_loop(tmp_path, objective="published", combine="mean"))
    torch.manual_seed(1)
    training = loop.round().attempt(Linear(loop.data.task.input_shape, 3), loop.trainer)
    assert training.callbacks == [training.check]
    candidate = training.judged(FitResult(3, 1, 0.5), "by hand")
    n = len(loop.data.training)
    expected = predict(training.module.model, loop.data, range(loop.data.validation.stop), torch.device("cpu"))
    assert torch.equal(candidate.logits, expected)
    assert candidate.scales == (0.5, 0.5)
    residual = expected[:n] - loop.teacher.logits[:n]
    torch.testing.assert_close(candidate.edges, loop.state.residuals.edges_reference(residual))
    assert candidate.validation_loss == loop.round().validation_loss(expected, (0.5, 0.5))
    assert candidate.accepted_by in ("condition", None)
    assert candidate.fit.epochs == 3
    # the weights of a check that held are those that are kept, and its logits of the training rows
    held = {name: torch.zeros_like(value) for name, value in training.module.state_dict().items()}
    training.check.held, training.check.known = held, True
    training.check.logits.fill_(0.25)
    again = training.judged(FitResult(3, 1, 0.5), "by hand")
    assert not any(parameter.any() for parameter in again.model.parameters())
    assert (again.logits[:n] == 0.25).all()
    # found in a process that was stopped, their logits are not known
    training.check.load_state_dict(training.check.state_dict())
    assert not training.judged(FitResult(3, 1, 0.5), "by hand").logits.any()
    assert (again.logits[n:] == 0).all()


def test_only_the_condition_is_checked_and_only_after_the_first_round(tmp_path: Path) -> None:
    for objective, combination, second, checked in (
        ("published", "mean", True, True), ("published", "mean", False, False), ("anchored", "learned", True, False),
    ):  # fmt: skip
        loop = make_loop(tmp_path, objective=objective, combine=combination)
        loop = in_second_round(loop) if second else loop
        model = Linear(loop.data.task.input_shape, 3)
        assert bool(loop.round().attempt(model, loop.trainer).callbacks) == checked


def test_signs_are_those_of_the_training_rows_and_then_of_the_validation_rows(tmp_path: Path) -> None:
    state = make_loop(tmp_path).state
    n = len(state.residuals.S)
    state.residuals.load(-torch.ones(n, 3))
    state.validation_residuals.load(torch.ones(len(state.validation_residuals.S), 3))
    signs = state.indicator(tmp_path)
    assert signs[:n].all()
    assert not signs[n:].any()


def test_a_state_that_is_done_has_its_matrices_where_they_were_kept(tmp_path: Path) -> None:
    loop = in_second_round(make_loop(tmp_path))
    loop.state.stop_reason = "done"
    kept, bare = loop.state.state_dict(), loop.state.state_dict(matrices=False)
    other = make_loop(tmp_path).state
    other.load_state_dict(kept)
    assert torch.equal(other.ensemble_logits, loop.state.ensemble_logits)
    other = make_loop(tmp_path).state
    other.load_state_dict(bare)
    assert not other.ensemble_logits.any()
    assert other.round == 1


def test_what_a_candidate_is_trained_against(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, weights="samples", objective="independent")
    model = Linear(loop.data.task.input_shape, 3)
    targets = loop.round().attempt(model, loop.trainer).module.targets
    assert (targets.bound, targets.round, targets.weight) == (1e-3, 0, None)
    loop = in_second_round(loop)
    targets = loop.round().attempt(model, loop.trainer).module.targets
    assert (targets.bound, targets.round) == (4.0, 1)
    assert targets.weight is not None
    assert torch.equal(targets.weight, loop.state.sample_weights())
    loop = in_second_round(make_loop(tmp_path))
    assert loop.round().attempt(model, loop.trainer).module.targets.weight is None


def test_edges_are_of_clipped_residuals_only_where_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = in_second_round(make_loop(tmp_path, objective="published", combine="mean", bound_quantile=0.5))
    n = len(loop.data.training)
    loop.state.bound = 0.0
    loop.state.residuals.load(torch.randn(n, 3, generator=torch.Generator().manual_seed(8)))
    model = Linear(loop.data.task.input_shape, 3)
    training, round_ = loop.round().attempt(model, loop.trainer), loop.round()
    judged: list[Any] = []
    monkeypatch.setattr(boosting_round, "judge", lambda *args: judged.append(args))
    candidate = training.judged(FitResult(1, 0, 0.0), "by hand")
    residual = candidate.logits[:n] - loop.teacher.logits[:n]
    whole = loop.state.residuals.edges(residual)
    bound = float(residual.abs().flatten().sort().values[math.floor(0.5 * (residual.numel() - 1))])
    clipped = loop.state.residuals.edges(residual.clamp(-bound, bound))
    assert not torch.equal(whole, clipped)
    assert torch.equal(round_.edges(candidate.logits[:n], clipped=False), whole)
    assert torch.equal(round_.edges(candidate.logits[:n]), clipped)
    ((round_number, edges, unclipped, loss, previous, require, _),) = judged
    assert (round_number, require) == (1, "condition")
    assert torch.equal(edges, clipped)
    assert torch.equal(unclipped, whole)
    assert loss == candidate.validation_loss
    assert previous == loop.round().validation_loss(candidate.logits, (1.0, 0.0))


@pytest.mark.parametrize(("seconds", "ends"), [(60.0, True), (60.9, True), (59.9, False)])
def test_rounds_end_after_so_many_minutes(seconds: float, ends: bool, tmp_path: Path) -> None:
    loop = make_loop(tmp_path, max_time=1.0)
    loop.state.round, loop.state.records = 2, [{"seconds": seconds - 20}, {"seconds": 20.0}]
    loop.end()
    assert (loop.state.stop_reason == "ended early, after boosting.max_time=1 minutes") == ends


def test_a_rounds_seconds_contain_those_of_processes_that_were_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = boosting_loop.fit

    def resumed(*given: Any) -> FitResult:
        return replace(fit(*given), seconds=1000.0)

    monkeypatch.setattr(boosting_loop, "fit", resumed)
    rounds = tiny_run(tmp_path, ACCEPT, "boosting.rounds=2")["rounds"]
    assert all(1000 <= row["seconds"] < 1500 for row in rounds)


def test_the_attempt_that_gave_a_student_is_recorded(tmp_path: Path) -> None:
    """Of candidates that all fail, the one of the least validation loss."""
    flags = (
        "trainer.max_epochs=1",
        "boosting.combine=mean",
        "boosting.rounds=2",
        "boosting.weak_learner.max_attempts=3",
        "boosting.weak_learner.min_improvement=0.99",
    )
    rows = tiny_run(tmp_path, *flags, ACCEPT)["rounds"]
    assert (rows[0]["attempts"], rows[0]["attempt"]) == (1, 0)
    (metrics,) = tmp_path.rglob("metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    accuracies = {row["attempt"]: row["validation_accuracy"] for row in lines if row["stage"] == "round-01"}
    assert rows[1]["attempts"] == len(accuracies) == 3
    assert accuracies[rows[1]["attempt"]] == pytest.approx(rows[1]["prefix_validation_accuracy"])
    assert len({*accuracies.values()}) == 3


def test_what_is_random_in_a_candidate_is_named_in_the_order_of_its_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another order would be other students in the same run directory."""
    drawn: list[tuple[Any, ...]] = []

    def noted(*purpose: Any) -> Any:
        drawn.append(purpose)
        return nullcontext()

    loop = in_second_round(make_loop(tmp_path, seed=5))
    monkeypatch.setattr(boosting_loop, "seeded", noted)
    loop.train(1, 2)
    assert drawn == [(5, "round-01/3", 1, part) for part in ("init", "knowledge", "fit")]


def test_edges_are_met_where_both_are_above_zero() -> None:
    found = describe(torch.tensor([1.0, 2.0, -1.0, 0.0, 3.0]), torch.tensor([1.0, 0.0, 1.0, 1.0, -1.0]))
    assert (found["satisfied"], found["classes"], found["min"], found["max"]) == (1, 5, -1.0, 3.0)
    assert found["per_class"] == [1.0, 2.0, -1.0, 0.0, 3.0]


def test_a_copy_of_a_students_module_has_the_same_targets() -> None:
    """A callback that averages weights copies the module."""
    module, _ = student_module("anchored", combine.learned)
    assert copy.deepcopy(module).targets is module.targets


def test_quality_of_fewer_rows_than_classes() -> None:
    logits = torch.eye(6)[[4, 5]]
    assert quality(logits, torch.tensor([4, 0]))["accuracy"] == 0.5


def test_a_finished_run_keeps_no_matrices(tmp_path: Path) -> None:
    tiny_run(tmp_path, "boosting.rounds=1")
    (path,) = tmp_path.rglob("boosting.ckpt")
    kept = torch.load(path, weights_only=True)
    assert not {"S", "validation_S", "ensemble_logits"} & kept.keys()
    assert kept["round"] == 1


# ---------------------------------------------------------------------------------- the student's module


def student_module(
    name: str, combination: combine.Combination, round_: int = 3, **options: Any
) -> tuple[StudentModule, Batch]:
    torch.manual_seed(3)
    rows = 9
    teacher = CachedTeacher(torch.randn(rows, 3))
    targets = RoundTargets(
        teacher, torch.randn(rows, 3), torch.rand(rows, 3) > 0.5, 6.0, round_, torch.rand(rows)
    )  # fmt: skip
    model = Linear((1, 8, 8), 3).eval()
    config = BoostingConfig(objective=name, **options)
    module = StudentModule(model, trainer_config(), config, objectives.objective_of(config), combination, targets)
    return module, Batch(torch.tensor([7, 2, 5]), torch.randn(3, 1, 8, 8), torch.tensor([0, 2, 1]))


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> np.ndarray:
    """tau^2 * KL(teacher || student) of each row, in float64 numpy."""

    def log_softmax(logits: Tensor) -> np.ndarray:
        scaled = logits.detach().double().numpy() / temperature
        return scaled - np.log(np.exp(scaled).sum(1, keepdims=True))  # type: ignore[no-any-return]

    log_p, log_q = log_softmax(student), log_softmax(teacher)
    return temperature**2 * (np.exp(log_q) * (log_q - log_p)).sum(1)  # type: ignore[no-any-return]


def cross_entropy(logits: Tensor, target: Tensor) -> np.ndarray:
    """-log softmax at the target of each row, in float64 numpy."""
    values = logits.detach().double().numpy()
    return np.log(np.exp(values).sum(1)) - values[np.arange(len(values)), target.numpy()]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["independent", "additive", "anchored"])
@pytest.mark.parametrize("weighed", [False, True])
def test_round_losses_are_those_of_float64_numpy(name: str, weighed: bool) -> None:
    alpha, tau, anchor = 0.3, 3.0, 0.2
    module, batch = student_module(name, combine.mean, alpha=alpha, temperature=tau, anchor=anchor)
    targets = module.targets
    if not weighed:
        targets.weight = None
    loss, ensemble = module.losses(batch)
    student, teacher = module.model(batch.inputs), targets.teacher.logits[batch.index]
    mixed = 0.75 * targets.ensemble[batch.index] + 0.25 * student  # round 3, from 0, of the mean
    torch.testing.assert_close(ensemble, mixed)
    weight = targets.weight[batch.index].double().numpy() if targets.weight is not None else np.ones(3)

    def distillation(logits: Tensor) -> float:
        rows = alpha * cross_entropy(logits, batch.labels) + (1 - alpha) * divergence(logits, teacher, tau)
        return float((weight * rows).mean())

    alone, together = distillation(student), distillation(mixed)
    expected = {"independent": alone, "additive": together, "anchored": 0.8 * alone + 0.2 * together}[name]
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_the_first_round_trains_the_student_alone_whatever_the_objective() -> None:
    for name in ("published", "additive", "anchored", "independent"):
        module, batch = student_module(name, combine.learned, round_=0, alpha=0.3)
        module.targets.weight = None
        loss, ensemble = module.losses(batch)
        student, teacher = module.model(batch.inputs), module.targets.teacher.logits[batch.index]
        rows = 0.3 * cross_entropy(student, batch.labels) + 0.7 * divergence(student, teacher, 2.0)
        assert float(loss.detach()) == pytest.approx(float(rows.mean()), rel=1e-5)
        torch.testing.assert_close(ensemble, student)
        assert module.scales == (0.0, 1.0)
        assert not module.scale_values.requires_grad


def test_weight_decay_does_not_act_on_learned_scales() -> None:
    module, _ = student_module("anchored", combine.learned)
    (optimizer,), _ = module.configure_optimizers()
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.pop(id(module.scale_values)) == 0.0
    assert set(decay.values()) == {0.1}
    assert set(decay) == {id(parameter) for parameter in module.model.parameters()}
    assert module.scales == pytest.approx((0.75, 0.25), rel=1e-6)


def test_scales_that_nothing_learns_are_not_optimised() -> None:
    for objective, combination in (("independent", combine.learned), ("anchored", combine.mean)):
        module, _ = student_module(objective, combination)
        (optimizer,), _ = module.configure_optimizers()
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(
            map(id, module.model.parameters())
        )
        assert module.scales == (0.75, 0.25)


# ---------------------------------------------------------------------------------- predictions


@pytest.mark.parametrize("training", [True, False])
def test_predictions_are_those_of_evaluation_mode(training: bool) -> None:
    data = DataModule(DataConfig(partial(patterns, samples=200)))
    model = Linear(data.task.input_shape, 3).train(training)
    found = predict(model, data, data.validation, torch.device("cpu"), batch_size=7)
    assert model.training is training
    images = data.task.prepare(data.inputs[data.validation.start : data.validation.stop])
    with torch.no_grad():
        torch.testing.assert_close(found, model.eval()(images))
    assert not found.requires_grad


# ---------------------------------------------------------------------------------- evaluation


class Fixed(nn.Module):
    """Gives hand-made logits: row i of them for an image whose first pixel is i."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[images[:, 0, 0, 0].long()]


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Four test images of three classes, a teacher, and two students, all with given logits."""
    target = torch.tensor([0, 1, 2, 2])
    teacher = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8], [0.5, 0.2, 0.3]]))
    first = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.8, 0.1, 0.1], [0.3, 0.4, 0.3], [0.1, 0.1, 0.8]]))
    second = torch.log(torch.tensor([[0.2, 0.6, 0.2], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7], [0.2, 0.2, 0.6]]))
    images = torch.arange(4)[:, None, None, None].expand(4, 1, 2, 2)
    task = SignalClassification((1, 2, 2), 3, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))  # inputs as they are
    data = SimpleNamespace(
        validation=range(4), test=range(4), labels=target, inputs=images, num_classes=3, task=task,
        loader=lambda rows, size: [Batch(torch.arange(4), images.float(), target)],
    )  # fmt: skip
    ensemble = ProgressiveEnsemble([Fixed(first), Fixed(second)], [(1.0, 1.0), (0.25, 0.75)], task)
    asked: list[Any] = []

    def latency(forward: Any, image: Tensor) -> Latency:
        asked.append(forward)
        return Latency(float(len(asked)), False)

    monkeypatch.setattr(evaluation, "latency", latency)
    return data, SimpleNamespace(model=Fixed(teacher)), ensemble, asked, target


def test_results_of_hand_made_logits(by_hand: Any, tmp_path: Path) -> None:
    data, teacher, ensemble, _, target = by_hand
    records = [{"round": 0, "mark": "a"}, {"round": 1, "mark": "b"}]
    found = evaluation.evaluate(teacher, ensemble, data, records, torch.device("cpu"), tmp_path)
    row, (first, second), whole = found["teacher"], found["rounds"], found["ensemble"]
    # of its own labels 0, 0, 2, 0 the teacher has 2 of 4 right
    assert row["accuracy"] == 0.5
    assert row["nll"] == pytest.approx(-np.log([0.7, 0.3, 0.8, 0.3]).mean(), rel=1e-6)
    assert row["ece"] == pytest.approx((0.3 + 0.6 + 0.2 + 0.5) / 4, rel=1e-5)  # each in a bin of its own
    assert "agreement" not in row
    # the first student says 0, 0, 1, 2: two labels, two of the teacher's; its third and last stand against each other
    assert (first["accuracy"], first["agreement"]) == (0.5, 0.5)
    assert first["nll"] == pytest.approx(-np.log([0.5, 0.1, 0.3, 0.8]).mean(), rel=1e-6)
    assert first["prefix_nll"] == pytest.approx(first["nll"])
    # confidences 0.5 and 0.4, a bin each; 0.8 twice, once right
    assert first["ece"] == pytest.approx((0.5 + 0.4 + abs(1 - 1.6)) / 4, rel=1e-5)
    # the second says 1, 1, 2, 2: three labels, one of the teacher's
    assert (second["accuracy"], second["agreement"]) == (0.75, 0.25)
    mixed = 0.25 * ensemble.members[0].logits + 0.75 * ensemble.members[1].logits
    assert second["prefix_nll"] == pytest.approx(float(F.cross_entropy(mixed, target)), rel=1e-6)
    assert whole["nll"] == second["prefix_nll"]
    assert whole["members"] == 2
    assert [row["mark"] for row in (first, second)] == ["a", "b"]


def test_each_latency_is_of_its_own_model_or_prefix(by_hand: Any, tmp_path: Path) -> None:
    data, teacher, ensemble, asked, _ = by_hand
    found = evaluation.evaluate(teacher, ensemble, data, [{}, {}], torch.device("cpu"), tmp_path)
    image = data.inputs[:1].float()

    def timed(milliseconds: float) -> Tensor:
        return asked[int(milliseconds) - 1](image)  # type: ignore[no-any-return]

    assert torch.equal(timed(found["teacher"]["latency_ms"]), teacher.model(image))
    for t, row in enumerate(found["rounds"]):
        assert torch.equal(timed(row["latency_ms"]), ensemble.members[t](image))
        assert torch.equal(timed(row["prefix_latency_ms"]), ensemble(image, members=t + 1))
    assert found["ensemble"]["latency_ms"] == found["rounds"][-1]["prefix_latency_ms"]


# ---------------------------------------------------------------------------------- from the configuration


def test_options_reach_the_parts_they_are_of(tmp_path: Path) -> None:
    parts = assemble(
        tiny_config(
            tmp_path, "trainer.max_epochs=3", "trainer.batch_size=9", "teacher.trainer.batch_size=11",
            "boosting.alpha=0.2", "boosting.weak_learner.max_attempts=4", "data.validation_fraction=0.2",
        )
    )  # fmt: skip
    assert (parts.trainer.max_epochs, parts.trainer.batch_size) == (3, 9)
    assert (parts.teacher.trainer.max_epochs, parts.teacher.trainer.batch_size) == (3, 11)
    assert (parts.boosting.alpha, parts.boosting.weak_learner.max_attempts) == (0.2, 4)
    assert parts.data.validation_fraction == 0.2
    assert len(parts.student) == 3


# ---------------------------------------------------------------------------------- what is written, said and refused


def test_attempts_are_counted_over_the_rungs_of_a_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[Stage] = []

    def no_fit(module: StudentModule, data: DataModule, stage: Stage, *args: Any) -> FitResult:
        stages.append(stage)
        return FitResult(1, 0, 0.0)

    monkeypatch.setattr(boosting_loop, "fit", no_fit)
    loop = in_second_round(make_loop(tmp_path))
    loop.train(2, 1)
    assert (stages[0].attempt, stages[0].description) == (3, "round 2/3, rung 2, attempt 4")
    loop.train(0, 0)
    assert (stages[1].attempt, stages[1].description) == (0, "round 2/3, rung 2")


def accepted(directory: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> BoostingLoop:
    """A loop after its first two rounds, whose students are as they were built."""
    monkeypatch.setattr(boosting_loop, "fit", lambda *args: FitResult(1, 0, 0.0))
    loop = make_loop(directory, **{"objective": "published", "combine": "mean", **options})
    for _ in range(2):
        loop.advance()
    return loop


def test_each_round_is_on_the_disk_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accept = replace(BoostingConfig().weak_learner, on_failure="accept")
    loop = accepted(tmp_path, monkeypatch, weak_learner=accept)
    again = make_loop(tmp_path, objective="published", combine="mean", weak_learner=accept)
    again.restore()
    assert (again.state.round, again.state.records) == (2, loop.state.records)
    assert torch.equal(again.state.ensemble_logits, loop.state.ensemble_logits)
    path = tmp_path / "boosting.ckpt"
    content = torch.load(path, weights_only=True)
    torch.save({**content, "bound": content["bound"] + 1}, path)  # another content under the same hash
    with pytest.raises(RunError, match=r"boosting\.ckpt.*is damaged"):
        make_loop(tmp_path).restore()


def test_a_round_reports_its_edges_of_clipped_and_of_whole_residuals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept = replace(BoostingConfig().weak_learner, on_failure="accept")
    loop = in_second_round(make_loop(tmp_path, objective="published", combine="mean", weak_learner=accept))
    rows = loop.data.validation
    candidate = SimpleNamespace(
        fit=FitResult(1, 0, 0.0), model=nn.Linear(1, 1), scales=(0.5, 0.5), validation_loss=1.0,
        accepted_by="condition", attempt=1,
        logits=F.one_hot((loop.data.labels[: rows.stop] + (torch.arange(rows.stop) % 4 == 0)) % 3, 3).float(),
        edges=torch.tensor([0.1, 0.2, 0.3]), unclipped_edges=torch.tensor([0.1, -0.2, -0.3]),
    )  # fmt: skip
    record = loop.record(candidate, 2, 3.0, 0.1, 4.0)  # type: ignore[arg-type]
    assert (record["edges"]["satisfied"], record["edges"]["min"]) == (1, pytest.approx(0.1))
    assert (record["attempts"], record["attempt"]) == (2, 1)
    right = (torch.arange(rows.start, rows.stop) % 4 != 0).float().mean()
    assert record["validation_accuracy"] == pytest.approx(float(right))
    mine = loop.state.ensemble_logits[rows.start : rows.stop].argmax(1) == loop.data.labels[rows.start : rows.stop]
    assert record["prefix_validation_accuracy"] == pytest.approx(float(mine.float().mean()))


def test_of_a_run_under_way_the_validation_rows_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accept = replace(BoostingConfig().weak_learner, on_failure="accept")
    loop = accepted(tmp_path, monkeypatch, weak_learner=accept)
    rows, data = slice(loop.data.validation.start, loop.data.validation.stop), loop.data
    found = read_json(tmp_path / "progress.json")
    accuracy = (loop.teacher.logits[rows].argmax(1) == data.labels[rows]).float().mean()
    assert found["teacher"]["accuracy"] == pytest.approx(float(accuracy))
    assert found["sizes"] == {"train": len(data.training), "validation": len(data.validation), "test": len(data.test)}
    assert [row["accuracy"] for row in found["rounds"]] == [row["validation_accuracy"] for row in loop.state.records]
    assert found["ensemble"]["params"] == sum(row["params"] for row in loop.state.records)
    assert found["ensemble"]["accuracy"] == loop.state.records[-1]["prefix_validation_accuracy"]
    assert (found["part"], found["planned_rounds"], found["seed"]) == ("validation", 3, 0)


def test_a_candidate_has_the_loss_that_it_is_judged_by(tmp_path: Path) -> None:
    """Not that of its final scales, where they were solved for on the same rows."""
    loop = in_second_round(make_loop(tmp_path, objective="independent", combine="held_out"))
    attempt = loop.round().attempt(Linear(loop.data.task.input_shape, 3), loop.trainer)
    candidate = attempt.judged(FitResult(1, 0, 0.0), "")
    assert candidate.judged_loss == loop.round().judged_losses(candidate.logits, candidate.scales)[0]
    assert candidate.judged_loss != candidate.validation_loss


def test_scales_solved_on_held_out_rows_are_learned_ones() -> None:
    with pytest.raises(ValueError, match="only learned scales are solved for"):
        combine.Combination(lambda round_: (0.5, 0.5), held_out=True)


@pytest.mark.parametrize(("fraction", "margin", "held"), [(0.6, 0.0, True), (0.7, 0.0, False), (0.6, 0.4, False)])
def test_the_condition_is_checked_with_its_fraction_and_margin(
    fraction: float, margin: float, held: bool, tmp_path: Path
) -> None:
    weak = replace(BoostingConfig().weak_learner, fraction=fraction, margin=margin, check_every=2)
    loop = in_second_round(make_loop(tmp_path, objective="published", combine="mean", weak_learner=weak))
    attempt = loop.round().attempt(Linear(loop.data.task.input_shape, 3), loop.trainer)
    check = WeakLearnerCheck(loop.data, lambda logits: torch.tensor([0.5, 0.3, -0.1]), weak, attempt.check.logits)
    for epoch, expected in ((0, False), (1, held)):
        trainer = SimpleNamespace(current_epoch=epoch, should_stop=False)
        check.on_validation_epoch_end(trainer, attempt.module)  # type: ignore[arg-type]
        assert (check.held is not None, trainer.should_stop) == (expected, expected)


def test_the_check_keeps_the_weights_that_were_validated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those are averages, where a callback averages weights."""
    validated: list[dict[str, torch.Tensor]] = []
    kept: list[dict[str, torch.Tensor]] = []
    compare, judged = BestWeights.on_validation_epoch_end, Attempt.judged

    def noted(self: BestWeights, trainer: L.Trainer, module: L.LightningModule) -> None:
        validated.append({name: value.clone() for name, value in module.state_dict().items()})
        compare(self, trainer, module)

    def judging(self: Attempt, *given: Any) -> Any:
        if self.check.held is not None:
            kept.append(self.check.held)
            assert all(torch.equal(value, validated[-1][name]) for name, value in self.check.held.items())
        return judged(self, *given)

    monkeypatch.setattr(BestWeights, "on_validation_epoch_end", noted)
    monkeypatch.setattr(Attempt, "judged", judging)
    tiny_run(
        tmp_path, "boosting=paper", "boosting.rounds=2", "trainer.max_epochs=6", ACCEPT,
        "boosting.weak_learner.check_every=3", "boosting.weak_learner.margin=-10",
        "trainer.callbacks=[{_target_: lightning.pytorch.callbacks.EMAWeightAveraging, decay: 0.9}]",
    )  # fmt: skip
    assert len(kept) == 1


@pytest.mark.parametrize("success", [True, False])
def test_scales_whose_fit_did_not_converge_are_said(
    success: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = SimpleNamespace(success=success, message="made up", x=np.array([1.0, 2.0]))
    monkeypatch.setattr("pkd_lightning.boosting.weak_learner.minimize", lambda *args, **options: found)
    logits, target = torch.randn(3, 8, 3), torch.arange(8) % 3
    fit_scales(logits[0], logits[1], logits[2], target, BoostingConfig())
    assert ("the fit of the scales ended before it converged: made up" in caplog.text) is not success


@pytest.mark.parametrize("initial", [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (math.inf, 1.0), (1.0, math.nan)])
def test_scales_start_from_positive_numbers(initial: tuple[float, float], tmp_path: Path) -> None:
    parts = assemble(tiny_config(tmp_path))
    combination = combine.Combination(lambda round_: initial, learned=True)
    wrong = replace(parts, boosting=replace(parts.boosting, combine=combination))
    with pytest.raises(ConfigError, match="combine"):
        wrong.check(DataModule(parts.data))


def test_a_number_that_is_not_finite_is_found_behind_an_interpolation(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.model\.d_state=inf: must be finite"):
        assemble(tiny_config(tmp_path, "+mine=inf", "teacher.model.d_state=${mine}"))


def test_a_tracker_is_given_values_not_interpolations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        "pkd_lightning.loggers.NoTracker.__init__", lambda self, *args, **options: given.update(options)
    )
    config = tiny_config(tmp_path, "+mine=7", "seed=${mine}")
    with open_tracker(config, tmp_path, Naming(config, "patterns")):
        pass
    assert given["config"]["seed"] == 7


@pytest.mark.parametrize("split", ["paper", "official"])
def test_a_teacher_from_elsewhere_may_have_seen_the_test_images(
    split: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_run(tmp_path / "first", "boosting.rounds=1")
    (weights,) = tmp_path.rglob("teacher.safetensors")
    caplog.clear()
    tiny_run(tmp_path / "second", f"teacher.checkpoint={weights}", f"data.split={split}", "boosting.rounds=1")
    assert ("it has seen images that split=paper tests on" in caplog.text) == (split == "paper")


def test_a_teachers_fit_draws_numbers_of_the_runs_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    fit = teacher_of.fit
    monkeypatch.setattr(teacher_of, "fit", lambda *args: seeds.append(torch.initial_seed()) or fit(*args))
    tiny_run(tmp_path, "boosting.rounds=1", "seed=3")
    assert seeds == [derive(3, "teacher", "fit")]


# ---------------------------------------------------------------------------------- options of objectives


@pytest.mark.parametrize(
    ("cls", "wrong", "limits"),
    [
        (cls, wrong, limits)
        for cls in (objectives.Published, objectives.Additive, objectives.Anchored, objectives.Independent)
        for wrong, limits in (
            ({"alpha": -0.1}, "from 0 to 1"), ({"alpha": 1.1}, "from 0 to 1"), ({"temperature": 0}, "above 0"),
        )
    ]
    + [
        (objectives.Published, {"gamma": 0}, "above 0"),
        (objectives.Published, {"first_term": "hard"}, "labels, soft, both"),
        (objectives.Anchored, {"anchor": -0.1}, "from 0 to 1"),
        (objectives.Anchored, {"anchor": 1.1}, "from 0 to 1"),
    ],
)  # fmt: skip
def test_an_objective_checks_its_options(cls: type[objectives.Objective], wrong: dict[str, Any], limits: str) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=rf"{name}={value!r}: must be .*{limits}"):
        cls(**wrong)


def test_what_the_objectives_are() -> None:
    """alpha 0.5 and temperature 2 as in BoostingConfig; what accepts a candidate, and what the loss looks at."""
    expected = {
        objectives.Published: ("published", "condition", False, False),
        objectives.Additive: ("additive", "improvement", True, True),
        objectives.Anchored: ("anchored", "improvement", True, True),
        objectives.Independent: ("independent", "improvement", False, True),
        objectives.Objective: ("objective", "improvement", False, False),
    }
    for cls, found in expected.items():
        made = cls()
        assert (made.name, made.accept_by, made.sees_ensemble, made.weighs_samples) == found
        assert (tuple(made.student_features), tuple(made.teacher_features)) == ((), ())
        assert cls is objectives.Objective or (made.alpha, made.temperature) == (0.5, 2.0)  # type: ignore[attr-defined]
    defaults = BoostingConfig()
    assert (defaults.alpha, defaults.temperature, defaults.anchor, defaults.gamma) == (0.5, 2.0, 0.5, 1.0)
    assert objectives.Anchored().anchor == 0.5
    assert (objectives.Published().gamma, objectives.Published().first_term) == (1.0, "soft")


def test_where_an_objective_comes_from() -> None:
    """An instance, a class, a short name, an import path; nothing else."""
    made = objectives.Published(alpha=0.3)
    assert objectives.objective_of(BoostingConfig(objective=made)) is made
    for given in (objectives.Published, "published", "pkd_lightning.boosting.objectives.Published"):
        assert objectives.objective_of(BoostingConfig(objective=given, gamma=3.0)).gamma == 3.0  # type: ignore[attr-defined]
    for wrong in ("math.sqrt", "torch.nn.Linear", math.sqrt, nn.Linear):
        with pytest.raises(ConfigError, match="objective"):
            objectives.objective_of(BoostingConfig(objective=wrong))


def test_samples_are_only_weighed_where_the_loss_does() -> None:
    assert objectives.objective_of(BoostingConfig(objective="anchored", weights="samples")).weighs_samples
    for objective in ("published", objectives.Objective):  # one of a user that says nothing of weights
        with pytest.raises(ConfigError, match="whose loss does not weigh samples"):
            objectives.objective_of(BoostingConfig(objective=objective, weights="samples"))


class NeedsGradients(objectives.Objective):
    """Penalises the gradient of its own logits."""

    def loss(self, batch: objectives.RoundBatch) -> Tensor:
        (gradient,) = torch.autograd.grad(batch.student.square().sum(), batch.student, create_graph=True)
        return gradient.square().mean()


def test_a_loss_is_tried_with_gradients(tmp_path: Path) -> None:
    parts = assemble(tiny_config(tmp_path))
    boosting = replace(parts.boosting, objective=NeedsGradients)
    replace(parts, boosting=boosting).check(DataModule(parts.data))


# ---------------------------------------------------------------------------------- metrics


def test_each_of_the_fifteen_bins_counts_for_itself() -> None:
    """A confidence in the middle of each bin, right and wrong in turn: errors that cancel only if bins are joined."""
    confidence = torch.arange(15) / 15 + 1 / 30
    correct = torch.arange(15) % 2 == 0
    expected = sum(abs(float(right) - float(sure)) for right, sure in zip(correct, confidence, strict=True)) / 15
    assert calibration_error(confidence, correct) == pytest.approx(expected, rel=1e-6)
