"""Probabilistic knowledge transfer: how probably samples are neighbours (Passalis & Tefas, arXiv 1803.10837)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pkd_lightning.knowledge.relations import RelationTerm
from pkd_lightning.knowledge.vectors import unit

SMOOTHING = 1e-7  # of opposite vectors, whose probability would be 0; the authors add it inside of the logarithm


def neighbours(vectors: Tensor) -> Tensor:
    """Logarithms of p_ij = K_ij / sum_j K_ij, K_ij = (cos(x_i, x_j) + 1) / 2: (batch, batch).

    A sample is its own neighbour too, as in the authors' code.
    """
    directions = unit(vectors)
    kernel = ((directions @ directions.T + 1) / 2).clamp(min=0) + SMOOTHING
    return kernel.log() - kernel.sum(1, keepdim=True).log()


def neighbour_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over i, j of p_ij * log(p_ij / q_ij), p of the teacher and q of the student.

    The paper has the sum. The mean is that of the authors' code, with which weights of 30000 belong.

    Args:
        student: (batch, own dimensions).
        teacher: (batch, its dimensions).
    """
    log_p, log_q = neighbours(teacher), neighbours(student)
    return torch.mean(log_p.exp() * (log_p - log_q))


@dataclass(frozen=True)
class PKT(RelationTerm):
    """Probabilities of neighbours by the cosine kernel."""

    def relations(self, student: Tensor, teacher: Tensor) -> Tensor:
        """`neighbour_loss`."""
        return neighbour_loss(student, teacher)
