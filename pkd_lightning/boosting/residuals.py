"""The residual matrices K+ and K- of B-DISTIL (arXiv 2302.10093, algorithm 1) in a form that cannot overflow."""

import math
from pathlib import Path

import torch
from torch import Tensor

from pkd_lightning import ranks
from pkd_lightning.kernels import residuals as kernels
from pkd_lightning.matrix import Rows, SampleMatrix, chunks, largest


class ResidualMatrices:
    """K+ and K- of N samples and L classes, kept as the one matrix S that determines both.

    Start: K+ = K- = 1/(2N). Update: K+ <- K+ * exp(-eta * l), K- <- K- * exp(+eta * l), then per class j normalise so
    that sum_i K+(i,j) + K-(i,j) = 1. With S = sum_t eta_t * l_t this is

        log K+ = -S - log Z_j,    log K- = +S - log Z_j,    Z_j = sum_i 2 * cosh(S_ij).

    Args:
        samples: N.
        classes: L.
        path: where a large S is kept, see `SampleMatrix`; None keeps it in memory.
    """

    def __init__(self, samples: int, classes: int, path: Path | None = None) -> None:
        self._matrix = SampleMatrix(samples, classes, path)
        self._largest: float | None = 0.0  # abs(S), None where it has to be looked for
        self._log_normaliser: Tensor | None = None

    @property
    def S(self) -> Tensor:
        """(N, L) float32; not to be written to."""
        return self._matrix.values

    def update(self, residual: Rows, eta: float) -> None:
        """Add one round: `residual` (N, L) is l = f - g of the accepted student, `eta` >= 0 the step.

        Raises:
            ValueError: where shapes differ, or a residual or the step is not finite; S is left as it was.
        """
        self._check(residual)
        if not 0 <= eta < math.inf:
            raise ValueError(f"the step eta={eta} must be finite and at least 0")
        following, extremes = self._matrix.blank(), torch.zeros(16, dtype=torch.float32)
        for rows in chunks(following.shape):
            parts = (part.float().contiguous().view(-1).numpy() for part in (self.S[rows], residual[rows]))
            kernels.add_residual(*parts, eta, following[rows].view(-1).numpy(), extremes.numpy())
        size = ranks.highest(float(extremes.max()))
        if not math.isfinite(size):
            raise ValueError("the residuals of an accepted student must be finite, and their sum within float32")
        self._matrix.replace(following)
        self._largest, self._log_normaliser = size, None

    def log_normaliser(self) -> Tensor:
        """Log Z_j: (L,) float64."""
        if self._log_normaliser is not None:
            return self._log_normaliser
        parts = []
        for rows in chunks(self.S.shape):
            S = self.S[rows].double()
            parts.append(torch.logaddexp(S, -S).logsumexp(0))
        own = torch.stack(parts).logsumexp(0)
        self._log_normaliser = own if ranks.size() == 1 else torch.stack(ranks.gathered(own)).logsumexp(0)
        return self._log_normaliser

    def k_plus(self, rows: slice = slice(None)) -> Tensor:
        """K+ of `rows`: (rows, L) float64, large where the ensemble is below the teacher."""
        return torch.exp(-self.S[rows].double() - self.log_normaliser())

    def k_minus(self, rows: slice = slice(None)) -> Tensor:
        """K- of `rows`: (rows, L) float64, large where the ensemble is above the teacher."""
        return torch.exp(self.S[rows].double() - self.log_normaliser())

    def indicator(self, rows: slice = slice(None)) -> Tensor:
        """I = 1[K+ > K-] of `rows`: (rows, L) bool."""
        S = self.S[rows].contiguous()
        result = torch.empty(S.shape, dtype=torch.bool)
        kernels.mark_negative(S.view(-1).numpy(), result.view(-1).numpy())
        return result

    def sample_weights(self) -> Tensor:
        """w_i proportional to sum_j abs(K+(i,j) - K-(i,j)), of mean 1: (N,) float32.

        abs(K+ - K-) = 2 * sinh(abs(S)) / Z_j, in a form that neither overflows nor cancels. Where K+ = K- throughout,
        as before the first update, all weights are 1.
        """
        log_z, weights = self.log_normaliser(), torch.empty(len(self.S), dtype=torch.float64)
        for rows in chunks(self.S.shape):
            size = self.S[rows].double().abs()
            weights[rows] = -(torch.exp(size - log_z) * torch.expm1(-2 * size)).sum(1)
        mean = ranks.mean(float(weights.mean()), len(weights))
        return (weights / mean).float() if mean > 0 else torch.ones(len(self.S))

    def edges(self, residual: Rows) -> Tensor:
        """edge_j = sum_i (K+(i,j) - K-(i,j)) * l(i,j) of a candidate with residuals `residual` (N, L): (L,) float64.

        Before the first update K+ = K-, so every edge is exactly 0. Each matrix is read once.

        Raises:
            ValueError: where shapes differ.
        """
        self._check(residual)
        if self._largest is None:
            self._largest = largest(self.S)
        if self._largest > kernels.LARGEST:
            return self.edges_reference(residual)
        classes, known = self.S.shape[1], self._log_normaliser
        total, normaliser = (
            torch.zeros(size, dtype=torch.float64) for size in (classes, 0 if known is not None else classes)
        )
        for rows in chunks(self.S.shape):
            parts = (part.float().contiguous().numpy() for part in (self.S[rows], residual[rows]))
            kernels.add_edges(*parts, total.numpy(), normaliser.numpy())
        total = ranks.total(total)
        if known is None:
            self._log_normaliser = known = ranks.total(normaliser).log()
        return total * torch.exp(-known)

    def edges_reference(self, residual: Rows) -> Tensor:
        """`edges` by its definition, in logarithms, which no S is too large for."""
        log_z = self.log_normaliser()
        total = torch.zeros_like(log_z)
        for rows in chunks(self.S.shape):
            S = self.S[rows].double()
            total += ((torch.exp(-S - log_z) - torch.exp(S - log_z)) * residual[rows].double()).sum(0)
        return ranks.total(total)

    def _check(self, residual: Rows) -> None:
        if residual.shape != self.S.shape:
            raise ValueError(f"residuals of shape {tuple(residual.shape)}, not {tuple(self.S.shape)}")

    def state(self) -> Tensor | dict[str, str]:
        """What a checkpoint stores, see `SampleMatrix.state`."""
        return self._matrix.state()

    def load(self, state: Tensor | dict[str, str] | str) -> None:
        """Restore what `state` gave.

        Raises:
            ValueError, RunError: see `SampleMatrix.load`.
        """
        self._matrix.load(state)
        self._largest = self._log_normaliser = None


def theoretical_eta(samples: int, rounds: int, bound: float) -> float:
    """Eta = sqrt(log(2N) / T) / B: the step for which the mean of T weak learners comes within O(B sqrt(log(2N)/T))."""
    return math.sqrt(math.log(2 * samples) / rounds) / bound


def condition_holds(edges: Tensor, fraction: float = 1.0, margin: float = 0.0) -> bool:
    """Whether at least `fraction` of the classes have an edge above `margin`; (1, 0) is the published condition."""
    required = math.ceil(fraction * len(edges) - 1e-9)  # 0.07 * 100 is a little more than 7
    return int((edges > margin).sum()) >= required
