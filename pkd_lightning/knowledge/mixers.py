"""Alignment of mixer outputs, MOHAWK's second stage (Bick et al., arXiv 2408.10189), for students of another shape."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pkd_lightning.knowledge.term import FeatureTerm
from pkd_lightning.knowledge.tokens import as_tokens, mapped, resized


def alignment_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over batch and tokens of || s - g ||_2, the norm over channels (section 4.2, hidden-state alignment).

    MOHAWK gives each block of the student the teacher's hidden states as inputs. Here each has its own, since the two
    models' tokens have other sizes.

    Args:
        student: (batch, tokens, channels) what a mixer of the student gives.
        teacher: what the teacher's gives, of the same shape.
    """
    distances: Tensor = torch.linalg.vector_norm(student - teacher, dim=-1)
    return distances.mean()


@dataclass(frozen=True)
class Mixers(FeatureTerm):
    """Alignment of mixers, or of other modules that give tokens, such as blocks.

    Where channels differ, a linear map of the student's, trained with it and dropped afterwards, comes in between.
    The student's tokens are interpolated to as many as the teacher has.

    A hook on a mixer keeps its block from being computed in one pass with norm, order and residual; the mixer itself
    still is one pass. A hook on a block (`blocks.*`) costs nothing of that.
    """

    def made(self, student: Tensor, teacher: Tensor) -> nn.Module:
        """The linear map, or the identity."""
        own, its = as_tokens(student).shape[2], as_tokens(teacher).shape[2]
        return nn.Identity() if own == its else nn.Linear(own, its, bias=False)

    def between(self, student: Tensor, teacher: Tensor, part: nn.Module) -> Tensor:
        """`alignment_loss` of the mapped and resized tokens."""
        return alignment_loss(resized(mapped(part, student), teacher), as_tokens(teacher))
