"""Losses as pure functions of tensors. Logits are (batch, classes), labels (batch,)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """tau^2 * KL(softmax(g / tau) || softmax(f / tau)), mean over the batch (Hinton et al., arXiv 1503.02531).

    The factor tau^2 keeps the gradient's size independent of tau.
    """
    log_p = F.log_softmax(student / temperature, dim=-1)
    log_q = F.log_softmax(teacher / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def distillation_loss(student: Tensor, teacher: Tensor, target: Tensor, alpha: float, temperature: float) -> Tensor:
    """L_KD = alpha * CE(f, y) + (1 - alpha) * `soft_loss` (Mamba-PKD, arXiv 2503.01727, first round).

    alpha = 1 is cross-entropy, alpha = 0 the soft loss alone.
    """
    return alpha * F.cross_entropy(student, target) + (1 - alpha) * soft_loss(student, teacher, temperature)


def barrier(s: Tensor, edge: float = 0.95) -> Tensor:
    """log(1 + s), continued from s = -`edge` downwards by its tangent.

    The continuation agrees in value and slope, so an outlier beyond the barrier has a finite loss and a gradient that
    pushes it back.
    """
    beyond = math.log1p(-edge) + (s + edge) / (1 - edge)
    return torch.where(s > -edge, torch.log1p(s.clamp(min=-edge)), beyond)


def residual_barrier_loss(residual: Tensor, raise_student: Tensor, bound: float, gamma: float = 1.0) -> Tensor:
    """L_B = -(1/gamma) * mean_ij [I * log(1 + s) + (1 - I) * log(1 - s)], s = l / (2B) (B-DISTIL, arXiv 2302.10093).

    Args:
        residual: (batch, classes) l = f - g.
        raise_student: (batch, classes) bool, I = 1[K+ > K-]: where the ensemble is below the teacher.
        bound: B > 0, bound on abs(l) over the training data; beyond abs(s) = 0.95 the loss goes on linearly.
        gamma: divisor.
    """
    s = residual / (2 * bound)
    return -barrier(torch.where(raise_student, s, -s)).mean() / gamma
