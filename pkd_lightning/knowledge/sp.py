"""Similarity preserving: samples alike to the teacher are alike to the student (Tung & Mori, arXiv 1907.09682)."""

from dataclasses import dataclass

from torch import Tensor

from pkd_lightning.knowledge.relations import RelationTerm
from pkd_lightning.knowledge.vectors import unit


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """|G_S - G_T|_F^2 / batch^2, G = Q Q^T with rows of length 1 (equations 1 to 3).

    Args:
        student: (batch, own dimensions) Q of the student.
        teacher: (batch, its dimensions) that of the teacher.
    """
    return (unit(student @ student.T) - unit(teacher @ teacher.T)).square().mean()


@dataclass(frozen=True)
class SP(RelationTerm):
    """Similarities of whole activations, all positions of them, as published."""

    pooled: bool = False

    def relations(self, student: Tensor, teacher: Tensor) -> Tensor:
        """`similarity_loss`."""
        return similarity_loss(student, teacher)
