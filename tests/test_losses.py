"""Losses against formulas written in float64 numpy, and their limits."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pkd_lightning.losses import barrier, distillation_loss, residual_barrier_loss, soft_loss

BATCH, CLASSES = 7, 5


@pytest.fixture
def logits() -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher (float64) and labels."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, BATCH, CLASSES, generator=generator, dtype=torch.float64)
    return student, teacher, torch.randint(CLASSES, (BATCH,), generator=generator)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x)
    return e / e.sum(axis=1, keepdims=True)


def kl_by_hand(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """Mean over the batch of KL(teacher || student) of the softened distributions."""
    p, q = softmax(student.numpy() / temperature), softmax(teacher.numpy() / temperature)
    return float((q * np.log(q / p)).sum() / len(p))


def gradient(function, x: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(x).sum(), x)
    return grad


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_soft_loss_is_the_scaled_divergence_from_the_teacher(logits, temperature):
    student, teacher, _ = logits
    expected = temperature**2 * kl_by_hand(student, teacher, temperature)
    assert soft_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-10)
    assert soft_loss(student.float(), teacher.float(), temperature).item() == pytest.approx(expected, rel=1e-5)


def test_soft_loss_of_a_student_like_its_teacher_is_zero_and_flat(logits):
    student, teacher, _ = logits
    shifted = teacher + torch.arange(BATCH)[:, None]  # the softmax does not see a constant per image
    for same in (teacher, shifted):
        assert soft_loss(same, teacher, 2.0).item() == pytest.approx(0, abs=1e-12)
        assert gradient(lambda x: soft_loss(x, teacher, 2.0), same).abs().max() < 1e-12
    assert soft_loss(student, teacher, 2.0) > 0.1


def test_soft_loss_at_high_temperature_is_the_squared_error_of_centred_logits(logits):
    student, teacher, _ = logits
    difference = (student - teacher).numpy()
    difference = difference - difference.mean(axis=1, keepdims=True)
    expected = (difference**2).sum() / (2 * CLASSES * BATCH)
    assert soft_loss(student, teacher, 1e4).item() == pytest.approx(expected, rel=2e-3)


def test_soft_loss_at_low_temperature_compares_the_teachers_first_choice(logits):
    student, teacher, _ = logits
    lag = student.amax(1) - student[torch.arange(BATCH), teacher.argmax(1)]
    temperature = 1e-3
    assert lag.mean() > 0.1
    assert soft_loss(student, teacher, temperature).item() == pytest.approx(temperature * lag.mean().item(), rel=0.02)


def test_the_size_of_the_soft_gradient_does_not_depend_on_a_large_temperature(logits):
    student, teacher, _ = logits
    sizes = [gradient(lambda x, t=t: soft_loss(x, teacher, t), student).norm().item() for t in (20.0, 60.0, 180.0)]
    assert max(sizes) < 1.1 * min(sizes)


def test_alpha_weighs_cross_entropy_against_the_soft_loss(logits):
    student, teacher, target = logits
    p = softmax(student.numpy())
    cross_entropy = -np.log(p[np.arange(BATCH), target.numpy()]).mean()
    soft = 9.0 * kl_by_hand(student, teacher, 3.0)
    for alpha in (0.0, 0.3, 1.0):
        expected = alpha * cross_entropy + (1 - alpha) * soft
        assert distillation_loss(student, teacher, target, alpha, 3.0).item() == pytest.approx(expected, rel=1e-10)


def test_limits_of_alpha_hold_for_the_gradient_too(logits):
    student, teacher, target = logits
    hard = gradient(lambda x: distillation_loss(x, teacher, target, 1.0, 4.0), student)
    torch.testing.assert_close(hard, gradient(lambda x: F.cross_entropy(x, target), student), rtol=1e-12, atol=0)
    soft = gradient(lambda x: distillation_loss(x, teacher, target, 0.0, 4.0), student)
    torch.testing.assert_close(soft, gradient(lambda x: soft_loss(x, teacher, 4.0), student), rtol=1e-12, atol=0)
    assert (hard - soft).norm() > 0.1


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_one_change_no_bit(logits, dtype, alpha):
    student, teacher, target = logits[0].to(dtype), logits[1].to(dtype), logits[2]
    ones = torch.ones(BATCH)
    plain, weighted = (lambda x, w=w: distillation_loss(x, teacher, target, alpha, 3.0, w) for w in (None, ones))
    assert torch.equal(plain(student), weighted(student))
    assert torch.equal(gradient(plain, student), gradient(weighted, student))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(student.bfloat16()), weighted(student.bfloat16()))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_weight_multiplies_its_samples_loss_and_gradient(logits, alpha):
    student, teacher, target = logits
    weight = torch.tensor([0.0, 0.25, 0.5, 1.0, 1.0, 1.25, 3.0])
    each = [
        distillation_loss(student[i : i + 1], teacher[i : i + 1], target[i : i + 1], alpha, 3.0) for i in range(BATCH)
    ]
    expected = (weight.double() * torch.stack(each)).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, target, alpha, 3.0, weight), expected)
    plain = gradient(lambda x: distillation_loss(x, teacher, target, alpha, 3.0), student)
    weighted = gradient(lambda x: distillation_loss(x, teacher, target, alpha, 3.0, weight), student)
    torch.testing.assert_close(weighted, weight.double()[:, None] * plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_barrier_inside_is_the_logarithm(dtype):
    s = torch.tensor([-0.949, -0.5, -1e-5, 0.0, 1e-5, 0.5, 0.999, 3.0], dtype=dtype)
    expected = np.log1p(s.double().numpy())
    np.testing.assert_allclose(barrier(s).double().numpy(), expected, rtol=1e-6 if dtype == torch.float32 else 1e-13)
    np.testing.assert_allclose(gradient(barrier, s).double().numpy(), 1 / (1 + s.double().numpy()), rtol=1e-5)


@pytest.mark.parametrize("edge", [0.5, 0.95])
def test_barrier_goes_on_as_its_tangent(edge):
    slope = 1 / (1 - edge)
    s = torch.tensor([-edge - 1e-9, -edge + 1e-9, -1.0, -50.0, -1e6], dtype=torch.float64)
    values, slopes = barrier(s, edge), gradient(lambda x: barrier(x, edge), s)
    expected = [math.log(1 - edge) + slope * (x + edge) for x in s.tolist()]
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-9)
    np.testing.assert_allclose(slopes.numpy(), slope, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_slope_exactly_at_the_continuation_point(dtype):
    s = torch.tensor([-0.95], dtype=dtype)
    assert gradient(barrier, s).item() == pytest.approx(20, rel=1e-5)


def test_barrier_rises_and_is_concave_throughout():
    s = torch.linspace(-3, 2, 2001, dtype=torch.float64) + 1e-5
    slopes = gradient(barrier, s)
    assert slopes.min() > 0
    assert slopes.diff().max() <= 1e-12
    assert barrier(s).diff().min() > 0


@pytest.mark.parametrize("gamma", [1.0, 2.5])
@pytest.mark.parametrize("bound", [1.0, 4.0])
def test_residual_barrier_loss_follows_its_equation(bound, gamma):
    generator = torch.Generator().manual_seed(1)
    residual = bound * (2 * torch.rand(BATCH, CLASSES, generator=generator, dtype=torch.float64) - 1)
    upwards = torch.rand(BATCH, CLASSES, generator=generator) < 0.5
    s, indicator = residual.numpy() / (2 * bound), upwards.numpy().astype(float)
    of_each_sample = np.sum(indicator * np.log(1 + s) + (1 - indicator) * np.log(1 - s), axis=1)
    expected = -np.mean(of_each_sample) / gamma
    assert residual_barrier_loss(residual, upwards, bound, gamma).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.9, 2.0, 100.0])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_loss_pushes_the_student_up_where_the_ensemble_is_below_the_teacher(scale, sign):
    bound = 3.0
    residual = torch.full((1, 2), sign * scale * bound)
    up, down = gradient(lambda x: residual_barrier_loss(x, torch.tensor([[True, False]]), bound), residual)[0]
    # a descent step goes against the gradient
    assert -math.inf < up < 0
    assert 0 < down < math.inf


def test_one_outlier_gives_a_finite_loss_and_a_gradient_back():
    residual = torch.zeros(4, 3)
    residual[1, 2] = -1e5
    loss = residual_barrier_loss(residual, torch.ones(4, 3, dtype=torch.bool), bound=1.0)
    assert loss.isfinite()
    grad = gradient(lambda x: residual_barrier_loss(x, torch.ones(4, 3, dtype=torch.bool), 1.0), residual)
    assert grad.isfinite().all()
    assert grad[1, 2] == grad.min()
    assert grad[1, 2] < 0
