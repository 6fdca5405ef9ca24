"""DIST: correlations of the answers in place of their divergence (Huang et al., NeurIPS 2022, arXiv 2205.10536)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkd_lightning.checks import Faults
from pkd_lightning.knowledge.term import Pair, Term

EPSILON = 1e-8  # the authors'


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of each row of `a` with that of `b` (rows, columns); 0 where a row is constant."""
    centred = [F.normalize(rows - rows.mean(1, keepdim=True), dim=1, eps=EPSILON) for rows in (a, b)]
    return (centred[0] * centred[1]).sum(1)


def dist_loss(student: Tensor, teacher: Tensor, beta: float, gamma: float, temperature: float) -> Tensor:
    """tau^2 * (beta * L_inter + gamma * L_intra), of p = softmax(f / tau) and q = softmax(g / tau).

    L_inter = 1 - mean over samples of the correlation of p and q over classes, L_intra the same with samples
    and classes exchanged. tau^2 is that of the authors' code. A constant row or column has the correlation 0: so a
    batch of one sample has L_intra = 1, without a gradient.

    Args:
        student: (batch, L) logits f.
        teacher: (batch, L) logits g.
        beta: weight of the relation between classes.
        gamma: weight of the relation within a class.
        temperature: tau.
    """
    own, its = ((logits / temperature).softmax(1, dtype=_exact(logits)) for logits in (student, teacher))
    inter, intra = 1 - correlation(own, its).mean(), 1 - correlation(own.T, its.T).mean()
    return temperature**2 * (beta * inter + gamma * intra)


def _exact(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


@dataclass(frozen=True)
class DIST(Term):
    """Inter-class and intra-class relations of the answers.

    Args:
        beta: weight of the relation between classes, sample by sample.
        gamma: weight of the relation within a class, class by class.
        temperature: tau.
    """

    beta: float = 1.0
    gamma: float = 1.0
    temperature: float = 4.0

    within_batch: ClassVar[bool] = True

    def _faults(self) -> Faults:
        faults = super()._faults()
        faults.number("beta", 0)
        faults.number("gamma", 0)
        faults.number("temperature", 0, exclusive=True)
        return faults

    def loss(self, pair: Pair, parts: nn.Module) -> Tensor:
        """`dist_loss` of the logits."""
        return dist_loss(pair.student.logits, pair.teacher.logits, self.beta, self.gamma, self.temperature)
