"""Terms of how the samples of a batch lie to each other: the student's channels and positions may be any."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pkd_lightning.checks import Faults
from pkd_lightning.knowledge.term import FeatureTerm
from pkd_lightning.knowledge.tokens import as_tokens
from pkd_lightning.knowledge.vectors import precise


def rows(feature: Tensor, pooled: bool) -> Tensor:
    """One vector a sample: the mean over positions where `pooled`, else all positions in one, (batch, dimensions)."""
    tokens = precise(as_tokens(feature))
    return tokens.mean(1) if pooled else tokens.flatten(1)


@dataclass(frozen=True)
class RelationTerm(FeatureTerm):
    """A term of relations between the samples of a batch. Subclasses give `relations`.

    Args:
        pooled: compare samples by the mean over their positions, rather than by all of them.
    """

    pooled: bool = True

    within_batch: ClassVar[bool] = True

    def _faults(self) -> Faults:
        faults = super()._faults()
        faults.flag("pooled")
        return faults

    def between(self, student: Tensor, teacher: Tensor, part: nn.Module) -> Tensor:
        """`relations` of a vector a sample, in full precision: differences of large products would lose it."""
        with torch.autocast(student.device.type, enabled=False):
            return self.relations(rows(student, self.pooled), rows(teacher, self.pooled))

    def relations(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The scalar loss of vectors (batch, own dimensions) and (batch, the teacher's)."""
        raise NotImplementedError
