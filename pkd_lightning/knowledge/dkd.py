"""Decoupled knowledge distillation: target and non-target classes (Zhao et al., CVPR 2022, arXiv 2203.08679)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pkd_lightning.checks import Faults
from pkd_lightning.knowledge.term import Pair, Term
from pkd_lightning.losses import soft_loss


def target_and_others(logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Logits (batch, 2) of "the target class" and "any other class" at this temperature, and those of the others.

    Args:
        logits: (batch, L).
        target: (batch,) labels.
        temperature: tau.

    Returns:
        (batch, 2) and (batch, L - 1).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    column = torch.arange(logits.shape[1] - 1, device=logits.device)
    others = logits.gather(1, column + (column >= target[:, None]))
    any_other = temperature * (others / temperature).logsumexp(1, keepdim=True)
    return torch.cat([logits.gather(1, target[:, None]), any_other], 1), others


def decoupled_loss(
    student: Tensor, teacher: Tensor, target: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    """tau^2 * (alpha * KL(b_g || b_f) + beta * KL(q_g || q_f)), mean over the batch (equation 7).

    b is the distribution over "the target class" and "any other", q that over the other classes alone, both of
    softmax(logits / tau). alpha = 1 and beta = 1 - b_g(target), sample by sample, would be plain distillation.

    Args:
        student: (batch, L) logits f.
        teacher: (batch, L) logits g.
        target: (batch,) labels.
        alpha: weight of the knowledge of the target class (TCKD).
        beta: of that of the non-target classes (NCKD).
        temperature: tau.
    """
    own, its = (target_and_others(logits, target, temperature) for logits in (student, teacher))
    return alpha * soft_loss(own[0], its[0], temperature) + beta * soft_loss(own[1], its[1], temperature)


@dataclass(frozen=True)
class DKD(Term):
    """Decoupled distillation. The authors let its weight rise in the first epochs: `schedules.warmup`.

    Args:
        alpha: weight of the knowledge of the target class.
        beta: of that of the non-target classes.
        temperature: tau.
    """

    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0

    def _faults(self) -> Faults:
        faults = super()._faults()
        faults.number("alpha", 0)
        faults.number("beta", 0)
        faults.number("temperature", 0, exclusive=True)
        return faults

    def loss(self, pair: Pair, parts: nn.Module) -> Tensor:
        """`decoupled_loss` of the logits."""
        own, its = pair.student.logits, pair.teacher.logits
        return decoupled_loss(own, its, pair.target, self.alpha, self.beta, self.temperature)
