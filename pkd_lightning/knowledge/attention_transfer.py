"""Attention transfer: the student looks where the teacher does (Zagoruyko & Komodakis, arXiv 1612.03928)."""

from dataclasses import dataclass

from torch import Tensor, nn

from pkd_lightning.errors import ConfigError
from pkd_lightning.knowledge.term import FeatureTerm
from pkd_lightning.knowledge.tokens import as_tokens, mapped, resized
from pkd_lightning.knowledge.vectors import precise, unit


def attention(tokens: Tensor) -> Tensor:
    """Q = sum over channels of f^2, F_sum^2 of section 3.1: (batch, positions, channels) to (batch, positions)."""
    return precise(tokens).square().sum(2)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over batch and positions of (Q_S / |Q_S|_2 - Q_T / |Q_T|_2)^2.

    As the authors' code has it, with which weights of 1000 belong: equation 2 has the norm, not its square.

    Args:
        student: (batch, positions) its attention.
        teacher: the teacher's, of the same shape.
    """
    return (unit(student) - unit(teacher)).square().mean()


@dataclass(frozen=True)
class AttentionTransfer(FeatureTerm):
    """Activation-based attention transfer. Channels may differ in number, and nothing is trained beside the student.

    Of two maps, the one with more positions is interpolated to the fewer of the other.
    """

    def made(self, student: Tensor, teacher: Tensor) -> nn.Module:
        """Nothing; the positions are counted."""
        own, its = (as_tokens(feature).shape[1] for feature in (student, teacher))
        if min(own, its) < 2:
            raise ConfigError([f"of {own} positions of the student and {its} of the teacher there is no map; needs 2"])
        return super().made(student, teacher)

    def between(self, student: Tensor, teacher: Tensor, part: nn.Module) -> Tensor:
        """`attention_loss` of the maps, at the smaller one's size."""
        maps = [mapped(lambda tokens: attention(tokens).unsqueeze(2), feature) for feature in (student, teacher)]
        fewest = min(maps, key=lambda map_: as_tokens(map_).shape[1])
        own, its = (resized(map_, fewest).squeeze(2) for map_ in maps)
        return attention_loss(own, its)
