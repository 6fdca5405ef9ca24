"""How the logits of a new student join those of the ensemble: F_t = a_t * F_{t-1} + c_t * f_t.

Every prefix is a weighted sum of its members' logits: the weights a, c fold into one weight per member.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Scales = tuple[float, float]


@dataclass(frozen=True)
class Combination:
    """A rule for (a_t, c_t).

    Attributes:
        initial: round t (from 0) to (a_t, c_t).
        learned: `initial` is only the start; a_t and c_t > 0 are learned with the student, where the objective sees
            the ensemble, and solved for on the training rows at the end of the round.
    """

    initial: Callable[[int], Scales]
    learned: bool = False


def _mean(round_: int) -> Scales:
    return round_ / (round_ + 1), 1 / (round_ + 1)


def _sum(round_: int) -> Scales:
    return 1.0, 1.0


mean = Combination(_mean)
sum = Combination(_sum)
learned = Combination(_mean, learned=True)


def prefix_weights(scales: Sequence[Scales], members: int) -> Tensor:
    """The weight of each of the first `members` students in their prefix: (members,)."""
    weights: list[float] = []
    for a, c in scales[:members]:
        weights = [a * w for w in weights] + [c]
    return torch.tensor(weights)
