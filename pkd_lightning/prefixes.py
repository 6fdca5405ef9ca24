"""Prefixes of an ensemble: F_t = a_t * F_{t-1} + c_t * f_t, from F_0 = 0.

So each is a weighted sum of its members' logits. What follows the first t students changes nothing in F_t.
"""

from collections.abc import Sequence

from torch import Tensor

Scales = tuple[float, float]


def mix(ensemble: Tensor | None, student: Tensor, scales: Sequence[float] | Sequence[Tensor] | Tensor) -> Tensor:
    """F_t of F_{t-1} (None for F_0) and f_t, both of one shape, with the scales (a_t, c_t)."""
    a, c = scales
    return c * student if ensemble is None else a * ensemble + c * student
