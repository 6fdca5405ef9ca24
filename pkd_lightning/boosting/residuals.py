"""The residual matrices K+ and K- of B-DISTIL (arXiv 2302.10093, algorithm 1) in a form that cannot overflow."""

import math

import torch
from torch import Tensor

CHUNK = 65_536  # rows at a time, so that temporaries stay small beside S


class ResidualMatrices:
    """K+ and K- of N samples and L classes, kept as the one matrix S that determines both.

    Start: K+ = K- = 1/(2N). Update: K+ <- K+ * exp(-eta * l), K- <- K- * exp(+eta * l), then per class j normalise so
    that sum_i K+(i,j) + K-(i,j) = 1. With S = sum_t eta_t * l_t this is

        log K+ = -S - log Z_j,    log K- = +S - log Z_j,    Z_j = sum_i 2 * cosh(S_ij).

    Attributes:
        S: (N, L) float32.
    """

    def __init__(self, samples: int, classes: int) -> None:
        self.S = torch.zeros(samples, classes)

    def update(self, residual: Tensor, eta: float) -> None:
        """Add one round: `residual` (N, L) is l = f - g of the accepted student, `eta` >= 0 the step.

        Raises:
            ValueError: where shapes differ, or a residual or the step is not finite; S is left as it was.
        """
        if residual.shape != self.S.shape:
            raise ValueError(f"residuals of shape {tuple(residual.shape)}, not {tuple(self.S.shape)}")
        if not (0 <= eta < math.inf and bool(residual.isfinite().all())):
            raise ValueError(f"the residuals of an accepted student must be finite and eta={eta} at least 0")
        self.S.add_(residual, alpha=eta)

    def log_normaliser(self) -> Tensor:
        """Log Z_j: (L,) float64."""
        parts = []
        for rows in self.S.split(CHUNK):
            rows = rows.double()
            parts.append(torch.logaddexp(rows, -rows).logsumexp(0))
        return torch.stack(parts).logsumexp(0)

    def k_plus(self, rows: slice = slice(None)) -> Tensor:
        """K+ of `rows`: (rows, L) float64, large where the ensemble is below the teacher."""
        return torch.exp(-self.S[rows].double() - self.log_normaliser())

    def k_minus(self, rows: slice = slice(None)) -> Tensor:
        """K- of `rows`: (rows, L) float64, large where the ensemble is above the teacher."""
        return torch.exp(self.S[rows].double() - self.log_normaliser())

    def raise_student(self) -> Tensor:
        """I = 1[K+ > K-]: (N, L) bool."""
        return self.S < 0

    def edges(self, residual: Tensor) -> Tensor:
        """edge_j = sum_i (K+(i,j) - K-(i,j)) * l(i,j) of a candidate with residuals `residual` (N, L): (L,) float64.

        Before the first update K+ = K-, so every edge is exactly 0.

        Raises:
            ValueError: where shapes differ.
        """
        if residual.shape != self.S.shape:
            raise ValueError(f"residuals of shape {tuple(residual.shape)}, not {tuple(self.S.shape)}")
        log_z = self.log_normaliser()
        total = torch.zeros(self.S.shape[1], dtype=torch.float64)
        for S, rows in zip(self.S.split(CHUNK), residual.split(CHUNK), strict=True):
            S = S.double()
            total += ((torch.exp(-S - log_z) - torch.exp(S - log_z)) * rows.double()).sum(0)
        return total


def theoretical_eta(samples: int, rounds: int, bound: float) -> float:
    """Eta = sqrt(log(2N) / T) / B: the step for which the mean of T weak learners comes within O(B sqrt(log(2N)/T))."""
    return math.sqrt(math.log(2 * samples) / rounds) / bound


def condition_holds(edges: Tensor, fraction: float = 1.0, margin: float = 0.0) -> bool:
    """Whether at least `fraction` of the classes have an edge above `margin`; (1, 0) is the published condition."""
    required = math.ceil(fraction * len(edges) - 1e-9)  # 0.07 * 100 is a little more than 7
    return int((edges > margin).sum()) >= required
