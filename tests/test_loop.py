"""The boosting loop: what accepts a candidate, when a class is widened, when and why the loop stops."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pkd_lightning import matrix
from pkd_lightning.boosting import combine, objectives, weak_learner
from pkd_lightning.boosting.loop import BoostingLoop
from pkd_lightning.boosting.options import BoostingConfig, WeakLearnerConfig
from pkd_lightning.boosting.residuals import ResidualMatrices
from pkd_lightning.boosting.round import Round
from pkd_lightning.boosting.weak_learner import Candidate, describe, find_weak_learner, fit_scales, judge
from pkd_lightning.errors import ConfigError, Diverged
from pkd_lightning.fitting import FitResult
from pkd_lightning.losses import distillation_loss
from pkd_lightning.matrix import chunks
from tests.support import ACCEPT, tiny_run

POSITIVE = torch.tensor([0.1, 0.2, 0.3, 0.4])
MIXED = torch.tensor([0.1, 0.2, 0.3, -0.4])
ZERO = torch.tensor([0.1, 0.2, 0.3, 0.0])


@pytest.mark.parametrize(
    ("round_", "edges", "require", "options", "expected"),
    [
        (0, torch.zeros(4), "condition", {}, "first_round"),
        (1, POSITIVE, "condition", {}, "condition"),
        (1, MIXED, "condition", {}, None),
        (1, ZERO, "condition", {}, None),  # the condition is strict
        (1, MIXED, "condition", {"fraction": 0.75}, "relaxed_condition"),
        (1, MIXED, "condition", {"margin": -1.0}, "relaxed_condition"),
        (1, POSITIVE, "condition", {"fraction": 0.5}, "condition"),  # it meets the published one as well
        (1, POSITIVE, "condition", {"margin": 0.15}, None),
    ],
)
def test_judging_by_the_condition(
    round_: int, edges: torch.Tensor, require: str, options: dict[str, Any], expected: str | None
) -> None:
    assert judge(round_, edges, edges, 1.0, 0.5, require, WeakLearnerConfig(**options)) == expected


def test_the_condition_of_clipped_residuals_alone_is_a_relaxed_one() -> None:
    config = WeakLearnerConfig()
    assert judge(1, POSITIVE, MIXED, 1.0, 0.5, "condition", config) == "relaxed_condition"
    assert judge(1, MIXED, POSITIVE, 1.0, 0.5, "condition", config) is None
    assert describe(POSITIVE, MIXED)["satisfied"] == int((MIXED > 0).sum()) < len(MIXED)


@pytest.mark.parametrize(
    ("loss", "least", "expected"), [(0.9, 0.0, "improvement"), (1.0, 0.0, None), (1.1, 0.0, None), (0.95, 0.1, None)]
)
def test_judging_by_improvement_never_claims_the_condition(loss: float, least: float, expected: str | None) -> None:
    config = WeakLearnerConfig(min_improvement=least)
    assert judge(1, POSITIVE, POSITIVE, loss, 1.0, "improvement", config) == expected


def candidate(loss: float, accepted_by: Any = None) -> Candidate:
    return Candidate(
        torch.nn.Identity(),
        (0.5, 0.5),
        torch.zeros(1, 1),
        torch.zeros(1),
        torch.zeros(1),
        loss,
        FitResult(1, 0, 0.0),
        accepted_by,
        judged_loss=loss,
    )


def test_attempts_end_with_the_first_accepted_candidate() -> None:
    found = [candidate(3.0), candidate(2.0, "improvement"), candidate(1.0, "improvement")]
    best, attempts = find_weak_learner(1, found.__getitem__, WeakLearnerConfig(max_attempts=3))
    assert best is found[1]
    assert attempts == 2


def test_a_failed_class_gives_nothing_or_its_best_candidate() -> None:
    found = [candidate(3.0), candidate(1.0), replace(candidate(0.5), judged_loss=2.0)]
    assert find_weak_learner(1, found.__getitem__, WeakLearnerConfig(max_attempts=3)) == (None, 3)
    best, attempts = find_weak_learner(1, found.__getitem__, WeakLearnerConfig(max_attempts=3, on_failure="accept"))
    assert best is not None
    assert (best.validation_loss, best.accepted_by, attempts) == (1.0, "best_candidate", 3)


def test_a_diverged_candidate_is_a_failed_attempt() -> None:
    def train(attempt: int) -> Candidate:
        if attempt == 0:
            raise Diverged("the loss was not finite")
        return candidate(1.0, "improvement")

    best, attempts = find_weak_learner(1, train, WeakLearnerConfig(max_attempts=2))
    assert best is not None
    assert attempts == 2


@pytest.mark.parametrize("max_attempts", [1, 2])
@pytest.mark.parametrize("diverged", [{0}, {0, 1}, {0, 1, 2}])
def test_one_more_candidate_is_tried_where_one_diverged(max_attempts: int, diverged: set[int]) -> None:
    tried = []

    def train(attempt: int) -> Candidate:
        tried.append(attempt)
        if attempt in diverged:
            raise Diverged("the loss was not finite")
        return candidate(float(attempt))

    config = WeakLearnerConfig(max_attempts=max_attempts, on_failure="accept")
    best, attempts = find_weak_learner(1, train, config)
    assert tried == list(range(max_attempts + 1))
    assert attempts == max_attempts + 1
    sound = set(tried) - diverged
    assert best is None if not sound else best is not None and best.validation_loss == min(sound)


def scale_problem(useless: bool) -> tuple[torch.Tensor, ...]:
    """An ensemble, a student that helps it or is noise, a teacher and labels: 200 samples of 5 classes."""
    torch.manual_seed(0)
    teacher, noise = torch.randn(200, 5) * 2, torch.randn(200, 5)
    ensemble = teacher * 0.5 + torch.randn(200, 5) * 0.3
    return ensemble, noise if useless else teacher * 4 + noise * 5, teacher, teacher.argmax(-1)


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e4, 1e8])
@pytest.mark.parametrize("useless", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_fitted_scales_minimise_the_loss_over_positive_scales(useless: bool, size: float, alpha: float) -> None:
    ensemble, student, teacher, target = scale_problem(useless)
    student = student * size
    config = BoostingConfig(alpha=alpha, temperature=3.0)
    a, c = fit_scales(ensemble, student, teacher, target, config)

    def loss(a: float, c: float) -> float:
        mixed = a * ensemble.double() + c * student.double()
        return float(distillation_loss(mixed, teacher.double(), target, config.alpha, config.temperature))

    assert a > 0
    assert c > 0
    assert (c * size > 0.01) != useless
    best = loss(a, c)
    for da, dc in ((0.99, 1), (1.01, 1), (1, 0.95), (1, 1.05), (1.01, 0.95), (0.99, 1.05)):
        assert best <= loss(a * da, c * dc) + 1e-8  # the bound of a useless student costs 2e-9


def test_scales_are_fitted_over_all_chunks_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = scale_problem(useless=False)
    whole = fit_scales(*problem, BoostingConfig())
    monkeypatch.setattr("pkd_lightning.matrix.CHUNK_BYTES", 1)
    assert len(list(chunks(problem[0].shape))) == 13
    assert fit_scales(*problem, BoostingConfig()) == pytest.approx(whole, rel=1e-6)


def test_one_image_that_explodes_does_not_keep_the_scales_from_being_fitted() -> None:
    ensemble, student, teacher, target = scale_problem(useless=False)
    sound = fit_scales(ensemble, student, teacher, target, BoostingConfig())
    student[0] *= 1e6
    a, c = fit_scales(ensemble, student, teacher, target, BoostingConfig())
    assert 0 < c < 1e-3  # to hold that image's loss, nothing else is left of the student
    assert a > sound[0]


def test_a_student_of_zeros_leaves_the_ensemble_as_good_as_it_was() -> None:
    ensemble, student, teacher, target = scale_problem(useless=False)
    a, c = fit_scales(ensemble, torch.zeros_like(student), teacher, target, BoostingConfig())
    assert a > 1  # towards the teacher, of which the ensemble is half
    assert c < 10


def never(*args: Any) -> None:
    """A judge that accepts only the first round."""
    return None if args[0] else "first_round"  # type: ignore[return-value]


def test_expansion_climbs_every_class_and_stops_past_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pkd_lightning.boosting.round.judge", never)
    results = tiny_run(tmp_path, "boosting.weak_learner.on_failure=expand", "boosting.weak_learner.max_attempts=2")
    assert [row["class_index"] for row in results["rounds"]] == [0]
    assert "no weak learner for round 2" in results["stop_reason"]
    assert "3 rungs" in results["stop_reason"]
    (log,) = tmp_path.rglob("metrics.jsonl")
    attempts = {line for line in log.read_text().splitlines() if '"stage": "round-01"' in line}
    assert len(attempts) == 4  # two on rung 2, two on rung 3; rung 1 was used by the first round


def test_a_class_that_fails_is_followed_by_the_next_and_the_round_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = iter(["first_round", None, "improvement"])
    monkeypatch.setattr("pkd_lightning.boosting.round.judge", lambda *args: next(verdicts))
    results = tiny_run(tmp_path, "boosting.weak_learner.on_failure=expand")
    assert [row["class_index"] for row in results["rounds"]] == [0, 2]
    assert results["rounds"][1]["attempts"] == 2
    assert "all 3 rungs" in results["stop_reason"]


def test_repetition_stays_in_a_class_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pkd_lightning.boosting.round.judge", lambda *args: "improvement")
    results = tiny_run(tmp_path, "student.repeat=true", "boosting.rounds=4")
    assert [row["class_index"] for row in results["rounds"]] == [0, 0, 0, 0]


def test_accepting_a_failure_is_reported_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pkd_lightning.boosting.round.judge", never)
    results = tiny_run(tmp_path, "boosting.weak_learner.on_failure=accept")
    assert [row["accepted_by"] for row in results["rounds"]] == ["first_round", "best_candidate", "best_candidate"]


def test_the_first_rounds_edges_are_exactly_zero_and_later_ones_are_not(tmp_path: Path) -> None:
    rounds = tiny_run(tmp_path)["rounds"]
    assert rounds[0]["edges"]["per_class"] == [0.0, 0.0, 0.0]
    assert rounds[0]["edges"]["satisfied"] == 0
    for row in rounds[1:]:
        edges = row["edges"]
        assert any(edges["per_class"])
        assert edges["satisfied"] == sum(edge > 0 for edge in edges["per_class"])
        assert (edges["min"], edges["max"]) == (min(edges["per_class"]), max(edges["per_class"]))


def test_training_stops_early_when_the_condition_holds_at_a_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ResidualMatrices, "edges", lambda self, residual: torch.ones(residual.shape[1]))
    results = tiny_run(
        tmp_path, "boosting.objective=published", "boosting.combine=mean", "trainer.max_epochs=5",
        "trainer.patience=null", "boosting.weak_learner.check_every=2",
    )  # fmt: skip
    assert [row["epochs"] for row in results["rounds"]] == [5, 2, 2]  # the first round has no condition
    assert [row["accepted_by"] for row in results["rounds"]] == ["first_round", "condition", "condition"]


def test_a_check_is_one_forward_pass_over_the_training_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond its checks, a student is asked once: on the validation rows where a check held, else on all of them."""
    from pkd_lightning.boosting import round as round_

    asked: list[tuple[str, range]] = []

    def note(name: str, real: Any) -> Any:
        def noted(model: Any, data: Any, rows: range, *args: Any, **kwargs: Any) -> Any:
            calls = 0

            def count(*_: Any) -> None:
                nonlocal calls
                calls += 1

            handle = model.register_forward_pre_hook(count)
            result = real(model, data, rows, *args, **kwargs)
            handle.remove()
            assert calls == -(-len(rows) // 512)
            asked.append((name, rows))
            return result

        return noted

    monkeypatch.setattr(weak_learner, "predict", note("check", weak_learner.predict))
    monkeypatch.setattr(round_, "predict", note("loop", round_.predict))
    # the second student's second check holds, none of the third's
    monkeypatch.setattr(weak_learner, "condition_holds", lambda *args: [name for name, _ in asked].count("check") == 2)
    results = tiny_run(
        tmp_path, "boosting.objective=published", "boosting.combine=mean", "trainer.max_epochs=5",
        "trainer.patience=null", "boosting.weak_learner.check_every=2", "boosting.weak_learner.max_attempts=1", ACCEPT,
    )  # fmt: skip
    assert [row["epochs"] for row in results["rounds"]] == [5, 4, 5]
    training, both = asked[1][1], asked[0][1]
    validation = range(training.stop, both.stop)
    assert [name for name, _ in asked] == ["loop", "check", "check", "loop", "check", "check", "loop"]
    assert [rows for _, rows in asked] == [both, training, training, validation, training, training, both]


def test_the_teacher_is_asked_once_on_each_training_and_validation_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pkd_lightning import teacher

    rows = 0
    cached, finish = teacher.cached_logits, BoostingLoop.ensemble

    def watched(model: torch.nn.Module, data: Any, *args: Any) -> torch.Tensor:
        def count(module: Any, inputs: tuple[torch.Tensor]) -> None:
            nonlocal rows
            rows += len(inputs[0])

        model.register_forward_pre_hook(count)
        return cached(model, data, *args)

    def after_the_rounds(loop: BoostingLoop) -> Any:
        assert rows == loop.data.validation.stop
        assert torch.equal(loop.teacher.logits, load_file(tmp_path.rglob("logits.safetensors").__next__()).popitem()[1])
        return finish(loop)

    monkeypatch.setattr(teacher, "cached_logits", watched)
    monkeypatch.setattr(BoostingLoop, "ensemble", after_the_rounds)
    assert len(tiny_run(tmp_path)["rounds"]) == 3
    assert rows > 0


def test_a_run_with_all_its_matrices_in_files_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("boosting.objective=published", ACCEPT)
    expected = tiny_run(tmp_path / "memory", *flags)
    monkeypatch.setattr(matrix, "MAPPED_BYTES", 0)
    advance = BoostingLoop.advance

    names = set()

    def resumed_every_round(loop: BoostingLoop) -> None:
        advance(loop)
        names.update(path.name for path in loop.directory.glob("*.[01]"))
        before = loop.state.residuals.S.clone(), loop.state.ensemble_logits.clone()
        loop.restore()
        assert torch.equal(loop.state.residuals.S, before[0])
        assert torch.equal(loop.state.ensemble_logits, before[1])

    monkeypatch.setattr(BoostingLoop, "advance", resumed_every_round)
    found = tiny_run(tmp_path / "files", *flags)
    for ours, theirs in zip(found["rounds"], expected["rounds"], strict=True):
        timings = {key: value for key, value in ours.items() if key == "seconds" or "latency" in key}
        assert ours == theirs | timings
    (checkpoint,) = (tmp_path / "files").rglob("boosting.ckpt")
    assert checkpoint.stat().st_size < 20_000
    assert not list(checkpoint.parent.glob("*.[01]"))  # a finished run needs none of them
    assert names == {f"{name}.{i}" for name in ("residuals", "validation_residuals", "ensemble_logits") for i in (0, 1)}


def test_residuals_follow_the_accepted_students(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S in the checkpoint is the sum of eta * (f_t - g) over the students that were kept."""
    from pkd_lightning.assembling import assemble
    from pkd_lightning.data.module import DataModule
    from pkd_lightning.ensemble import ProgressiveEnsemble
    from pkd_lightning.fitting import predict
    from pkd_lightning.rundir import RunDirectory
    from tests.support import tiny_config

    for needed_to_go_on in ((BoostingLoop, "close"), (RunDirectory, "tidy")):
        monkeypatch.setattr(*needed_to_go_on, lambda self: None)
    results = tiny_run(tmp_path)
    (checkpoint,) = tmp_path.rglob("boosting.ckpt")
    state = torch.load(checkpoint, weights_only=True)
    data = DataModule(assemble(tiny_config(tmp_path)).data)
    (teacher,) = load_file(next(tmp_path.rglob("logits.safetensors"))).values()
    ensemble = ProgressiveEnsemble.load(checkpoint.parent)
    expected, mixed, bound = torch.zeros_like(state["S"]), torch.zeros_like(teacher), 0.0
    n = len(data.training)
    for member, row in zip(ensemble.members, results["rounds"], strict=True):
        logits = predict(member, data, range(data.validation.stop), torch.device("cpu"))
        bound = max(bound, float((logits - teacher)[:n].abs().max()))
        assert row["bound"] == pytest.approx(bound, rel=1e-5)
        assert row["largest_residual"] == pytest.approx(float((logits - teacher)[:n].abs().max()), rel=1e-5)
        expected += row["eta"] * (logits - teacher)[:n]
        mixed = row["scales"][0] * mixed + row["scales"][1] * logits
    torch.testing.assert_close(state["S"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["ensemble_logits"], mixed, rtol=1e-4, atol=1e-5)


def test_one_exploding_image_leaves_the_bound_and_the_other_residuals_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, flags = BoostingLoop.train, ("boosting.bound_quantile=0.99", "boosting.rounds=1")
    found: list[tuple[int, int]] = []

    def exploding(loop: BoostingLoop, *args: int) -> Candidate:
        candidate, n = train(loop, *args), len(loop.data.training)
        residual = candidate.logits[:n] - loop.teacher.logits[:n]
        row, column = divmod(int(residual.abs().argmax()), residual.shape[1])
        candidate.logits[row, column] += 7e12 * residual[row, column].sign()
        candidate.logits[n, 0] += 7e12  # and one of the validation rows
        found.append((row, column))
        return candidate

    monkeypatch.setattr(BoostingLoop, "close", lambda self: None)  # the matrices stay
    (expected,) = tiny_run(tmp_path / "plain", *flags)["rounds"]
    monkeypatch.setattr(BoostingLoop, "train", exploding)
    (row,) = tiny_run(tmp_path / "exploding", *flags)["rounds"]
    assert len(found) == 1
    assert (row["bound"], row["eta"]) == (expected["bound"], expected["eta"])
    assert expected["bound"] < expected["largest_residual"] < 100
    assert row["largest_residual"] == pytest.approx(7e12)
    plain, state = (
        torch.load(next((tmp_path / name).rglob("boosting.ckpt")), weights_only=True) for name in ("plain", "exploding")
    )
    assert torch.equal(state["S"], plain["S"])
    assert state["validation_S"][0, 0] == pytest.approx(row["eta"] * row["bound"])
    plain["validation_S"][0, 0] = state["validation_S"][0, 0]
    assert torch.equal(state["validation_S"], plain["validation_S"])


def test_what_is_judged_is_what_enters_the_residual_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accept, update = BoostingLoop.accept, ResidualMatrices.update
    checked: list[torch.Tensor] = []
    entered: list[tuple[torch.Tensor, torch.Tensor]] = []

    def check(self: Any, logits: torch.Tensor, clipped: bool = True) -> torch.Tensor:
        found = edges(self, logits, clipped)
        if clipped:
            checked.append(found)
        return found

    def watched(matrices: ResidualMatrices, residual: Any, eta: float) -> None:
        whole = residual[slice(0, residual.shape[0])]
        entered.append((matrices.edges_reference(residual), whole))
        update(matrices, residual, eta)

    def compare(loop: BoostingLoop, candidate: Candidate, *args: Any) -> None:
        entered.clear()
        accept(loop, candidate, *args)
        (found, training), (_, validation) = entered
        torch.testing.assert_close(found, candidate.edges, rtol=1e-9, atol=1e-12)
        assert training.abs().max() <= loop.state.bound
        assert validation.abs().max() <= loop.state.bound
        residual = candidate.logits[: len(training)] - loop.teacher.logits[: len(training)]
        assert torch.equal(training, residual.clamp(-loop.state.bound, loop.state.bound))

    edges = Round.edges
    monkeypatch.setattr(Round, "edges", check)
    monkeypatch.setattr(ResidualMatrices, "update", watched)
    monkeypatch.setattr(BoostingLoop, "accept", compare)
    rounds = tiny_run(
        tmp_path, "boosting=paper", "boosting.rounds=3", "boosting.bound_quantile=0.8", "trainer.max_epochs=2",
        "boosting.weak_learner.check_every=1",
    )["rounds"]  # fmt: skip
    assert len(rounds) == 3
    assert len(checked) > len(rounds)  # the checks during the fits ask the same function
    assert any(row["largest_residual"] > row["bound"] for row in rounds)
    assert [row["bound"] for row in rounds] == sorted(row["bound"] for row in rounds)


def test_a_student_whose_ensemble_is_not_finite_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pkd_lightning.boosting import round as round_

    answers = [(float("nan"), float("nan")), (0.5, 0.5)]
    monkeypatch.setattr(round_, "fit_scales", lambda *args: answers.pop(0))
    rounds = tiny_run(tmp_path, "boosting.rounds=2", "boosting.weak_learner.on_failure=accept")["rounds"]
    assert [row["attempts"] for row in rounds] == [1, 2]
    assert rounds[1]["scales"] == [0.5, 0.5]


@pytest.mark.parametrize("quantile", [1.0, 0.9])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_student_whose_logits_are_not_finite_is_refused(
    bad: float, quantile: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pkd_lightning.boosting import round as round_

    asked = 0

    def broken(*args: Any, out: torch.Tensor, **options: Any) -> torch.Tensor:
        nonlocal asked
        asked += 1
        predict(*args, out=out, **options)
        if asked == 1:
            out[5, 1] = bad
        return out

    predict = round_.predict
    monkeypatch.setattr(round_, "predict", broken)
    flags = (f"boosting.bound_quantile={quantile}", "boosting.rounds=1", "boosting.weak_learner.max_attempts=2")
    (row,) = tiny_run(tmp_path, *flags)["rounds"]
    assert (asked, row["attempts"]) == (2, 2)  # the first attempt failed, as one that diverged does


@pytest.mark.parametrize("objective", ["anchored", "additive", "independent"])
def test_samples_are_weighed_by_the_residual_matrices_after_the_first_round(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pkd_lightning.boosting import round as round_

    given: list[torch.Tensor | None] = []
    train = BoostingLoop.train

    def watched(self: BoostingLoop, *args: int) -> Candidate:
        candidate, residuals, n = train(self, *args), self.state.residuals, len(self.data.training)
        weight = given[-1]
        if self.state.round > 0 and weight is not None:
            size = (residuals.k_plus() - residuals.k_minus()).abs().sum(1)
            torch.testing.assert_close(weight[:n].double(), size / size.mean(), rtol=1e-5, atol=1e-6)
            assert weight.std() > 0.1
            assert torch.equal(weight[n:], torch.ones(self.data.validation.stop - n))
        return candidate

    def targets(*args: Any) -> Any:
        made = real(*args)
        given.append(made.weight)
        return made

    real = round_.RoundTargets
    monkeypatch.setattr(round_, "RoundTargets", targets)
    monkeypatch.setattr(BoostingLoop, "train", watched)
    flags = (f"boosting.objective={objective}", "boosting.rounds=2", ACCEPT)
    weighed = tiny_run(tmp_path, *flags, "boosting.weights=samples")["rounds"]
    assert [weight is None for weight in given] == [True, False]
    plain = tiny_run(tmp_path, *flags)["rounds"]
    assert all(weight is None for weight in given[2:])
    assert weighed[0]["nll"] == plain[0]["nll"]
    assert weighed[1]["nll"] != plain[1]["nll"]


def test_only_an_objective_that_weighs_samples_takes_weights() -> None:
    with pytest.raises(ConfigError, match=r"weights='samples': must be none with objective='published'"):
        objectives.objective_of(BoostingConfig(objective="published", weights="samples"))
    for name in ("anchored", "additive", "independent"):
        assert objectives.objective_of(BoostingConfig(objective=name, weights="samples")).weighs_samples
    assert BoostingConfig(objective="published").weights == "none"


@pytest.mark.parametrize("value", [0, -0.1, 1.5, float("nan"), "all"])
def test_the_quantile_of_the_bound_is_above_0_and_at_most_1(value: Any) -> None:
    with pytest.raises(ConfigError, match="bound_quantile="):
        BoostingConfig(bound_quantile=value)
    BoostingConfig(bound_quantile=1)


def test_every_objective_starts_with_the_same_first_student(tmp_path: Path) -> None:
    firsts = {
        tiny_run(tmp_path, f"boosting.objective={name}", "boosting.rounds=1")["rounds"][0]["nll"]
        for name in ("published", "additive", "anchored", "independent")
    }
    assert len(firsts) == 1


def test_what_an_objective_sees() -> None:
    names = ("published", "additive", "anchored", "independent")
    config = BoostingConfig()
    torch.manual_seed(0)
    for name in names:
        objective = getattr(objectives, name)()
        tensors = [torch.randn(6, 3) for _ in range(3)]
        batch = objectives.RoundBatch(*tensors, torch.arange(6) % 3, torch.rand(6, 3) > 0.5, 5.0)
        other = batch._replace(ensemble=batch.ensemble + 1 + torch.randn(6, 3))
        changed = not torch.equal(objective.loss(batch), objective.loss(other))
        assert changed == objective.sees_ensemble
        weighed = batch._replace(weight=torch.tensor([0.0, 2.0, 1.0, 1.0, 0.5, 1.5]))
        changed = not torch.equal(objective.loss(batch), objective.loss(weighed))
        assert changed == objective.weighs_samples
    assert combine.learned.learned
    assert weak_learner.required(config, objectives.Published()) == "condition"
    assert weak_learner.required(config, objectives.Anchored()) == "improvement"


def test_anchor_weights_the_two_losses() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(6, 3) for _ in range(3)]
    batch = objectives.RoundBatch(*tensors, torch.arange(6) % 3, torch.rand(6, 3) > 0.5, 5.0)
    at = {anchor: float(objectives.Anchored(anchor=anchor).loss(batch)) for anchor in (0.0, 0.25, 1.0)}
    assert at[0.0] == pytest.approx(float(objectives.Independent().loss(batch)))
    assert at[1.0] == pytest.approx(float(objectives.Additive().loss(batch)))
    assert at[0.25] == pytest.approx(0.75 * at[0.0] + 0.25 * at[1.0])
