"""The published method against a computation of its own, in float64 numpy, written from the papers' equations."""

import numpy as np
import pytest
import torch

from pkd_lightning.boosting import objectives
from pkd_lightning.boosting.options import BoostingConfig
from pkd_lightning.boosting.residuals import ResidualMatrices

SAMPLES, CLASSES, ROUNDS, ETA, BOUND = 7, 3, 4, 0.25, 5.0


def numbers(*shape: int, seed: int) -> np.ndarray:
    """Logits in [-2, 2], multiples of 1/64: float32 keeps them and their sums exactly."""
    return np.random.default_rng(seed).integers(-128, 129, shape) / 64


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))


def k_matrices(residuals: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """K+ and K- as printed: from 1/(2N), round by round, multiplied and then normalised for each class."""
    plus = np.full((SAMPLES, CLASSES), 1 / (2 * SAMPLES))
    minus = plus.copy()
    for residual in residuals:
        plus, minus = plus * np.exp(-ETA * residual), minus * np.exp(ETA * residual)
        for j in range(CLASSES):
            total = sum(plus[i, j] + minus[i, j] for i in range(SAMPLES))
            plus[:, j] /= total
            minus[:, j] /= total
    return plus, minus


def barrier_loss(residual: np.ndarray, plus: np.ndarray, minus: np.ndarray, gamma: float) -> float:
    """Equation 3 of Mamba-PKD: a sum over classes; over samples the mean."""
    total = 0.0
    for i in range(SAMPLES):
        for j in range(CLASSES):
            s = residual[i, j] / (2 * BOUND)
            total += np.log(1 + s) if plus[i, j] > minus[i, j] else np.log(1 - s)
    return -total / (gamma * SAMPLES)


def first_terms(student: np.ndarray, teacher: np.ndarray, target: np.ndarray, tau: float) -> tuple[float, float]:
    """Cross-entropy of the labels; tau^2 times the divergence of the soft labels: means over samples."""
    hard = -np.mean([log_softmax(student)[i, target[i]] for i in range(SAMPLES)])
    log_p, log_q = log_softmax(student / tau), log_softmax(teacher / tau)
    return float(hard), float(tau**2 * np.mean(np.sum(np.exp(log_q) * (log_q - log_p), axis=1)))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("gamma", [1.0, 2.5])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_rounds_of_the_published_method(alpha: float, gamma: float, tau: float) -> None:
    teacher, target = numbers(SAMPLES, CLASSES, seed=0), np.arange(SAMPLES) % CLASSES
    matrices, residuals = ResidualMatrices(SAMPLES, CLASSES), []
    for t in range(ROUNDS):
        student = numbers(SAMPLES, CLASSES, seed=t + 1)
        residual = student - teacher
        plus, minus = k_matrices(residuals)
        np.testing.assert_allclose(matrices.k_plus().numpy(), plus, rtol=1e-13)
        np.testing.assert_allclose(matrices.k_minus().numpy(), minus, rtol=1e-13)
        edges = [sum((plus[i, j] - minus[i, j]) * residual[i, j] for i in range(SAMPLES)) for j in range(CLASSES)]
        l = torch.from_numpy(residual).float()  # noqa: E741  # the papers' letter
        np.testing.assert_allclose(matrices.edges(l).numpy(), edges, rtol=1e-6, atol=1e-8)  # added up in float32
        np.testing.assert_allclose(matrices.edges_reference(l).numpy(), edges, rtol=1e-12, atol=1e-15)

        surrogate = barrier_loss(residual, plus, minus, gamma)
        hard, soft = first_terms(student, teacher, target, tau)
        expected = {
            "labels": alpha * hard + (1 - alpha) * surrogate,
            "soft": alpha * soft + (1 - alpha) * surrogate,
            "both": alpha * hard + (1 - alpha) * (soft + surrogate),
        }
        batch = objectives.RoundBatch(
            torch.from_numpy(student), torch.full((SAMPLES, CLASSES), torch.nan), torch.from_numpy(teacher),
            torch.from_numpy(target), matrices.indicator(), BOUND,
        )  # fmt: skip
        for first_term, value in expected.items():
            objective = objectives.Published(alpha, tau, first_term, gamma)
            assert float(objective.loss(batch)) == pytest.approx(value, rel=1e-13), first_term
        matrices.update(l, ETA)
        residuals.append(residual)


def test_the_paper_is_read_with_soft_labels() -> None:
    assert objectives.objective_of(BoostingConfig(objective="published")).first_term == "soft"
    assert objectives.Published().first_term == "soft"


def test_with_as_many_as_the_classes_gamma_gives_the_mean_over_classes() -> None:
    """The reading of the studies' runs `published_mean`."""
    residual, upwards = torch.from_numpy(numbers(5, 10, seed=9)), torch.rand(5, 10) < 0.5
    s = torch.where(upwards, residual, -residual) / (2 * BOUND)
    batch = objectives.RoundBatch(residual, residual, 0 * residual, torch.arange(5), upwards, BOUND)
    loss = objectives.Published(alpha=0.0, gamma=10.0).loss(batch)
    assert float(loss) == pytest.approx(-float(torch.log1p(s).mean()), rel=1e-12)
