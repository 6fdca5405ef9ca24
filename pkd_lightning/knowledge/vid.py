"""VID: likelihood of the teacher's features under a Gaussian made of the student's (Ahn et al., arXiv 1904.05835)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkd_lightning.checks import Faults
from pkd_lightning.knowledge.term import FeatureTerm
from pkd_lightning.knowledge.tokens import as_tokens, resized

EPSILON = 1e-5  # least variance, the authors'


def variational_loss(mean: Tensor, variance: Tensor, teacher: Tensor) -> Tensor:
    """-log N(t; mu, sigma^2) without its constant: mean over all entries of ((t - mu)^2 / sigma^2 + log sigma^2) / 2.

    The paper's sum over channels and positions is a mean, as in the authors' code.

    Args:
        mean: (batch, positions, channels) mu, made of the student's features.
        variance: (channels,) sigma^2.
        teacher: (batch, positions, channels) t.
    """
    error = teacher.to(variance.dtype) - mean.to(variance.dtype)
    return (error.square() / variance + variance.log()).mean() / 2


class Gaussian(nn.Module):
    """q(t | s): a mean of each token by three linear layers, for planes 1x1 convolutions, and a variance a channel.

    Args:
        student: channels of the student's tokens.
        teacher: of the teacher's.
        variance: sigma^2 before training.
    """

    def __init__(self, student: int, teacher: int, variance: float) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            nn.Linear(student, teacher, bias=False), nn.ReLU(),
            nn.Linear(teacher, teacher, bias=False), nn.ReLU(),
            nn.Linear(teacher, teacher, bias=False),
        )  # fmt: skip
        self.alpha = nn.Parameter(torch.full((teacher,), math.log(math.expm1(variance - EPSILON))))

    @property
    def variance(self) -> Tensor:
        """sigma^2 = log(1 + exp(alpha)) + 1e-5: (channels,)."""
        return F.softplus(self.alpha) + EPSILON


@dataclass(frozen=True)
class VID(FeatureTerm):
    """Variational information distillation. Mean and variances are trained with the student, and dropped afterwards.

    The student's tokens are interpolated to as many as the teacher has. Where the fit is good the loss is negative.

    Args:
        variance: sigma^2 before training.
    """

    variance: float = 5.0

    def _faults(self) -> Faults:
        faults = super()._faults()
        faults.number("variance", EPSILON, exclusive=True)
        return faults

    def made(self, student: Tensor, teacher: Tensor) -> nn.Module:
        """The Gaussian."""
        return Gaussian(as_tokens(student).shape[2], as_tokens(teacher).shape[2], self.variance)

    def between(self, student: Tensor, teacher: Tensor, part: nn.Module) -> Tensor:
        """`variational_loss` of the resized tokens' mean."""
        assert isinstance(part, Gaussian)
        mean = part.mean(resized(student, teacher))
        return variational_loss(mean, part.variance, as_tokens(teacher))
