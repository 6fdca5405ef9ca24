"""How sure a prefix is of an image: a score of the prefixes' logits so far, higher where it is surer.

A rule is asked for one prefix after another. What it needs of the earlier ones is its state, tensors with a row an
image: so rows can be left out as images are done. A score is NaN where logits of the image are not finite, and NaN
reaches no threshold. Scores are float64: in float32 the largest probability is 1 for many images.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

State = tuple[Tensor, ...]


class Rule(Protocol):
    """A rule for early exit."""

    @property
    def name(self) -> str:
        """By which a saved policy names it."""

    def step(self, logits: Tensor, state: State = ()) -> tuple[Tensor, State]:
        """Scores (n,) float64 of the next prefix, with logits (n, L), and the state after it; () before the first."""

    def macs(self, num_classes: int) -> int:
        """Its own multiply-accumulates, of one image and prefix. Exponentials and comparisons are none."""


@dataclass(frozen=True)
class Stateless:
    """A rule that looks at one prefix only.

    Attributes:
        name: see `Rule`.
        score: logits (n, L) to scores (n,).
        per_class: multiply-accumulates a class.
    """

    name: str
    score: Callable[[Tensor], Tensor]
    per_class: int = 0

    def step(self, logits: Tensor, state: State = ()) -> tuple[Tensor, State]:
        """See `Rule.step`."""
        return self.score(logits), ()

    def macs(self, num_classes: int) -> int:
        """See `Rule.macs`."""
        return self.per_class * num_classes


def maximum_probability(logits: Tensor) -> Tensor:
    """max_k p_k with p = softmax(logits), of logits (n, L): MSDNet's rule (arXiv 1703.09844, section 5)."""
    return logits.double().softmax(-1).amax(-1)


def margin(logits: Tensor) -> Tensor:
    """p_(1) - p_(2), the two largest of p = softmax(logits), of logits (n, L); p_(1) where there is one class.

    "Best versus second best" of active learning (Joshi et al., CVPR 2009); as a rule for exits it is the score margin
    of Big/Little networks (Park et al., CODES+ISSS 2015).
    """
    probabilities = logits.double().softmax(-1)
    if probabilities.shape[-1] == 1:
        return probabilities[:, 0]
    first, second = probabilities.topk(2, -1).values.unbind(-1)
    return first - second


def negative_entropy(logits: Tensor) -> Tensor:
    """sum_k p_k * log(p_k) in nats with p = softmax(logits), of logits (n, L): BranchyNet (arXiv 1709.01686, III-C)."""
    entropy: Tensor = torch.special.entr(logits.double().softmax(-1)).sum(-1)
    return -entropy


class Patience:
    """The number of successive prefixes, up to this one, that gave the same class as the one before them.

    PABEE (Zhou et al., arXiv 2006.04152, eq. 5): pat_t = pat_(t-1) + 1 where argmax F_t = argmax F_(t-1), else 0, with
    pat_1 = 0. An image is done where pat_t reaches a threshold.
    """

    name = "patience"

    def step(self, logits: Tensor, state: State = ()) -> tuple[Tensor, State]:
        """See `Rule.step`; the state is the last class and the score."""
        classes = logits.argmax(-1)
        score = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
        if state:
            last, before = state
            score = torch.where(classes == last, before + 1, score)
        score = score.masked_fill(~finite(logits), torch.nan)
        return score, (classes, score.nan_to_num(0.0))

    def macs(self, num_classes: int) -> int:
        """None: it counts."""
        return 0


MAXIMUM = Stateless("maximum", maximum_probability)
MARGIN = Stateless("margin", margin)
ENTROPY = Stateless("entropy", negative_entropy, 1)
PATIENCE = Patience()
SIMPLE: tuple[Rule, ...] = (MAXIMUM, MARGIN, ENTROPY, PATIENCE)


def finite(logits: Tensor) -> Tensor:
    """Rows of logits (n, L) that have a softmax: no NaN, no +inf, and something above -inf."""
    return logits.amax(-1).isfinite()  # NaN is the largest of all


def scores_of(rule: Rule, prefixes: Iterable[Tensor]) -> Tensor:
    """Scores (N, T) of the logits (N, L) of prefixes 1, ..., T."""
    found, state = [], ()  # type: list[Tensor], State
    for logits in prefixes:
        scores, state = rule.step(logits, state)
        found.append(scores)
    return torch.stack(found, 1)
