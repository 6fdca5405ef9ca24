"""Logit standardisation: z-scores of the logits in place of the logits (Sun et al., CVPR 2024, arXiv 2403.01427)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pkd_lightning.checks import Faults
from pkd_lightning.knowledge.term import Pair, Term
from pkd_lightning.losses import soft_loss

EPSILON = 1e-7  # the authors'


def standardised(logits: Tensor) -> Tensor:
    """Z(f) = (f - mean(f)) / (std(f) + 1e-7) of each sample over its classes (algorithm 1, as in the authors' code).

    The standard deviation has the divisor L - 1. Equal logits have the z-score 0; of two classes only their order is
    left.

    Args:
        logits: (batch, L).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True) + EPSILON)


def standardised_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """tau^2 * KL(softmax(Z(g) / tau) || softmax(Z(f) / tau)), mean over the batch (algorithm 2).

    Shifts of a sample's logits and positive factors, the student's or the teacher's, change nothing.

    Args:
        student: (batch, L) logits f.
        teacher: (batch, L) logits g.
        temperature: tau.
    """
    return soft_loss(standardised(student), standardised(teacher), temperature)


@dataclass(frozen=True)
class Standardised(Term):
    """Distillation of standardised logits.

    Args:
        temperature: tau.
    """

    temperature: float = 2.0

    def _faults(self) -> Faults:
        faults = super()._faults()
        faults.number("temperature", 0, exclusive=True)
        return faults

    def loss(self, pair: Pair, parts: nn.Module) -> Tensor:
        """`standardised_loss` of the logits."""
        return standardised_loss(pair.student.logits, pair.teacher.logits, self.temperature)
