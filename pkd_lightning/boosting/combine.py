"""The scales a_t, c_t with which the logits of a new student join those of the ensemble, see `prefixes.mix`."""

from collections.abc import Callable
from dataclasses import dataclass

from pkd_lightning.prefixes import Scales


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
