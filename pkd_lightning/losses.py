"""Losses as pure functions of tensors. Logits are (batch, classes), labels and weights (batch,)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_loss(student: Tensor, teacher: Tensor, temperature: float, weight: Tensor | None = None) -> Tensor:
    """tau^2 * KL(softmax(g / tau) || softmax(f / tau)), mean over the batch (Hinton et al., arXiv 1503.02531).

    The factor tau^2 keeps the gradient's size independent of tau. `weight` multiplies each sample's divergence.
    """
    log_p = F.log_softmax(student / temperature, dim=-1)
    log_q = F.log_softmax(teacher / temperature, dim=-1)
    divergence = F.kl_div(log_p, log_q, reduction="none", log_target=True)
    if weight is not None:
        divergence = weight[:, None] * divergence
    return temperature**2 * (divergence.sum() / len(student))


def distillation_loss(
    student: Tensor, teacher: Tensor, target: Tensor, alpha: float, temperature: float, weight: Tensor | None = None
) -> Tensor:
    """L_KD = alpha * CE(f, y) + (1 - alpha) * `soft_loss` (Mamba-PKD, arXiv 2503.01727, first round).

    alpha = 1 is cross-entropy, and `teacher` is not read; alpha = 0 is the soft loss alone. `weight` multiplies each
    sample's loss; the mean is over the batch all the same, so weights of mean 1 over the data leave the loss its size.
    """
    if weight is None:
        hard = F.cross_entropy(student, target)
    else:  # its two steps, in float32 even where autocast would take bfloat16 for the first: weights of 1 change no bit
        log_p = F.log_softmax(student, dim=-1, dtype=torch.promote_types(student.dtype, torch.float32))
        hard = F.nll_loss(weight[:, None] * log_p, target)
    if alpha == 1:
        return hard
    return alpha * hard + (1 - alpha) * soft_loss(student, teacher, temperature, weight)


def mutual_losses(peers: Tensor, temperature: float) -> Tensor:
    """Of each peer the mean over the others of tau^2 * KL(softmax(other / tau) || softmax(own / tau)): (K,).

    Deep mutual learning (Zhang et al., arXiv 1706.00384), where tau = 1. The others are constants: a peer's loss sends
    no gradient to them.

    Args:
        peers: (K, batch, classes) logits, K >= 2.
        temperature: tau.
    """
    log_p = F.log_softmax(peers / temperature, dim=-1)
    others = log_p.detach()
    divergence = F.kl_div(log_p[:, None], others[None], reduction="none", log_target=True)  # (own, other, batch, L)
    of_others = ~torch.eye(len(peers), dtype=torch.bool, device=peers.device)  # itself: 0, but for rounding
    return temperature**2 * (divergence.sum(-1).mean(-1) * of_others).sum(1) / (len(peers) - 1)


def barrier(s: Tensor, edge: float = 0.95) -> Tensor:
    """log(1 + s), continued from s = -`edge` downwards by its tangent.

    The continuation agrees in value and slope, so an outlier beyond the barrier has a finite loss and a gradient that
    pushes it back.
    """
    beyond = math.log1p(-edge) + (s + edge) / (1 - edge)
    return torch.where(s > -edge, torch.log1p(s.clamp(min=-edge)), beyond)


def residual_barrier_loss(residual: Tensor, indicator: Tensor, bound: float, gamma: float = 1.0) -> Tensor:
    """L_B = -(1/gamma) * mean_i sum_j [I * log(1 + s) + (1 - I) * log(1 - s)], s = l / (2B).

    Mamba-PKD (arXiv 2503.01727), equation 3, after B-DISTIL (arXiv 2302.10093). Both sum over samples and classes; over
    samples that is the mean over the batch here, as in the cross-entropy beside it.

    Args:
        residual: (batch, classes) l = f - g.
        indicator: (batch, classes) bool, I = 1[K+ > K-]: where the ensemble is below the teacher.
        bound: B > 0, bound on abs(l) over the training data; beyond abs(s) = 0.95 the loss goes on linearly.
        gamma: divisor, as in the paper; with the number of classes this is the mean over classes too.
    """
    s = residual / (2 * bound)
    return -barrier(torch.where(indicator, s, -s)).sum(-1).mean() / gamma
