"""FSP: the flow of the solution procedure, from one layer to a later one (Yim et al., CVPR 2017)."""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkd_lightning.checks import Faults
from pkd_lightning.knowledge.term import FeatureTerm, Pair
from pkd_lightning.knowledge.tokens import as_tokens, mapped, resized
from pkd_lightning.knowledge.vectors import precise


def flow(first: Tensor, last: Tensor) -> Tensor:
    """G_ij = mean over positions of f_i * g_j (equation 1).

    Args:
        first: tokens (batch, positions, m) or planes f of a layer.
        last: tokens (batch, positions, n) or planes g of a later one. Of other positions, the more are brought to the
            fewer.

    Returns:
        (batch, m, n).
    """
    fewest = min((first, last), key=lambda feature: as_tokens(feature).shape[1])
    f, g = (precise(resized(feature, fewest)) for feature in (first, last))
    with torch.autocast(f.device.type, enabled=False):
        return f.transpose(1, 2) @ g / f.shape[1]


def flow_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over batch and entries of (G_S - G_T)^2 (equation 2, as a mean over the entries rather than a sum).

    Args:
        student: (batch, m, n) its flow.
        teacher: the teacher's, of the same shape.
    """
    return F.mse_loss(student, teacher)


@dataclass(frozen=True)
class FSP(FeatureTerm):
    """Flows from each of the modules to the next one, at least two of them: their mean.

    Where a module of the student has other channels than the teacher's, a linear map of each token without a bias, for
    planes a 1x1 convolution, is trained to give as many; it is dropped afterwards. Positions may differ.
    """

    def _faults(self) -> Faults:
        faults = super()._faults()
        if not faults.found and not self._by_depth and len(self.student_features) < 2:
            faults.found.append(f"student={self.student!r}: a flow is from one module to another; needs two or more")
        return faults

    def made(self, student: Tensor, teacher: Tensor) -> nn.Module:
        """The map of a module's channels, or nothing."""
        own, its = as_tokens(student).shape[2], as_tokens(teacher).shape[2]
        return nn.Identity() if own == its else nn.Linear(own, its, bias=False)

    def loss(self, pair: Pair, parts: nn.Module) -> Tensor:
        """The mean of `flow_loss` over the flows."""
        assert isinstance(parts, nn.ModuleList)
        taken = zip(self.taken(pair), parts, strict=True)
        features = [(mapped(part, own), its) for (own, its), part in taken]
        losses = [
            flow_loss(flow(first, last), flow(its_first, its_last))
            for (first, its_first), (last, its_last) in pairwise(features)
        ]
        return sum(losses[1:], losses[0]) / len(losses)
