"""A loss on features: attention transfer (Zagoruyko & Komodakis, arXiv 1612.03928), beside the anchored objective."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from pkd_lightning.boosting.objectives import Anchored, RoundBatch


@dataclass(frozen=True)
class AttentionTransfer(Anchored):
    """The loss of `Anchored`, and beta * mean of (a_s - a_t)^2 over the tokens of each pair of features.

    a: mean of the squares over a token's channels, of norm 1 over the tokens.
    """

    student_features: Sequence[str] = ()
    teacher_features: Sequence[str] = ()
    beta: float = 100.0

    def loss(self, batch: RoundBatch) -> Tensor:
        loss = super().loss(batch)
        for mine, its in zip(self.student_features, self.teacher_features, strict=True):
            difference = attention(batch.student_features[mine]) - attention(batch.teacher_features[its])
            loss = loss + self.beta * difference.square().mean()
        return loss


def attention(tokens: Tensor) -> Tensor:
    """(batch, length, channels) to (batch, length)."""
    return F.normalize(tokens.square().mean(-1), dim=-1)
