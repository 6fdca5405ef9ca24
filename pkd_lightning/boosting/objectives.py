"""The loss of rounds 2..T. The first round is always the distillation loss of the student alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from pkd_lightning.config import BoostingConfig
from pkd_lightning.losses import distillation_loss, residual_barrier_loss, soft_loss


class RoundBatch(NamedTuple):
    """What a round's loss sees of one batch.

    Attributes:
        student: (batch, classes) logits f_t.
        ensemble: (batch, classes) logits a * F_{t-1} + c * f_t of the ensemble with the student.
        teacher: (batch, classes) logits g.
        target: (batch,) labels.
        indicator: (batch, classes) bool, 1[K+ > K-].
        bound: B of the students so far, see `boosting.bound_quantile`.
        weight: (batch,) of each sample's loss, 1 for a validation row; None where nothing is weighed.
    """

    student: Tensor
    ensemble: Tensor
    teacher: Tensor
    target: Tensor
    indicator: Tensor
    bound: float
    weight: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """A round loss.

    Attributes:
        loss: batch and configuration to a scalar.
        accept_by: what a candidate trained with it is judged by where `boosting.weak_learner.require` is `auto`.
        sees_ensemble: the loss depends on the ensemble's logits, so learned scales get a gradient from it.
        weighs_samples: the loss multiplies each sample's by `RoundBatch.weight`, so `boosting.weights` may be set.
    """

    loss: Callable[[RoundBatch, BoostingConfig], Tensor]
    accept_by: Literal["condition", "improvement"]
    sees_ensemble: bool
    weighs_samples: bool = False


def student_loss(batch: RoundBatch, config: BoostingConfig) -> Tensor:
    """The distillation loss of the student alone: the first round of every objective."""
    return distillation_loss(batch.student, batch.teacher, batch.target, config.alpha, config.temperature, batch.weight)


def ensemble_loss(batch: RoundBatch, config: BoostingConfig) -> Tensor:
    """The distillation loss of the ensemble with the student."""
    return distillation_loss(
        batch.ensemble, batch.teacher, batch.target, config.alpha, config.temperature, batch.weight
    )


def _published(batch: RoundBatch, config: BoostingConfig) -> Tensor:
    barrier = residual_barrier_loss(batch.student - batch.teacher, batch.indicator, batch.bound, config.gamma)
    if config.first_term == "both":
        return student_loss(batch, config) + (1 - config.alpha) * barrier
    if config.first_term == "soft":
        first = soft_loss(batch.student, batch.teacher, config.temperature)
    else:
        first = F.cross_entropy(batch.student, batch.target)
    return config.alpha * first + (1 - config.alpha) * barrier


def _anchored(batch: RoundBatch, config: BoostingConfig) -> Tensor:
    return (1 - config.anchor) * student_loss(batch, config) + config.anchor * ensemble_loss(batch, config)


# Mamba-PKD (arXiv 2503.01727): alpha * first term + (1 - alpha) * L_B. K+ and K- enter by their order, in L_B.
published = Objective(_published, "condition", sees_ensemble=False)
# Functional gradient boosting: each student corrects the ensemble before it. With combine=sum.
additive = Objective(ensemble_loss, "improvement", sees_ensemble=True, weighs_samples=True)
# Each student is a classifier of its own and corrects the ensemble before it. With combine=learned.
anchored = Objective(_anchored, "improvement", sees_ensemble=True, weighs_samples=True)
# The baseline: students that know nothing of each other.
independent = Objective(student_loss, "improvement", sees_ensemble=False, weighs_samples=True)
