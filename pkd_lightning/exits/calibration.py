"""Thresholds of an early exit such that a mean of multiply-accumulates is met on the rows they are chosen on.

Images leave at the first prefix t < T whose score reaches its threshold, and at T whatever its score. The functions
take scores of validation rows, and neither labels nor test rows.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pkd_lightning.errors import ConfigError

Thresholds = tuple[float, ...]  # of prefixes 1 to T - 1; infinity where nothing leaves
STEPS = 32  # of the bisection, which ends within 1e-7 of log r
WIDEST = 60.0  # abs(log r) of the ratio of exit fractions: nearly everything leaves at the first, or at the last


def students_used(scores: Tensor, thresholds: Sequence[float]) -> Tensor:
    """At which prefix, from 1, each image leaves (N,), of scores (N, T - 1) or more columns and T - 1 thresholds."""
    last = len(thresholds)
    limits = torch.tensor(thresholds, dtype=torch.float64, device=scores.device)
    done = scores[:, :last] >= limits  # False for NaN
    at_end = torch.ones(len(scores), 1, dtype=torch.bool, device=scores.device)
    return torch.cat([done, at_end], 1).int().argmax(1) + 1


def exit_costs(macs: Sequence[int], of_rule: int) -> Tensor:
    """Multiply-accumulates (T,) of an image that leaves at prefix t: the students' (`macs`, of whole prefixes), and the
    rule's for each prefix that it was asked about, which the last is not.
    """
    asked = torch.arange(1, len(macs) + 1, dtype=torch.float64).clamp(max=len(macs) - 1)
    return torch.tensor(list(macs), dtype=torch.float64) + of_rule * asked


def mean_cost(scores: Tensor, thresholds: Sequence[float], costs: Tensor) -> float:
    """Mean multiply-accumulates an image; 0 of no images."""
    if len(scores) == 0:
        return 0.0
    return float(costs[students_used(scores, thresholds) - 1].mean())


def one_threshold(scores: Tensor, costs: Tensor, budget: float) -> Thresholds:
    """The same threshold for all prefixes, the highest whose mean cost is within `budget`.

    Args:
        scores: (N, T - 1) float64 of the rows it is chosen on.
        costs: (T,) as from `exit_costs`.
        budget: multiply-accumulates an image, in the mean.

    Raises:
        ConfigError: where the budget does not pay for the first student of every image.
    """
    prefixes = len(costs) - 1
    values = scores[scores.isfinite()].unique()  # in order

    def at(place: int) -> Thresholds:
        if place >= len(values):
            return (math.inf,) * prefixes
        return (float(values[0] if place == 0 else values[place - 1 : place + 1].mean()),) * prefixes

    least, above = 0, len(values) + 1  # the cost does not fall as the threshold rises
    _check(scores, at(0), costs, budget)
    while above - least > 1:
        middle = (least + above) // 2
        if mean_cost(scores, at(middle), costs) <= budget:
            least = middle
        else:
            above = middle
    return at(least)


def budgeted_thresholds(scores: Tensor, costs: Tensor, budget: float) -> Thresholds:
    """A threshold a prefix, by the budgeted batch of MSDNet (Huang et al., arXiv 1703.09844, section 3).

    A fraction q_t = z * r^(t - 1) of the images leaves at prefix t, the surest of those that are left, where z makes
    the sum 1. (The paper has r = 1 - q for 0 < q <= 1; its code goes on to r > 1, for larger budgets.) The ratio r is
    found by bisection, as the largest whose mean cost is within the budget. Tied scores leave together, and the next
    prefix makes up for it.

    Arguments and errors as of `one_threshold`.
    """
    everything_runs = (math.inf,) * (len(costs) - 1)
    if mean_cost(scores, everything_runs, costs) <= budget:
        return everything_runs
    low, high = -WIDEST, WIDEST
    best = _by_fractions(scores, _fractions(low, len(costs)))
    most = _check(scores, best, costs, budget)
    for _ in range(STEPS):
        middle = (low + high) / 2
        found = _by_fractions(scores, _fractions(middle, len(costs)))
        cost = mean_cost(scores, found, costs)
        if cost <= budget:
            low = middle
            if cost >= most:  # with ties the cost need not rise with r
                best, most = found, cost
        else:
            high = middle
    return best


Calibration = Callable[[Tensor, Tensor, float], Thresholds]


def _check(scores: Tensor, cheapest: Thresholds, costs: Tensor, budget: float) -> float:
    """The mean cost of the cheapest thresholds."""
    cost = mean_cost(scores, cheapest, costs)
    if not cost <= budget:
        never = int((~scores[:, :1].isfinite()).sum())
        rows = f"; {never} of {len(scores)} rows have logits that are not finite, and never leave early" * (never > 0)
        raise ConfigError([f"budget={budget:g}: the cheapest exits take {cost:g} multiply-accumulates an image{rows}"])
    return cost


def _fractions(log_ratio: float, prefixes: int) -> Tensor:
    """Fractions (T,) that leave at each prefix, geometric in t."""
    return (log_ratio * torch.arange(prefixes, dtype=torch.float64)).softmax(0)


def _by_fractions(scores: Tensor, fractions: Tensor) -> Thresholds:
    """Thresholds at which about these fractions (T,) of the rows leave at each prefix."""
    wanted = (fractions.cumsum(0) * len(scores)).round().long()
    left, thresholds = scores, []
    for t in range(len(fractions) - 1):
        column = left[:, t]
        thresholds.append(_cut(column[column.isfinite()], int(wanted[t]) - (len(scores) - len(left))))
        left = left[~(column >= thresholds[-1])]
    return tuple(thresholds)


def _cut(values: Tensor, count: int) -> float:
    """A threshold that the `count` largest of values reach: between two values, so that rounding moves none across.

    Of ties at the cut all reach it or none, whichever is nearer to `count`.
    """
    if count <= 0 or len(values) == 0:
        return math.inf
    ordered = values.sort(descending=True).values
    if count >= len(ordered):
        return float(ordered[-1])
    tied = ordered == ordered[count]
    first, end = int(tied.int().argmax()), int(tied.nonzero()[-1, 0]) + 1
    place = first if count - first <= end - count else end
    if place == 0:
        return math.inf
    return float(ordered[-1] if place == len(ordered) else ordered[place - 1 : place + 1].mean())
