"""Find weak learner: train candidates of one rung until one is good enough (B-DISTIL, arXiv 2302.10093)."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from pkd_lightning import ranks
from pkd_lightning.boosting.objectives import Objective, objective_of
from pkd_lightning.boosting.options import BoostingConfig, WeakLearnerConfig
from pkd_lightning.boosting.residuals import condition_holds
from pkd_lightning.boosting.student import StudentModule
from pkd_lightning.data.module import DataModule
from pkd_lightning.errors import Diverged
from pkd_lightning.fitting import FitResult, matmul_precision, predict
from pkd_lightning.losses import distillation_loss
from pkd_lightning.matrix import chunks, quantile
from pkd_lightning.prefixes import Scales, mix

logger = logging.getLogger(__name__)

LEAST_SCALE = 1e-6  # of a fitted scale, for logits of median 1: every student stays a member
AcceptedBy = Literal["first_round", "condition", "relaxed_condition", "improvement", "best_candidate", "peers"]


@dataclass(frozen=True)
class Candidate:
    """A trained candidate and how it was judged.

    Attributes:
        model: the student, with the weights kept.
        scales: (a_t, c_t), how it joins the ensemble.
        logits: (training + validation rows, L) f_t.
        edges: (L,) weak-learning edges, of clipped residuals where `boosting.bound_quantile` clips them; None, as the
            following, without a teacher.
        unclipped_edges: (L,) of the residuals as they are.
        validation_loss: distillation loss on the validation rows of the ensemble with the candidate.
        fit: what the fit gave.
        accepted_by: the rule that accepts it, or None.
        attempt: of its round, from 0 on the first rung tried.
        judged_loss: the validation loss that it is judged by, see `Round.judged_losses`.
    """

    model: nn.Module
    scales: Scales
    logits: Tensor
    edges: Tensor | None
    unclipped_edges: Tensor | None
    validation_loss: float
    fit: FitResult
    accepted_by: AcceptedBy | None
    attempt: int = 0
    judged_loss: float = math.inf


class WeakLearnerCheck(L.Callback):
    """Checks the condition on the training rows every `check_every` epochs and ends the fit when it holds.

    `held` then says so, and the weights that meet the condition are kept rather than those of the best epoch. A check
    is one forward pass over the training rows.

    Args:
        data: the data module.
        edges: logits (training rows, L) to the edges (L,), as the candidate is judged by.
        config: how often, and what is required.
        logits: (training rows, L), where the student's logits are left by a check.
    """

    def __init__(
        self,
        data: DataModule,
        edges: Callable[[Tensor], Tensor | None],
        config: WeakLearnerConfig,
        logits: Tensor,
    ) -> None:
        self.data, self.edges, self.config, self.logits = data, edges, config, logits
        self.held: dict[str, Tensor] | None = None
        self.known = False  # whether `logits` are those of the weights held

    def state_dict(self) -> dict[str, Any]:
        """The weights that meet the condition."""
        return {"held": self.held}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.held, self.known = state_dict["held"], False

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check at the end of every `check_every`-th epoch; a callback that averages weights has the averages there."""
        if (trainer.current_epoch + 1) % self.config.check_every:
            return
        assert isinstance(pl_module, StudentModule)
        with matmul_precision("highest"):  # as all other logits, whatever the fit itself uses
            predict(pl_module.asked, self.data, self.data.training, pl_module.device, out=self.logits)
        edges = self.edges(self.logits)
        assert edges is not None  # or `faults_without_teacher` has refused the condition
        if condition_holds(edges, self.config.fraction, self.config.margin):
            self.held = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}
            self.known = True
            trainer.should_stop = True


def judge(
    round_: int,
    edges: Tensor | None,
    unclipped: Tensor | None,
    validation_loss: float,
    previous_loss: float,
    require: str,
    config: WeakLearnerConfig,
) -> AcceptedBy | None:
    """The rule that accepts a candidate, or None.

    In the first round K+ = K-, every edge is exactly 0, and the student is accepted by definition. Only a candidate
    that meets the published condition, every edge above 0 of clipped and of unclipped residuals, is reported as
    `condition`.

    Args:
        round_: round from 0.
        edges: (L,) of the candidate; None without a teacher.
        unclipped: (L,) the same of residuals as they are.
        validation_loss: of the ensemble with the candidate.
        previous_loss: of the ensemble without it.
        require: `condition` or `improvement`.
        config: fraction, margin and least improvement.
    """
    if round_ == 0:
        return "first_round"
    if require == "improvement":
        return "improvement" if validation_loss < previous_loss * (1 - config.min_improvement) else None
    assert edges is not None  # or `faults_without_teacher` has refused the condition
    assert unclipped is not None
    if condition_holds(edges, config.fraction, config.margin):
        return "condition" if condition_holds(edges) and condition_holds(unclipped) else "relaxed_condition"
    return None


def required(config: BoostingConfig, objective: Objective) -> str:
    """What candidates are judged by: `condition` or `improvement`."""
    return objective.accept_by if config.weak_learner.require == "auto" else config.weak_learner.require


def faults_without_teacher(config: BoostingConfig) -> list[str]:
    """Options that need a teacher, for a run that has none, each with what to do."""
    cure = "or choose a teacher, teacher=NAME"
    found = []
    if config.peers is None:
        objective = objective_of(config)
        if config.alpha != 1:
            found.append(f"alpha={config.alpha!r}: must be 1 without a teacher, when only labels are learned; {cure}")
        elif objective.needs_teacher or objective.reads_residuals:
            found.append(f"objective={objective.name!r}: needs a teacher; set objective=independent, {cure}")
        elif required(config, objective) == "condition":
            found.append(f"weak_learner.require='condition': edges need a teacher; set improvement, {cure}")
    if config.weights == "samples":
        found.append(f"weights='samples': K+ and K- need a teacher; set none, {cure}")
    if config.knowledge:
        found.append(f"knowledge: {', '.join(config.knowledge)} compare students with a teacher; leave it out, {cure}")
    for key in ("eta", "bound_quantile"):
        if getattr(config, key) != getattr(BoostingConfig, key):
            found.append(f"{key}={getattr(config, key)!r}: is of K+ and K-, which need a teacher; leave it out, {cure}")
    return found


def find_weak_learner(
    round_: int,
    train: Callable[[int], Candidate],
    config: WeakLearnerConfig,
) -> tuple[Candidate | None, int]:
    """Train up to `max_attempts` candidates of one rung; one more where one diverged.

    Args:
        round_: round from 0, for messages.
        train: attempt from 0 to a candidate.
        config: attempts, and what happens when all fail.

    Returns:
        The candidate and the number of attempts; None where the rung failed. With `on_failure=accept` a rung fails
        only by divergence: else the candidate with the lowest loss that candidates are judged by is taken, with
        `accepted_by` "best_candidate".
    """
    best: Candidate | None = None
    attempt, attempts = 0, config.max_attempts
    while attempt < attempts:
        attempt += 1
        try:
            candidate = train(attempt - 1)
        except Diverged as error:  # a failed attempt, not the end of the run, as a full disk is
            logger.warning("round %d, attempt %d failed: %s", round_ + 1, attempt, error)
            attempts = config.max_attempts + 1
            continue
        if candidate.accepted_by is not None:
            return candidate, attempt
        if best is None or candidate.judged_loss < best.judged_loss:
            best = candidate
    if config.on_failure == "accept" and best is not None:
        return replace(best, accepted_by="best_candidate"), attempt
    return None, attempt


def fit_scales(ensemble: Tensor, student: Tensor, teacher: Tensor, target: Tensor, config: BoostingConfig) -> Scales:
    """(a, c) > 0 that minimise the distillation loss of a * F + c * f on the given rows.

    An objective that sees the ensemble learns its scales with the student, but they lag behind the student in its few
    steps; for the other objectives this is the only way to learn them. The loss is convex in (a, c), so the scales that
    were learned need not be its start. In their logarithms it is not, and so flat towards 0 that a quasi-Newton method
    stands still there, or overflows.

    Args:
        ensemble: (rows, L) F_{t-1}, of the rows that this rank owns, as all that follow.
        student: (rows, L) f_t.
        teacher: (rows, L) g.
        target: (rows,) labels.
        config: alpha and temperature of the loss.
    """
    # each in units of its own logits: on one scale a student of far larger logits would make the problem stiff
    units = [quantile(logits, 0.5) or 1.0 for logits in (ensemble, student)]
    samples = int(ranks.total(torch.tensor(len(student))))

    def loss_and_gradient(values: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        scales = torch.from_numpy(values / units).requires_grad_()
        total, gradient = 0.0, torch.zeros_like(scales)
        for rows in chunks(student.shape):
            mixed = mix(ensemble[rows].double(), student[rows].double(), scales)
            loss = distillation_loss(mixed, teacher[rows].double(), target[rows], config.alpha, config.temperature)
            loss = loss * (len(mixed) / samples)
            gradient += torch.autograd.grad(loss, scales)[0]
            total += float(loss.detach())
        found = ranks.total(torch.cat([torch.tensor([total], dtype=torch.float64), gradient])).numpy()
        return float(found[0]), found[1:] / units

    fitted = minimize(
        loss_and_gradient, (1.0, 1.0), jac=True, method="L-BFGS-B", bounds=[(LEAST_SCALE, None)] * 2,
        options={"maxiter": 50, "ftol": 1e-12, "gtol": 1e-8},
    )  # fmt: skip
    if not fitted.success:
        logger.warning("the fit of the scales ended before it converged: %s", fitted.message)
    a, c = map(float, fitted.x / units)
    return a, c


def describe(edges: Tensor | None, unclipped: Tensor | None) -> dict[str, Any] | None:
    """The edges as a round reports them: range, classes that meet the condition, and each class's edge; or None.

    A class meets it where its edge is positive, of clipped and of unclipped residuals.
    """
    if edges is None or unclipped is None:
        return None
    values = [float(edge) for edge in edges]
    return {
        "min": min(values),
        "max": max(values),
        "satisfied": int(((edges > 0) & (unclipped > 0)).sum()),
        "classes": len(values),
        "per_class": values,
    }
