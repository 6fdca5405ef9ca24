"""The scales a_t, c_t with which the logits of a new student join those of the ensemble, see `prefixes.mix`."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

from pkd_lightning.boosting.options import BoostingConfig
from pkd_lightning.checks import resolve, under
from pkd_lightning.errors import ConfigError
from pkd_lightning.prefixes import Scales


@dataclass(frozen=True)
class Combination:
    """A rule for (a_t, c_t).

    Attributes:
        initial: round t (from 0) to (a_t, c_t).
        learned: `initial` is only the start; a_t and c_t > 0 are learned with the student, where the objective sees
            the ensemble, and solved for at the end of the round.
        held_out: solve for them on the validation rows, which students have not learned; else on the training rows.
    """

    initial: Callable[[int], Scales]
    learned: bool = False
    held_out: bool = False

    def __post_init__(self) -> None:
        if self.held_out and not self.learned:
            raise ValueError("held_out: only learned scales are solved for")


def _mean(round_: int) -> Scales:
    return round_ / (round_ + 1), 1 / (round_ + 1)


def _sum(round_: int) -> Scales:
    return 1.0, 1.0


mean = Combination(_mean)
sum = Combination(_sum)
learned = Combination(_mean, learned=True)
held_out = Combination(_mean, learned=True, held_out=True)


def combination_of(config: BoostingConfig) -> Combination:
    """The combination of the boosting options.

    Raises:
        ConfigError: where there is none of that name.
    """
    try:
        found = resolve(config.combine, sys.modules[__name__], _is_one, Combination.__name__)
    except ConfigError as error:
        raise ConfigError(under("combine", error.faults)) from error
    return found  # type: ignore[no-any-return]


def _is_one(found: object) -> bool:
    return isinstance(found, Combination)
