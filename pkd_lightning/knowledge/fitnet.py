"""FitNet hints: a regressor of the student's features is to give the teacher's (Romero et al., arXiv 1412.6550)."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from pkd_lightning.knowledge.term import FeatureTerm
from pkd_lightning.knowledge.tokens import as_tokens, mapped, resized


def hint_loss(regressed: Tensor, teacher: Tensor) -> Tensor:
    """Mean over batch, positions and channels of (r(f) - g)^2 (equation 3, as a mean rather than a sum).

    Args:
        regressed: (batch, positions, channels) what the regressor makes of the student's features.
        teacher: the teacher's, of the same shape.
    """
    return F.mse_loss(regressed, teacher)


@dataclass(frozen=True)
class FitNet(FeatureTerm):
    """Hints. The regressor is one linear layer of each token, for planes a 1x1 convolution; it is dropped afterwards.

    The student's tokens are interpolated to as many as the teacher has.
    """

    def made(self, student: Tensor, teacher: Tensor) -> nn.Module:
        """The regressor."""
        return nn.Linear(as_tokens(student).shape[2], as_tokens(teacher).shape[2])

    def between(self, student: Tensor, teacher: Tensor, part: nn.Module) -> Tensor:
        """`hint_loss` of the regressed and resized tokens."""
        return hint_loss(resized(mapped(part, student), teacher), as_tokens(teacher))
