"""Relational knowledge distillation: distances and angles between samples (Park et al., arXiv 1904.05068)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pkd_lightning.checks import Faults
from pkd_lightning.knowledge.relations import RelationTerm
from pkd_lightning.knowledge.vectors import unit


def distances(vectors: Tensor) -> Tensor:
    """psi_D = |t_i - t_j|_2 / mu of each pair i < j of (batch, dimensions), mu their mean (section 3.2.1).

    They are zero where all vectors are the same, without a gradient.
    """
    found = torch.pdist(vectors)
    mean = found.mean()  # NaN of one vector, which has no pairs to be divided by it
    return found / mean.masked_fill(mean == 0, math.inf)


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all i, j of Huber(psi_D of the student, of the teacher), i = j included as in the authors' code.

    Args:
        student: (batch, own dimensions).
        teacher: (batch, its dimensions).
    """
    huber = F.smooth_l1_loss(distances(student), distances(teacher), reduction="sum")
    return 2 * huber / len(student) ** 2


def angles(vectors: Tensor) -> Tensor:
    """psi_A = <e_ij, e_ik>, e_ij = (t_j - t_i) / |t_j - t_i|_2: the cosine at i of each triple (section 3.2.2).

    Of (batch, dimensions), it is (batch, batch, batch), indexed by i, j, k; zero where two of a triple are the same.
    """
    directions = unit(vectors.unsqueeze(0) - vectors.unsqueeze(1))
    return directions @ directions.transpose(1, 2)


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all i, j, k of Huber(psi_A of the student, of the teacher), as in the authors' code.

    Time and memory grow with the third power of the batch: 8 MB for each of several tensors at 128 samples.

    Args:
        student: (batch, own dimensions).
        teacher: (batch, its dimensions).
    """
    return F.smooth_l1_loss(angles(student), angles(teacher))


@dataclass(frozen=True)
class RKD(RelationTerm):
    """RKD-DA, or RKD-D or RKD-A where the other's weight is 0.

    Args:
        distance: weight of `distance_loss`.
        angle: weight of `angle_loss`.
    """

    distance: float = 25.0
    angle: float = 50.0

    def _faults(self) -> Faults:
        faults = super()._faults()
        faults.number("distance", 0)
        faults.number("angle", 0)
        if self.distance == 0 and self.angle == 0:
            faults.found.append("distance=0: with angle=0, too, there is no loss; give one of them a weight")
        return faults

    def relations(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The weighted sum of both losses; what has no weight is not computed."""
        weighted = [(self.distance, distance_loss), (self.angle, angle_loss)]
        losses = [weight * loss(student, teacher) for weight, loss in weighted if weight > 0]
        return sum(losses[1:], losses[0])
